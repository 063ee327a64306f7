"""An evaluation that tells what it does, for an audit to judge. Runs in processes of its own; see `sandbox`.

The watched evaluation is the one that scores records. A witness hears what it charges, where the counts stood, which
weights made the rows, what was learned when. Nothing of the record enters; all of it is
computed from the artifact and the tokens.
"""

from __future__ import annotations

import base64
import hashlib
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_tokenizer
from hedgemix.config import EvaluateConfig, from_dict
from hedgemix.data import tokenizer
from hedgemix.data.shards import TokenStream
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.observer import Observer
from hedgemix.evaluate.scoring_order import Piece
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


class Witness(Observer):
    """Keeps what an evaluation does."""

    def __init__(self, claim: str, tokens: int, log: Log = silent) -> None:
        """claim: the name of `nats` that is taken for the score. tokens: N, of the text. log: told what the targets of
        each chunk were charged, {"charges": base64 of float64, in nats}."""
        self.claim, self.log = claim, log
        self.nats_N = np.full(tokens, np.nan)
        """What each position was charged under the claim, in nats."""
        self.charged = 0
        """Targets charged under the claim."""
        self.events: list[dict[str, Any]] = []
        self._position = self._scorer = 0

    def tell(self, event: str, span: Piece, **more: Any) -> None:
        """Keep an event."""
        self.events.append({"event": event, "start": span.start, "stop": span.stop, **more})

    def on_open(self, work: Evaluation, chunk: Piece) -> None:
        """Keep which weights make the chunk's first rows."""
        self.tell("open", chunk, **weights_now(work))

    def on_close(self, work: Evaluation, chunk: Piece) -> None:
        """Keep which weights made the chunk's last rows, and tell its charges."""
        self.tell("close", chunk, **weights_now(work))
        charges = self.nats_N[chunk.start : chunk.stop].astype("<f8").tobytes()
        self.log({"charges": base64.b64encode(charges).decode()})

    def on_learn(self, work: Evaluation, chunk: Piece) -> None:
        """Hold the fingerprint of the adapted weights before they learn the chunk."""
        assert work.adapter
        self._scorer = fingerprint(work.adapter.scorer)

    def on_learned(self, work: Evaluation, chunk: Piece) -> None:
        """Keep that the chunk was learned, and the adapted weights' fingerprints before and after it."""
        assert work.adapter
        self.tell("learn", chunk, before=self._scorer, after=fingerprint(work.adapter.scorer))

    def on_rows(self, work: Evaluation, piece: Piece, rows: dict[str, Tensor]) -> None:
        """Hold where the mixer stands before the piece is scored."""
        self._position = work.mixer.position

    def on_charge(self, work: Evaluation, piece: Piece, charges: dict[str, Tensor]) -> None:
        """Keep what the piece was charged under the claim, in nats."""
        nats = charges[self.claim].double().cpu().numpy()
        self.charged += len(nats)
        self.nats_N[piece.start : piece.stop] = nats[: piece.stop - piece.start]
        self.tell("score", piece, before=self._position, after=work.mixer.position, charged=len(nats))


def play(work: Evaluation, log: Log = silent) -> list[dict[str, Any]]:
    """Run all chunks; returns their lines of the trace."""
    lines = []
    for number, chunk in enumerate(work.chunks):
        lines.append(work.run_chunk(number, chunk))
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
        torch.use_deterministic_algorithms(True, warn_only=True)
    device = torch.device(source.device)
    given = artifact.read(source.artifact), tokens_N, source.settings(), device
    return Evaluation.begin(*given, schedule_tokens=source.schedule_tokens, observer=observer)


def testify(source: dict[str, Any], marks: list[int], log: Log) -> None:
    """Replay the evaluation.

    marks: positions up to which the charged nats are summed. Logs {"fraction"} and {"charges"} chunk by chunk, and
    {"replay": ...}.
    """
    read = Source(**source)
    began = time.monotonic()
    tokens_N = read.read()
    witness = Witness(read.claim, len(tokens_N), log)
    work = begin(read, tokens_N, witness)
    lines = play(work, log)
    found = artifact.read(read.artifact)
    processor = load_tokenizer(found)
    text_bytes = len(tokenizer.decode(processor, tokens_N)) - len(tokenizer.decode(processor, tokens_N[:1]))
    replay = {
        "lines": [{name: line[name] for name in ("chunk", "tokens", "bytes", "bits")} for line in lines],
        "events": witness.events,
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
        "seconds": time.monotonic() - began,
    }
    log({"replay": replay})


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
