"""An evaluation that tells what it does, for an audit to judge. Runs in processes of its own; see `sandbox`.

The watched evaluation is the one that scores records, a subclass at its seams: what it charges, which rows it charges
from, where the counts stood, which weights made the rows, what was learned when. Nothing it is told by the record
enters; all of it is computed from the artifact and the tokens.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
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
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.mixers import published
from hedgemix.model.transformer import Model
from hedgemix.runtime.files import Log, silent


@dataclass(frozen=True)
class Source:
    """What an audited evaluation reads, in plain JSON types."""

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
        """The audited tokens, uint16 (N,)."""
        return TokenStream(self.shards, self.limit).read(0, self.tokens)

    def settings(self) -> EvaluateConfig:
        return from_dict(EvaluateConfig, self.config)


class Enough(Exception):
    """Raised by a watched evaluation when it has scored the last piece that it was asked for."""


class Watched(Evaluation):
    """An evaluation with a memory. Set `wanted` and `until` before the first chunk."""

    claim = "final"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        size = len(self.tokens_N)
        self.wanted: Sequence[int] = ()
        """Positions whose full rows are kept."""
        self.until = size
        """Stop after the piece that holds this position."""
        self.nats_N = np.full(size, np.nan)
        """What each position was charged under the claim."""
        self.charged = 0
        self.full: dict[int, Tensor] = {}
        """Log rows (V,) float64 of the wanted positions under the claim."""
        self.seen: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.row_seconds = 0.0
        self._added: list[Tensor] = []
        if self.adapter:
            learn, adapter = self.adapter.learn, self.adapter

            def watched(tokens_N: Any, weights_N: Any, chunk: Piece) -> None:
                before = fingerprint(adapter.scorer)
                learn(tokens_N, weights_N, chunk)
                self.tell("learn", chunk, before=before, after=fingerprint(adapter.scorer))

            self.adapter.learn = watched  # type: ignore[method-assign]

    def tell(self, event: str, span: Piece, **more: Any) -> None:
        self.events.append({"event": event, "start": span.start, "stop": span.stop, **more})

    def weights_now(self) -> dict[str, int]:
        """Fingerprints of the weights that make the next rows."""
        shipped = fingerprint(self.model)
        learned = self.adapter is not None and self.adapter.chunks_learned > 0
        scorer = fingerprint(self.adapter.scorer) if self.adapter and learned else shipped
        return {"frozen": shipped, "scorer": scorer}

    def rows(self, chunk: Piece) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
        self.tell("open", chunk, **self.weights_now())
        yield from super().rows(chunk)
        self.tell("close", chunk, **self.weights_now())

    def score(self, piece: Piece, rows: dict[str, Tensor]) -> None:
        asked = [t for t in self.wanted if piece.start <= t < piece.stop]
        began = time.monotonic()
        found = self.look(piece, rows, asked) if asked else []
        self.row_seconds += time.monotonic() - began
        before, self._added = self.mixer.position, []
        super().score(piece, rows)
        nats = torch.cat(self._added).double().cpu().numpy() if self._added else np.zeros(0)
        self.charged += len(nats)
        self.nats_N[piece.start : piece.stop] = nats[: piece.stop - piece.start]
        self.tell("score", piece, before=before, after=self.mixer.position, charged=len(nats))
        for t, told in zip(asked, found, strict=True):
            self.seen.append({"position": t, **told, "charged_nats": float(self.nats_N[t])})
        if piece.stop > self.until:
            raise Enough

    def add(self, name: str, nats_B: Tensor) -> None:
        if name == self.claim:
            self._added.append(nats_B)
        super().add(name, nats_B)

    def look(self, piece: Piece, rows: dict[str, Tensor], asked: Sequence[int]) -> list[dict[str, Any]]:
        """What the rows of the asked positions are, right before the piece is scored."""
        mixed_BV = self.mixer.rows(rows, piece.start, piece.stop)[self.best][self.mixer.kind]
        told = []
        for t in asked:
            rule_V = self.published_row(piece, rows[self.best], t)
            row_V = mixed_BV[t - piece.start].double() if self.claim == "final" else rule_V
            self.full[t] = row_V.clone()
            told.append(
                {
                    "log_sum": float(row_V.logsumexp(0)),
                    "sound": bool((row_V < math.inf).all()),  # NaN is not
                    "row_nats": -float(row_V[self.tokens_N[t : t + 1]]),
                    "published_log_sum": float(rule_V.logsumexp(0)),
                }
            )
        return told

    def published_row(self, piece: Piece, rows_BV: Tensor, t: int) -> Tensor:
        """Log of what the published rule gives each token at t, (V,) float64: it is asked for every one."""
        state, done = copy.copy(self.published), t - piece.start  # its scoring replaces fields and changes none
        history_B2, targets_B = self.history(piece), self.tokens_N[piece.start : piece.stop]
        if done:
            published.score(state, rows_BV[:done], history_B2[:done], targets_B[:done])
        every_V = torch.arange(rows_BV.shape[1], device=rows_BV.device)
        row, history = rows_BV[done].expand(len(every_V), -1), history_B2[done].expand(len(every_V), -1)
        nats_V, _ = published.mix(state, *published.losses(state, row, history, every_V))
        return -nats_V.double()

    def play(self, log: Log = silent) -> list[dict[str, Any]]:
        """Run all chunks, or as far as `until`; returns their lines of the trace."""
        lines = []
        for number, chunk in enumerate(self.chunks):
            try:
                lines.append(self.run_chunk(number, chunk))
            except Enough:
                break
            log({"fraction": chunk.stop / len(self.tokens_N)})
        return lines


def fingerprint(model: Model) -> int:
    """Sum of the weights' bit patterns: changes when a weight does."""
    total = 0
    for number, value in enumerate(model.parameters(), start=1):
        total += number * int(value.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
    return total % 2**63


def begin(source: Source, tokens_N: np.ndarray | None = None) -> Watched:
    """The watched evaluation of the source's text, or of another, its n-grams indexed here and now."""
    torch.set_num_threads(source.threads)
    if source.device == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)  # copies are compared to the bit
    found, config = artifact.read(source.artifact), source.settings()
    tokens_N = source.read() if tokens_N is None else tokens_N
    device = torch.device(source.device)
    work = Watched.begin(found, tokens_N, config, device, schedule_tokens=source.schedule_tokens)
    work.claim = source.claim
    return work


def testify(source: dict[str, Any], positions: list[int], cuts: list[int], marks: list[int], log: Log) -> None:
    """Replay the evaluation, then evaluate copies of the text changed at or after each cut.

    positions: whose rows are looked at. marks: positions up to which the charged nats are summed. Logs {"fraction"},
    {"replay": ...}, and {"target": ...} or {"future": ...} for each copy.
    """
    read = Source(**source)
    began = time.monotonic()
    work, tokens_N = begin(read), read.read()
    work.wanted = sorted({*positions, *cuts})
    lines = work.play(log)
    found = artifact.read(read.artifact)
    processor = tokenizer.load(found.tokenizer)
    text_bytes = len(tokenizer.decode(processor, tokens_N)) - len(tokenizer.decode(processor, tokens_N[:1]))
    replay = {
        "lines": [{name: line[name] for name in ("chunk", "tokens", "bytes", "bits")} for line in lines],
        "events": work.events,
        "rows": [row for row in work.seen if row["position"] in {*positions}],
        "tokens": work.tokens,
        "bytes": work.bytes,
        "text_bytes": text_bytes,
        "charged": work.charged,
        "nats": work.nats[read.claim],
        "nats_of_spans": float(np.nansum(work.nats_N)),
        "marks": {str(mark): float(work.nats_N[1:mark].sum()) for mark in marks},
        "published_mass": work.result().published_mass,
        "result": asdict(work.result()),
        "tokens_sha256": hashlib.sha256(tokens_N[1:].astype("<u2").tobytes()).hexdigest(),
        "artifact_sha256": found.sha256,
        "torch": torch.__version__,
        "row_seconds": work.row_seconds,
        "seconds": time.monotonic() - began,
    }
    log({"replay": replay})
    nats_N, full = work.nats_N, work.full
    del work
    for changed in ("target", "future"):
        for cut in cuts:
            log({changed: compare(read, tokens_N, changed, cut, nats_N, full[cut], log)})


def compare(
    source: Source, tokens_N: np.ndarray, changed: str, cut: int, nats_N: np.ndarray, row_V: Tensor, log: Log
) -> dict[str, Any]:
    """Evaluate a copy of the text in which only the token at `cut` is another one, or all tokens after it are."""
    began = time.monotonic()
    work = begin(source, altered(tokens_N, changed, cut, row_V.shape[0]))
    work.wanted, work.until = [cut], cut
    work.play(log)
    stop = cut + (changed == "future")
    mine, expected = work.nats_N[1:stop], nats_N[1:stop]
    other = np.flatnonzero((mine != expected) & ~(np.isnan(mine) & np.isnan(expected)))
    return {
        "position": cut,
        "row_equal": torch.equal(work.full[cut], row_V),
        "row_difference": float((work.full[cut] - row_V).abs().nan_to_num(math.inf).max()),
        "nats_compared": len(mine),
        "nats_different": len(other),
        "first_different": int(other[0]) + 1 if len(other) else None,
        "chunks_learned": work.adapter.chunks_learned if work.adapter else 0,
        "seconds": time.monotonic() - began,
    }


def altered(tokens_N: np.ndarray, changed: str, cut: int, vocab_size: int) -> np.ndarray:
    """A copy in which every token of the changed part is another one, drawn evenly."""
    part = slice(cut, cut + 1) if changed == "target" else slice(cut + 1, None)
    shift = np.random.default_rng(cut).integers(1, vocab_size, len(tokens_N[part]))
    out = tokens_N.copy()
    out[part] = (out[part] + shift) % vocab_size
    return out


def score_rank(source: dict[str, Any], rank: int, world: int, meeting: str, log: Log) -> dict[str, Any]:
    """One of `world` ranks over gloo, meeting in a file: its lines of the trace and its weights' fingerprint."""
    read = Source(**source)
    if read.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(minutes=10)
    )
    work = begin(read)
    lines = work.play(log)
    return {"bits": [line["bits"] for line in lines], "weights": work.weights_now()["scorer"]}


def compress(source: dict[str, Any], log: Log) -> dict[str, Any]:
    """The audited tokens as the codec writes them: data in base64, payload bits and the bits that it aimed at."""
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
    """The number and SHA-256 of the tokens (uint16) that the codec reads out of a file, with the artifact alone."""
    from hedgemix.codec.text_codec import decompress_tokens

    torch.set_num_threads(threads)
    tokens_N = decompress_tokens(artifact.read(artifact_path), Path(data_path).read_bytes(), log=log)
    return {"tokens": len(tokens_N), "sha256": hashlib.sha256(tokens_N.astype("<u2").tobytes()).hexdigest()}
