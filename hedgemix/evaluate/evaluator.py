"""The score of an artifact: bits per byte of a token stream, from the artifact and the tokens alone.

Every token's bits are added once, and only then does anything learn from it: experts and mixing weights token by token
or block by block, a model that test-time training moves after each chunk. Two row sets are scored side by side, the
shipped model's as they are and with what adapts (the experts over its features, or trained weights), so that one pass
tells what each stage is worth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model, load_tokenizer
from hedgemix.config import EvaluateConfig, RecipeError
from hedgemix.data import bpb, memory
from hedgemix.data.device_text import Ones, Sizes, Text, same
from hedgemix.data.shards import TokenStream
from hedgemix.evaluate.breakdown import Tally
from hedgemix.evaluate.observer import Observer
from hedgemix.evaluate.scoring_order import FEATURES, Piece, chunk_rows, chunks
from hedgemix.evaluate.start import Start
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import ngram_index
from hedgemix.experts.feature_experts import HEAD, start_experts
from hedgemix.mixers import published
from hedgemix.mixers.batch_mixer import SPAN_TOKENS, BatchMixer
from hedgemix.model.transformer import Model
from hedgemix.runtime import collectives
from hedgemix.runtime.files import Log, silent
from hedgemix.runtime.phases import Phases
from hedgemix.runtime.profiler import tracing


@dataclass(frozen=True)
class EvaluateResult:
    """Holds what an evaluation found: bits per byte of every stage, seconds and weights."""

    bpb_quantized: float
    """Bits per byte of the artifact's weights, frozen, no mixing."""
    bpb_mixed: float
    """Bits per byte of the artifact's weights, frozen, mixed with the experts that see no features of theirs."""
    bpb_ttt: float | None
    """Bits per byte with test-time training (the fast head, or trained weights), no mixing; None when it is off."""
    bpb_final: float
    """The score: bits per byte with everything the recipe turns on. A code length."""
    bpb_hedge: float
    """Bits per byte of the Hedge mixture over the same rows as bpb_final."""
    bpb_logistic: float
    """Bits per byte of the logistic mixture over the same rows as bpb_final."""
    bpb_published: float
    """What the published rule reports; no code length."""
    published_mass: float
    """Mean over tokens of the sum of the published rule's probabilities over the vocabulary."""
    nats_per_token: float
    """bpb_final as nats a token."""
    scored_tokens: int
    scored_bytes: int
    """Of the scored tokens' text."""
    evaluate_seconds: float
    """From reading the artifact to the last bit, over all restarts."""
    scoring_seconds: float
    """Part of evaluate_seconds in forward passes, of the frozen and of the adapted weights."""
    mixing_seconds: float
    """Part of evaluate_seconds in experts and mixers."""
    ttt_seconds: float
    """Part of evaluate_seconds in test-time training and the neural cache."""
    expert_names: list[str]
    """The neural model and the experts beside it."""
    expert_weights: list[float]
    """Their weights in the plain Hedge mixture after the last token."""
    ensemble_names: list[str]
    """The neural model and one logistic mixer a gate."""
    ensemble_weights: list[float]
    """Their Hedge weights after the last token."""


def score_model(model: Model, stream: TokenStream, config: EvaluateConfig, log: Log = silent) -> float:
    """Sum the nats of the stream's tokens but the first under a frozen model, no mixing; on the model's device."""
    device = next(model.parameters()).device
    tokens_N = Text(stream, device)
    nats, began = 0.0, time.monotonic()
    for chunk in chunks(len(tokens_N), config.chunk_tokens):
        for piece, rows in chunk_rows({"model": model}, tokens_N, chunk, config):
            nats += target_nats(rows["model"], tokens_N[piece.start : piece.stop])
        seconds = time.monotonic() - began
        log({"fraction": chunk.stop / len(tokens_N), "tokens": chunk.stop - 1, "elapsed_seconds": seconds})
    return nats


def evaluate_artifact(
    path: Path,
    stream: TokenStream,
    counts: Path,
    config: EvaluateConfig,
    device: torch.device,
    *,
    trace: Path | None = None,
    log: Log = silent,
    profile: Path | None = None,
    start: Start | None = None,
) -> EvaluateResult:
    """Score `stream` (all tokens but the first) with the artifact at `path`; every rank calls this.

    counts: folder of the stream's n-gram index (`ngram_index.build`). trace: file for one JSON line a chunk, by rank 0,
    with the files of `breakdown` beside it at the end.
    profile: folder for profile.json.gz and profile.txt, rank 0's profile of the third chunk scored here.
    start: a `resume.Restart` goes on where an earlier one was stopped.
    Raises ArtifactError for an artifact that cannot be read, RecipeError when the index is of another text or
    memory, OSError when the trace could not be written.
    """
    start = start or Start()
    found = artifact.read(path)
    state = start.take_up(found, stream, config, trace, device)
    index = ngram_index.load(counts)
    if not same(index.tokens_N, stream):
        raise RecipeError(f"{counts} counts another text than the one to score; remove it and run again")
    if not np.array_equal(index.memory_M, memory.tokens(load_tokenizer(found), found.memory)):
        raise RecipeError(f"{counts} counts another memory than the artifact's; remove it and run again")
    work = Evaluation.begin(found, stream, config, device, index=index, start=start)
    if state is not None:
        work.load_state_dict(state)
    profiled = tracing(profile if collectives.rank() == 0 else None, "profile", device, skipped=1, recorded=1)
    with closing(start), profiled as traced:
        for number, chunk in enumerate(work.chunks[work.finished :], work.finished):
            line = work.run_chunk(number, chunk)
            traced()
            start.after_chunk(work, line)
            log(
                {
                    "fraction": (chunk.stop - 1) / (len(stream) - 1),
                    "tokens": work.tokens,
                    "elapsed_seconds": start.elapsed(),
                    "bpb": bpb.bits_per_byte(work.nats["final"], max(1, work.bytes)),
                    **work.so_far(),
                }
            )
        if trace is not None and collectives.rank() == 0:
            work.tally.write(trace.parent)
        return work.result()


class Evaluation:
    """Holds the running state of one evaluation."""

    def __init__(
        self,
        model: Model,
        tokens_N: Text,
        tables: bpb.ByteTables,
        index: ngram_index.NgramIndex,
        config: EvaluateConfig,
        schedule_tokens: int = 0,
        start: Start | None = None,
        observer: Observer | None = None,
    ) -> None:
        """schedule_tokens: length of the whole text when tokens_N is only its beginning. observer: hears what is
        done."""
        self.model, self.tokens_N, self.bytes_N, self.config = model, tokens_N, Sizes(tokens_N, tables), config
        self.start, self.observer = start or Start(), observer or Observer()
        self.chunks = chunks(len(tokens_N), config.chunk_tokens)
        device = tokens_N.device
        scheduled = len(chunks(schedule_tokens or len(tokens_N), config.chunk_tokens))
        self.adapter = Adapter(model, config.ttt, scheduled, config.dtype) if config.ttt.trains_weights else None
        self.experts = start_experts(config, model, device)
        given = self.experts.names if self.experts else ()
        names = ("frozen", "adapted") if self.adapter or given else ("frozen",)
        self.best = names[-1]
        """The row set of the final score; where weights stay as they are its neural rows are the frozen ones."""
        # On a GPU pieces of whole spans: what they take is known, and they are replayed.
        span = 0 if device.type == "cpu" else min(SPAN_TOKENS["cuda"], config.segment_tokens)
        sets: dict[str, Any] = {"names": names, "given": given, "plain": names[:1]}
        self.mixer = BatchMixer(config.mixer, model.vocab_size, index, device, span_tokens=span, **sets)
        self.published = published.start(model.vocab_size, device, ranks=config.published_ranks)
        self.weights_N = self.bytes_N if config.ttt.byte_weighted else Ones(tokens_N)
        self.nats: dict[str, float] = dict.fromkeys(
            ("quantized", "mixed", "ttt", "final", "hedge", "logistic", "published"), 0.0
        )
        self.seconds = {"scoring": 0.0, "mixing": 0.0, "ttt": 0.0}
        self.phases = Phases(self.seconds, device)
        self.mass, self.tokens, self.bytes = 0.0, 0, 0
        self.tally = Tally(("quantized", "mixed", "ttt", "final"), model.vocab_size, tables.is_control)
        self.charges: list[tuple[slice, Tensor]] = []
        """What the tally will be told at the end of the chunk."""
        self.owed: list[tuple[str, Tensor]] = []
        """Sums of the chunk's pieces, not read from the device yet, under names of `nats` or as the mass."""
        self.finished = 0  # chunks
        self.weights: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def begin(
        cls,
        found: artifact.Artifact,
        tokens: np.ndarray | TokenStream,
        config: EvaluateConfig,
        device: torch.device,
        *,
        index: ngram_index.NgramIndex | None = None,
        schedule_tokens: int = 0,
        start: Start | None = None,
        observer: Observer | None = None,
    ) -> Self:
        """Begin the evaluation of `tokens`, integers (N,), by an artifact, before its first chunk.

        index: of the tokens behind the artifact's memory, made here when it is not given. Raises ArtifactError for an
        artifact whose parts do not fit together.
        """
        model, processor = load_model(found).to(device), load_tokenizer(found)
        if index is None:
            mixer, before_M = config.mixer, memory.tokens(processor, found.memory)
            index = ngram_index.build(tokens, mixer.orders, model.vocab_size, mixer.match_lengths, memory_M=before_M)
        tables = bpb.byte_tables(processor)
        return cls(model, Text(tokens, device), tables, index, config, schedule_tokens, start, observer)

    def run_chunk(self, number: int, chunk: Piece) -> dict[str, Any]:
        """Score the chunk, then learn from it; returns its line of the trace."""
        before, seconds = dict(self.nats), dict(self.seconds)
        published.open_chunk(self.published, chunk.stop - chunk.start)
        source = self.rows(chunk)
        while (item := self.timed("scoring", partial(next, source, None))) is not None:
            if self.experts:
                self.timed("ttt", partial(self.adapt, *item))
            self.timed("mixing", partial(self.score, *item))
        self.count(chunk)
        self.settle()
        chunk_bytes = int(self.bytes_N.read(slice(chunk.start, chunk.stop)).sum())
        for span, nats_SB in self.charges:
            self.tally.add(self.tokens_N.read(span), self.bytes_N.read(span), nats_SB.cpu().numpy())
        self.charges = []
        self.tokens += chunk.stop - chunk.start
        self.bytes += chunk_bytes
        if self.adapter and number + 1 < len(self.chunks):
            self.observer.on_learn(self, chunk)
            self.timed("ttt", partial(self.adapter.learn, self.tokens_N, self.weights_N, chunk))
            self.observer.on_learned(self, chunk)
        self.phases.settle()
        self.finished = number + 1
        return {
            "chunk": number,
            "tokens": chunk.stop - chunk.start,
            "bytes": chunk_bytes,
            "bits": {name: (value - before[name]) / math.log(2) for name, value in self.nats.items()},
            "weights": {name: value.tolist() for name, value in self.weights[self.best].items()},
            "seconds": {name: value - seconds[name] for name, value in self.seconds.items()},
        }

    def rows(self, chunk: Piece) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
        """Yield the chunk's pieces in order, each with the log rows (B, V) of every row set and, for the experts over
        them, the features (B, D) that the last one's rows were made from."""
        self.observer.on_open(self, chunk)
        models = {"frozen": self.model}
        if self.adapter and self.adapter.chunks_learned:
            models["adapted"] = self.adapter.scorer
        features_of = [*models][-1] if self.experts else ""
        for piece, rows in chunk_rows(models, self.tokens_N, chunk, self.config, features_of):
            rows.setdefault(self.best, rows["frozen"])  # no weights were trained
            yield piece, rows
        self.observer.on_close(self, chunk)

    def adapt(self, piece: Piece, rows: dict[str, Tensor]) -> None:
        """Put what the experts say of the piece in place of the features; they learn from it."""
        assert self.experts
        targets = self.tokens_N[piece.start : piece.stop]
        rows.update(self.experts.rows(rows[self.best], rows.pop(FEATURES), targets))

    def score(self, piece: Piece, rows: dict[str, Tensor]) -> None:
        """Add the piece's bits, once, under every model and mixture; mixing weights and counts learn from it."""
        self.observer.on_rows(self, piece, rows)
        scores = self.mixer.score(rows, piece.start, piece.stop)
        self.weights = scores.weights
        frozen, best = scores.nll["frozen"], scores.nll[self.best]
        targets = self.tokens_N[piece.start : piece.stop]
        rule, mass = published.score(self.published, rows[self.best], self.history(piece), targets)
        charges = {
            "quantized": frozen["neural"],
            "mixed": frozen[self.mixer.kind],
            "ttt": best.get(HEAD, best["neural"]),
            "final": best[self.mixer.kind],
            "hedge": best["hedge"],
            "logistic": best["logistic"],
            "published": rule,
        }
        for name, nats in charges.items():
            self.add(name, nats)
        span = slice(piece.start, piece.stop)
        self.charges.append((span, torch.stack([charges[name] for name in self.tally.names])))
        self.owed.append(("mass", mass.sum()))
        self.observer.on_charge(self, piece, charges)

    def count(self, chunk: Piece) -> None:
        """Count a chunk that was scored, for the published rule."""
        published.count(self.published, self.history(chunk), self.tokens_N[chunk.start : chunk.stop])

    def add(self, name: str, nats_B: Tensor) -> None:
        """Charge the piece's targets under one of the names of `nats`."""
        self.owed.append((name, nats_B.sum()))

    def settle(self) -> None:
        """Add up what the chunk's pieces owe, in their order: one read of the device."""
        names, sums = zip(*self.owed, strict=True)
        for name, value in zip(names, torch.stack([each.double() for each in sums]).tolist(), strict=True):
            if name == "mass":
                self.mass += value
            else:
                self.nats[name] += value
        self.owed = []

    def history(self, piece: Piece) -> Tensor:
        """Give the two tokens before each target, oldest first, (B, 2); token 0 stands in before the text's start."""
        before = self.tokens_N[max(piece.start - 2, 0) : piece.stop - 1]
        missing = [before[:1]] * max(2 - piece.start, 0)
        return torch.cat([*missing, before]).unfold(0, 2, 1)

    def timed(self, phase: str, work: Callable[[], Any]) -> Any:
        """Run work and add its seconds to a phase's."""
        value = self.phases.timed(phase, work)
        self.start.beat()
        return value

    def so_far(self) -> dict[str, float]:
        """Name the bits per byte of every stage and seconds of every phase, named as in the result."""
        found = {f"bpb_{name}": bpb.bits_per_byte(nats, max(1, self.bytes)) for name, nats in self.nats.items()}
        if not self.config.ttt.enabled:
            del found["bpb_ttt"]
        return found | {f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()}

    def state_dict(self) -> dict[str, Any]:
        """Collect what the finished chunks left behind, in tensors that work goes on with; the artifact and the text
        hold the rest."""
        return {
            "finished": self.finished,
            "adapter": self.adapter.state_dict() if self.adapter else {},
            "experts": self.experts.state_dict() if self.experts else {},
            "mixer": self.mixer.state_dict(),
            "published": self.published.state_dict(),
            "tally": self.tally.state_dict(),
            "nats": self.nats,
            "seconds": self.seconds,
            "sums": {"mass": self.mass, "tokens": self.tokens, "bytes": self.bytes},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, in place of scoring these chunks; the state's tensors are then the evaluation's."""
        self.finished = state["finished"]
        if self.adapter:
            self.adapter.load_state_dict(state["adapter"])
        if self.experts:
            self.experts.load_state_dict(state["experts"])
        self.mixer.load_state_dict(state["mixer"])
        self.weights = self.mixer.weights()
        self.published.load_state_dict(state["published"])
        self.tally.load_state_dict(state["tally"])
        for chunk in self.chunks[: self.finished]:
            self.count(chunk)
        self.nats = dict(state["nats"])
        self.seconds.update(state["seconds"])
        self.mass, self.tokens, self.bytes = (state["sums"][name] for name in ("mass", "tokens", "bytes"))

    def result(self) -> EvaluateResult:
        """Sum up the finished evaluation."""
        rate = {name: bpb.bits_per_byte(nats, self.bytes) for name, nats in self.nats.items()}
        return EvaluateResult(
            bpb_quantized=rate["quantized"],
            bpb_mixed=rate["mixed"],
            bpb_ttt=rate["ttt"] if self.config.ttt.enabled else None,
            bpb_final=rate["final"],
            bpb_hedge=rate["hedge"],
            bpb_logistic=rate["logistic"],
            bpb_published=rate["published"],
            published_mass=self.mass / self.tokens,
            nats_per_token=self.nats["final"] / self.tokens,
            scored_tokens=self.tokens,
            scored_bytes=self.bytes,
            evaluate_seconds=self.start.elapsed(),
            scoring_seconds=self.seconds["scoring"],
            mixing_seconds=self.seconds["mixing"],
            ttt_seconds=self.seconds["ttt"],
            expert_names=list(self.mixer.experts),
            expert_weights=self.weights[self.best]["hedge"].tolist(),
            ensemble_names=["neural", *(f"logistic-{gate}" for gate in self.config.mixer.gates)],
            ensemble_weights=self.weights[self.best]["ensemble"].tolist(),
        )


def target_nats(log_rows: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood of the targets (B,) under log rows (B, V), in nats."""
    return float(-log_rows.gather(1, targets[:, None]).double().sum())
