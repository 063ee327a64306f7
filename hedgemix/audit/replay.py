"""An evaluation that tells what it does, for an audit to judge. Runs in processes of its own; see `sandbox`.

The watched evaluation is the one that scores records. A witness hears what it charges, which rows it charges from,
where the counts stood, which weights made the rows, what was learned when. Nothing of the record enters; all of it is
computed from the artifact and the tokens.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.config import EvaluateConfig, from_dict
from hedgemix.data import tokenizer
from hedgemix.data.shards import TokenStream
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.observer import Observer
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.mixers import published
from hedgemix.model.transformer import Model
from hedgemix.runtime.files import Log, silent


@dataclass(frozen=True)
class Source:
    """Says what an audited evaluation reads, in plain JSON types."""

    artifact: str
    shards: list[str]
    """Of the validation text."""
    limit: int
    """Tokens of the shards that are the text (0: all)."""
    tokens: int
    """Tokens from its start that are audited."""
    schedule_tokens: int
    """Tokens of the whole text."""
    config: dict[str, Any]
    """EvaluateConfig."""
    claim: str
    """Which of an evaluation's numbers is taken for the score: final or published."""
    device: str
    threads: int

    def read(self) -> np.ndarray:
        """Read the audited tokens, uint16 (N,)."""
        return TokenStream(self.shards, self.limit).read(0, self.tokens)

    def settings(self) -> EvaluateConfig:
        """Return the settings of the evaluation; raises RecipeError for a field that it does not have."""
        return from_dict(EvaluateConfig, self.config)


class Enough(Exception):
    """Ends a replay: the witness raises it when the last piece that it was asked for is scored."""


class Witness(Observer):
    """Keeps what an evaluation does."""

    def __init__(self, claim: str, tokens: int, wanted: Sequence[int] = (), until: int | None = None) -> None:
        """claim: the name of `nats` that is taken for the score. tokens: N, of the text. wanted: positions whose full
        rows are kept. until: stop after the piece that holds this position."""
        self.claim, self.wanted, self.until = claim, wanted, tokens if until is None else until
        self.nats_N = np.full(tokens, np.nan)
        """What each position was charged under the claim, in nats."""
        self.charged = 0
        """Targets charged under the claim."""
        self.full: dict[int, Tensor] = {}
        """Log rows (V,) float64 of the wanted positions under the claim."""
        self.seen: list[dict[str, Any]] = []
        """What the rows of the wanted positions are, and what was charged there."""
        self.events: list[dict[str, Any]] = []
        self.row_seconds = 0.0
        self._looked: list[dict[str, Any]] = []
        self._position = self._scorer = 0

    def tell(self, event: str, span: Piece, **more: Any) -> None:
        """Keep an event."""
        self.events.append({"event": event, "start": span.start, "stop": span.stop, **more})

    def on_open(self, work: Evaluation, chunk: Piece) -> None:
        """Keep which weights make the chunk's first rows."""
        self.tell("open", chunk, **weights_now(work))

    def on_close(self, work: Evaluation, chunk: Piece) -> None:
        """Keep which weights made the chunk's last rows."""
        self.tell("close", chunk, **weights_now(work))

    def on_learn(self, work: Evaluation, chunk: Piece) -> None:
        """Hold the fingerprint of the adapted weights before they learn the chunk."""
        assert work.adapter
        self._scorer = fingerprint(work.adapter.scorer)

    def on_learned(self, work: Evaluation, chunk: Piece) -> None:
        """Keep that the chunk was learned, and the adapted weights' fingerprints before and after it."""
        assert work.adapter
        self.tell("learn", chunk, before=self._scorer, after=fingerprint(work.adapter.scorer))

    def on_rows(self, work: Evaluation, piece: Piece, rows: dict[str, Tensor]) -> None:
        """Look at the rows of the piece's wanted positions, and hold where the mixer stands before it is scored."""
        asked = [t for t in self.wanted if piece.start <= t < piece.stop]
        began = time.monotonic()
        self._looked = self.look(work, piece, rows, asked) if asked else []
        self.row_seconds += time.monotonic() - began
        self._position = work.mixer.position

    def on_charge(self, work: Evaluation, piece: Piece, charges: dict[str, Tensor]) -> None:
        """Keep what the piece was charged under the claim, in nats; raises Enough when it holds the last position asked
        for."""
        nats = charges[self.claim].double().cpu().numpy()
        self.charged += len(nats)
        self.nats_N[piece.start : piece.stop] = nats[: piece.stop - piece.start]
        self.tell("score", piece, before=self._position, after=work.mixer.position, charged=len(nats))
        for row in self._looked:
            self.seen.append(row | {"charged_nats": float(self.nats_N[row["position"]])})
        if piece.stop > self.until:
            raise Enough

    def look(
        self, work: Evaluation, piece: Piece, rows: dict[str, Tensor], asked: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Describe the rows of the asked positions, right before the piece is scored."""
        mixed_BV = work.mixer.rows(rows, piece.start, piece.stop)[work.best][work.mixer.kind]
        looked = []
        for t in asked:
            rule_V = published_row(work, piece, rows[work.best], t)
            row_V = mixed_BV[t - piece.start].double() if self.claim == "final" else rule_V
            self.full[t] = row_V.clone()
            looked.append(
                {
                    "position": t,
                    "log_sum": float(row_V.logsumexp(0)),
                    "sound": bool((row_V < math.inf).all()),  # NaN is not
                    "row_nats": -float(row_V[work.tokens_N[t : t + 1]]),
                    "published_log_sum": float(rule_V.logsumexp(0)),
                }
            )
        return looked


def published_row(work: Evaluation, piece: Piece, rows_BV: Tensor, t: int) -> Tensor:
    """Log of what the published rule gives each token at t, (V,) float64: it is asked for every one."""
    state, done = copy.copy(work.published), t - piece.start  # its scoring replaces fields and changes none
    history_B2, targets_B = work.history(piece), work.tokens_N[piece.start : piece.stop]
    if done:
        published.score(state, rows_BV[:done], history_B2[:done], targets_B[:done])
    every_V = torch.arange(rows_BV.shape[1], device=rows_BV.device)
    row, history = rows_BV[done].expand(len(every_V), -1), history_B2[done].expand(len(every_V), -1)
    nats_V, _ = published.mix(state, *published.losses(state, row, history, every_V))
    return -nats_V.double()


def play(work: Evaluation, log: Log = silent) -> list[dict[str, Any]]:
    """Run all chunks, or as far as the witness asks; returns their lines of the trace."""
    lines = []
    for number, chunk in enumerate(work.chunks):
        try:
            lines.append(work.run_chunk(number, chunk))
        except Enough:
            break
        log({"fraction": chunk.stop / len(work.tokens_N)})
    return lines


def weights_now(work: Evaluation) -> dict[str, int]:
    """Take the fingerprints of the weights that make the next rows."""
    shipped = fingerprint(work.model)
    learned = work.adapter is not None and work.adapter.chunks_learned > 0
    scorer = fingerprint(work.adapter.scorer) if work.adapter and learned else shipped
    return {"frozen": shipped, "scorer": scorer}


def fingerprint(model: Model) -> int:
    """Sum of the weights' bit patterns: changes when a weight does."""
    total = 0
    for number, value in enumerate(model.parameters(), start=1):
        total += number * int(value.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
    return total % 2**63


def begin(source: Source, tokens_N: np.ndarray, observer: Observer | None = None) -> Evaluation:
    """Begin the source's evaluation of its own text or of another, uint16 (N,), whose n-grams are indexed here and
    now."""
    torch.set_num_threads(source.threads)
    if source.device == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)  # copies are compared to the bit
    device = torch.device(source.device)
    given = artifact.read(source.artifact), tokens_N, source.settings(), device
    return Evaluation.begin(*given, schedule_tokens=source.schedule_tokens, observer=observer)


def testify(
    source: dict[str, Any], positions: list[int], cuts: list[int], marks: list[int], seed: int, log: Log
) -> None:
    """Replay the evaluation, then evaluate copies of the text changed at or after each cut.

    positions: whose rows are looked at. marks: positions up to which the charged nats are summed. Logs {"fraction"},
    {"replay": ...}, and {"target": ...} or {"future": ...} for each copy.
    """
    read = Source(**source)
    began = time.monotonic()
    tokens_N = read.read()
    witness = Witness(read.claim, len(tokens_N), sorted({*positions, *cuts}))
    work = begin(read, tokens_N, witness)
    lines = play(work, log)
    found = artifact.read(read.artifact)
    processor = tokenizer.load(found.tokenizer)
    text_bytes = len(tokenizer.decode(processor, tokens_N)) - len(tokenizer.decode(processor, tokens_N[:1]))
    replay = {
        "lines": [{name: line[name] for name in ("chunk", "tokens", "bytes", "bits")} for line in lines],
        "events": witness.events,
        "rows": [row for row in witness.seen if row["position"] in {*positions}],
        "tokens": work.tokens,
        "bytes": work.bytes,
        "text_bytes": text_bytes,
        "charged": witness.charged,
        "nats": work.nats[read.claim],
        "nats_of_spans": float(np.nansum(witness.nats_N)),
        "marks": {str(mark): float(witness.nats_N[1:mark].sum()) for mark in marks},
        "published_mass": work.result().published_mass,
        "result": asdict(work.result()),
        "tokens_sha256": hashlib.sha256(tokens_N[1:].astype("<u2").tobytes()).hexdigest(),
        "artifact_sha256": found.sha256,
        "torch": torch.__version__,
        "row_seconds": witness.row_seconds,
        "seconds": time.monotonic() - began,
    }
    log({"replay": replay})
    nats_N, full = witness.nats_N, witness.full
    del work
    for changed in ("target", "future"):
        for cut in cuts:
            log(
                {
                    changed: compare(
                        read,
                        altered(tokens_N, changed, cut, len(full[cut]), seed),
                        changed,
                        cut,
                        nats_N,
                        full[cut],
                        log,
                    )
                }
            )


def compare(
    source: Source, copy_N: np.ndarray, changed: str, cut: int, nats_N: np.ndarray, row_V: Tensor, log: Log
) -> dict[str, Any]:
    """Evaluate a copy of the text in which only the token at `cut` is another one, or all tokens after it are; see
    `altered`."""
    began = time.monotonic()
    witness = Witness(source.claim, len(copy_N), [cut], until=cut)
    work = begin(source, copy_N, witness)
    play(work, log)
    stop = cut + (changed == "future")
    mine, expected = witness.nats_N[1:stop], nats_N[1:stop]
    other = np.flatnonzero((mine != expected) & ~(np.isnan(mine) & np.isnan(expected)))
    return {
        "position": cut,
        "row_equal": torch.equal(witness.full[cut], row_V),
        "row_difference": float((witness.full[cut] - row_V).abs().nan_to_num(math.inf).max()),
        "nats_compared": len(mine),
        "nats_different": len(other),
        "first_different": int(other[0]) + 1 if len(other) else None,
        "chunks_learned": work.adapter.chunks_learned if work.adapter else 0,
        "seconds": time.monotonic() - began,
    }


def altered(tokens_N: np.ndarray, changed: str, cut: int, vocab_size: int, seed: int) -> np.ndarray:
    """Copy the tokens with another one, drawn evenly with the audit's seed, in place of each of the changed part: the
    token at `cut` (changed: "target"), or all after it."""
    part = slice(cut, cut + 1) if changed == "target" else slice(cut + 1, None)
    shift = np.random.default_rng([seed, cut]).integers(1, vocab_size, len(tokens_N[part]))
    out = tokens_N.copy()
    out[part] = (out[part] + shift) % vocab_size
    return out


def score_rank(source: dict[str, Any], rank: int, world: int, meeting: str, log: Log) -> dict[str, Any]:
    """Score as one of `world` ranks over gloo, meeting in a file; returns its lines of the trace and its weights'
    fingerprint."""
    read = Source(**source)
    if read.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(minutes=10)
    )
    work = begin(read, read.read())
    lines = play(work, log)
    return {"bits": [line["bits"] for line in lines], "weights": weights_now(work)["scorer"]}


def compress(source: dict[str, Any], log: Log) -> dict[str, Any]:
    """Compress the audited tokens with the codec; returns the data in base64, its payload bits and the bits that it
    aimed at."""
    from hedgemix.codec.text_codec import compress_tokens

    read = Source(**source)
    torch.set_num_threads(read.threads)
    found = artifact.read(read.artifact)
    coded = compress_tokens(found, read.read(), read.settings(), schedule_tokens=read.schedule_tokens, log=log)
    return {
        "data": base64.b64encode(coded.data).decode(),
        "payload_bits": coded.payload_bits,
        "ideal_bits": coded.ideal_bits,
    }


def decompress(artifact_path: str, data_path: str, threads: int, log: Log) -> dict[str, Any]:
    """Count and hash (SHA-256) the tokens, uint16, that the codec reads out of a file with the artifact alone."""
    from hedgemix.codec.text_codec import decompress_tokens

    torch.set_num_threads(threads)
    tokens_N = decompress_tokens(artifact.read(artifact_path), Path(data_path).read_bytes(), log=log)
    return {"tokens": len(tokens_N), "sha256": hashlib.sha256(tokens_N.astype("<u2").tobytes()).hexdigest()}
