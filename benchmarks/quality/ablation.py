"""What each part of the score is worth: a finished record's validation text, scored with parts left out.

    python benchmarks/quality/ablation.py runs/RECORD.parquet [--device cpu] [--out ablation.md]

Every finished seed's artifact scores the text once, with the record's own settings; each variant of the mixture takes
those same rows, so that lines are compared within a seed. Prints and writes a markdown table: means over seeds, the
paired differences to the default with Student's interval, and how many seeds differ in the mean's direction. Below it
stands how far the default is from what the record reports. A seed whose text was scored as a whole, and to the
record's own score, keeps what was found beside its evaluation: `hedgemix report` shows it. Seconds are of CPU time,
all threads together; on a GPU of the clock. Mixing seconds are a line's own, with the memory's counting and the cache
and head that it mixes; a line that another one's run gives has none. Forward seconds have the training between
passes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.audit.claim import Claim, claims
from hedgemix.config import EvaluateConfig, MixerConfig, RecipeError
from hedgemix.data import bpb, memory, tokenizer
from hedgemix.data import dataset as datasets
from hedgemix.data.device_text import Ones, Sizes, Text
from hedgemix.evaluate.scoring_order import FEATURES, Piece, chunk_rows, chunks
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import feature_experts, ngram_index
from hedgemix.experts.feature_experts import CACHE, HEAD, FeatureExperts
from hedgemix.experts.ngram_index import NgramIndex
from hedgemix.experts.registry import EXPERTS
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.runtime.files import write_json
from hedgemix.runtime.layout import ABLATION
from pipeline.analysis.significance import summary

DEFAULT = "everything (the default)"
SAME = 1e-6
"""Bits per byte, sums in another order."""
TOP_ORDERS = (2, 4, 6)
"""Highest orders to stop at."""
NAMES = {CACHE: "neural cache", HEAD: "fast head"}
Counted = tuple[tuple[int, ...], tuple[int, ...], bool]


@dataclass(frozen=True)
class Options:
    table: tyro.conf.Positional[Path]
    """A record's parquet file."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seeds: tuple[int, ...] = ()
    """Only these (default: every finished one)."""
    tokens: int = 0
    """Score only the text's first so many tokens (0: all)."""
    out: Path | None = None
    """Also write the table here."""


@dataclass(frozen=True)
class Run:
    """What one mixer scores, and lines may share."""

    mixer: MixerConfig
    rows: str
    """frozen or adapted: whose rows are mixed."""
    given: tuple[str, ...]
    """The experts over features among what is mixed."""
    remembers: bool
    """n-grams and match have read the artifact's memory."""

    @property
    def counted(self) -> Counted:
        """What tells its index from others: orders, match lengths, and whether the memory is in front."""
        return self.mixer.orders, self.mixer.match_lengths, self.remembers


@dataclass(frozen=True)
class Line:
    """One variant: a run, and which of its kinds (`batch_mixer.Scores`) is the score."""

    label: str
    run: Run
    kind: str


def lines(config: EvaluateConfig, remembers: bool) -> list[Line]:
    """All variants of an evaluation, the default among them; only what it turns on is left out."""
    mixer, given, trains = config.mixer, feature_experts.names(config), config.ttt.trains_weights
    whole = Run(mixer, "adapted" if trains else "frozen", given, remembers)

    def variant(label: str, **change: Any) -> Line:
        return Line(label, replace(whole, **change), mixer.kind)

    adapts = [NAMES[name] for name in given] + ["trained weights"] * trains
    unadapted = variant(f"without {' and '.join(adapts)}", rows="frozen", given=())
    found = [Line("neural", unadapted.run if trains else whole, "neural")]
    if trains:
        found.append(Line("neural, trained weights", whole, "neural"))
    if HEAD in given:
        found.append(Line("neural with fast head", whole, HEAD))
    found.append(Line(DEFAULT, whole, mixer.kind))
    for name in given if len(adapts) > 1 else ():
        found.append(variant(f"without {NAMES[name]}", given=tuple(other for other in given if other != name)))
    if adapts:
        found.append(unadapted)
    if remembers:
        found.append(variant("without memory", remembers=False))
    if mixer.match_lengths:
        found.append(variant("without match", mixer=replace(mixer, match_lengths=())))
    for top in (top for top in TOP_ORDERS if mixer.orders[0] <= top < mixer.orders[-1]):
        kept = tuple(n for n in mixer.orders if n <= top)
        found.append(variant(f"without n-grams above order {top}", mixer=replace(mixer, orders=kept)))
    if mixer.kind in ("logistic", "ensemble"):
        if mixer.linear_gates:
            found.append(variant("without linear mixers", mixer=replace(mixer, linear_gates=())))
        if mixer.bias_rate:
            found.append(variant("without bias", mixer=replace(mixer, bias_rate=0.0)))
    for name in EXPERTS:
        rest = tuple(other for other in mixer.experts if other != name)
        if name in mixer.experts:
            found.append(variant(f"without {name}", mixer=replace(mixer, experts=rest)))
        else:
            found.append(variant(f"with {name}", mixer=replace(mixer, experts=(*rest, name))))
    kinds = {"ensemble": "ensemble", "logistic": f"one logistic mixer, gate {mixer.gates[0]}"}
    if mixer.linear_gates:
        kinds["linear"] = f"one linear mixer, gate {mixer.linear_gates[0]}"
    kinds["hedge"] = "Hedge over the experts"
    return found + [Line(label, whole, kind) for kind, label in kinds.items() if kind != mixer.kind]


def build_indexes(
    todo: Sequence[Line], tokens: np.ndarray, vocab_size: int, memory_M: np.ndarray
) -> dict[Counted, NgramIndex]:
    """The indexes of the text that the lines read."""
    found = dict[Counted, NgramIndex]()
    for orders, lengths, remembers in dict.fromkeys(line.run.counted for line in todo):
        before_M = memory_M if remembers else None
        found[orders, lengths, remembers] = ngram_index.build(tokens, orders, vocab_size, lengths, memory_M=before_M)
    return found


@dataclass(frozen=True)
class Score:
    """Of one line and seed; mixing seconds are None where another line of the run shows them."""

    bpb: float
    forward: float
    mixing: float | None


class Scorer:
    """Scores a text with one artifact under every line, all from the same rows."""

    def __init__(
        self,
        found: artifact.Artifact,
        tokens: np.ndarray,
        config: EvaluateConfig,
        todo: Sequence[Line],
        indexes: dict[Counted, NgramIndex],
        device: torch.device,
        schedule_tokens: int = 0,
    ) -> None:
        """schedule_tokens: length of the whole text when `tokens` are only its beginning."""
        self.config, self.todo, self.tokens_N, self.watch = config, todo, Text(tokens, device), Watch(device)
        self.model = load_model(found).to(device)
        self.sizes_N = Sizes(self.tokens_N, bpb.byte_tables(tokenizer.load(found.tokenizer)))
        self.adapter = None
        if config.ttt.trains_weights:
            scheduled = len(chunks(schedule_tokens or len(tokens), config.chunk_tokens))
            self.adapter = Adapter(self.model, config.ttt, scheduled, config.dtype)
        width, vocab_size = self.model.config.width, self.model.vocab_size
        self.experts = {
            name: FeatureExperts(alone(config, name), vocab_size, width, device)
            for name in feature_experts.names(config)
        }
        self.mixers = dict[Run, BatchMixer]()
        for run in dict.fromkeys(line.run for line in todo):
            start = partial(BatchMixer, run.mixer, vocab_size, indexes[run.counted], device, given=run.given)
            self.mixers[run] = self.watch(run, start)
        self.nats = dict.fromkeys(todo, 0.0)

    def score(self) -> dict[str, Score]:
        """Score the whole text; the results by the lines' labels."""
        weights_N = self.sizes_N if self.config.ttt.byte_weighted else Ones(self.tokens_N)
        parts = chunks(len(self.tokens_N), self.config.chunk_tokens)
        for number, chunk in enumerate(parts):
            self._score_chunk(chunk)
            if self.adapter and number + 1 < len(parts):
                self.watch("adapted", partial(self.adapter.learn, self.tokens_N, weights_N, chunk))
        n_bytes = int(self.sizes_N.read(slice(1, len(self.tokens_N))).sum())
        return {line.label: self._result(line, n_bytes) for line in self.todo}

    def _score_chunk(self, chunk: Piece) -> None:
        models = {"frozen": self.model} | ({"adapted": self.adapter.scorer} if self.adapter else {})
        best = [*models][-1]
        for name, model in models.items():
            features_of = name if name == best and self.experts else ""
            source = chunk_rows({name: model}, self.tokens_N, chunk, self.config, features_of)
            while (item := self.watch(name, partial(next, source, None))) is not None:
                piece, rows = item
                said = dict[str, Tensor]()
                if features_of:
                    here = rows[name], rows[FEATURES], self.tokens_N[piece.start : piece.stop]
                    for expert, work in self.experts.items():
                        said |= self.watch(expert, partial(work.rows, *here))
                self._mix(piece, name, rows[name], said)

    def _mix(self, piece: Piece, name: str, rows_BV: Tensor, said: dict[str, Tensor]) -> None:
        for run, mixer in self.mixers.items():
            if run.rows != name:
                continue
            rows = {"neural": rows_BV} | {expert: said[expert] for expert in run.given}
            scores = self.watch(run, partial(mixer.score, rows, piece.start, piece.stop))
            for line in self.todo:
                if line.run == run:
                    self.nats[line] += float(scores.nll["neural"][line.kind].sum())

    def _result(self, line: Line, n_bytes: int) -> Score:
        seconds, mixing = self.watch.seconds, None
        if line.kind == self.config.mixer.kind:
            mixing = seconds[line.run] + sum(seconds[expert] for expert in line.run.given)
        return Score(bpb.bits_per_byte(self.nats[line], n_bytes), seconds[line.run.rows], mixing)


def alone(config: EvaluateConfig, name: str) -> EvaluateConfig:
    """The configuration with one of its experts over features."""
    cache, ttt = replace(config.cache, enabled=name == CACHE), replace(config.ttt, enabled=name == HEAD)
    return replace(config, cache=cache, ttt=ttt)


class Watch:
    """Seconds by name: of CPU time, or on a GPU to the end of its work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[Any, float]()

    def __call__(self, name: Any, work: Callable[[], Any]) -> Any:
        clock = time.process_time if self.device.type == "cpu" else time.monotonic
        began = clock()
        value = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + clock() - began
        return value


def markdown(found: Sequence[dict[str, Score]]) -> str:
    """The table, over the seeds, of each line's score by its label."""
    out = [
        "| variant | bits per byte | to the default | 95 % interval | seeds that agree | mixing s | forward s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, first in found[0].items():
        each = [seed[label] for seed in found]
        by = [seed[label].bpb - seed[DEFAULT].bpb for seed in found]
        told = summary(by)
        interval = f"{told.low:+.4f} to {told.high:+.4f}" if told.low == told.low else ""
        agree = sum(math.copysign(1, one) == math.copysign(1, told.mean) for one in by)
        compared = [f"{told.mean:+.4f}", interval, f"{agree} of {len(by)}"] if label != DEFAULT else ["", "", ""]
        mixing = f"{np.mean([one.mixing for one in each]):.1f}" if first.mixing is not None else ""
        forward = f"{np.mean([one.forward for one in each]):.1f}"
        name, score = f"**{label}**" if label == DEFAULT else label, f"{np.mean([one.bpb for one in each]):.4f}"
        out.append(f"| {' | '.join([name, score, *compared, mixing, forward])} |")
    return "\n".join(out)


def measure(options: Options) -> Iterator[str]:
    """The report after each seed. Raises RecipeError for a record that mixes nothing, or is not whole."""
    todo_claims = claims(options.table, options.seeds)
    recipe, dataset = todo_claims[0].recipe, todo_claims[0].dataset
    config, device = recipe.evaluate, torch.device(options.device)
    if config.mixer.kind == "none":
        raise RecipeError("the record's evaluate.mixer.kind is none: there is no mixture to leave parts out of")
    stream, memory_M = datasets.valid_stream(dataset), datasets.memory_tokens(dataset)
    tokens = stream.read(0, min(len(stream), options.tokens or len(stream)))
    todo = lines(config, bool(len(memory_M)))
    print(f"{len(tokens):,} tokens; counting", file=sys.stderr, flush=True)
    indexes = build_indexes(todo, tokens, dataset.vocab_size, memory_M)
    found = []
    for claim in todo_claims:
        shipped = artifact.read(claim.artifact)
        if not np.array_equal(memory_M, memory.tokens(tokenizer.load(shipped.tokenizer), shipped.memory)):
            raise RecipeError(f"seed {claim.seed}: the artifact's memory is not the data set's")
        found.append(Scorer(shipped, tokens, config, todo, indexes, device, len(stream)).score())
        print(f"seed {claim.seed}: {time.process_time():.0f} CPU s so far", file=sys.stderr, flush=True)
        keep(claim, found[-1], len(tokens) == len(stream))
        seeds = ", ".join(str(done.seed) for done in todo_claims[: len(found)])
        heading = (
            f"{len(tokens) - 1:,} validation tokens ({dataset.valid_sha256[:12]}); recipe {recipe.recipe}, "
            f"{recipe.data.source}, memory of {len(memory_M):,} tokens, seeds {seeds}."
        )
        yield f"{heading}\n\n{markdown(found)}\n\n{check(todo_claims, found, len(tokens) == len(stream))}"


def keep(claim: Claim, found: dict[str, Score], whole: bool) -> None:
    """Write what was found beside the seed's evaluation, if it is about what the record reports."""
    scores = {label: score.bpb for label, score in found.items()}
    default = scores.pop(DEFAULT)
    if whole and abs(default - claim.score) < SAME:
        write_json(claim.evaluation / ABLATION, {"default": default, "variants": scores})


def check(of: Sequence[Claim], found: Sequence[dict[str, Score]], whole: bool) -> str:
    """Say how far the default is from what the record found."""
    if not whole:
        return "Scored in part, so not compared with the record's own bpb_final."
    largest = max(abs(seed[DEFAULT].bpb - claim.score) for claim, seed in zip(of, found, strict=False))
    return f"Largest difference of the default to a seed's own bpb_final: {largest:.1e} bits per byte."


def main(options: Options) -> None:
    report = ""
    try:
        for report in measure(options):
            if options.out:  # after every seed, so that a run that is cut leaves the finished ones
                options.out.write_text(report + "\n")
    except RecipeError as error:
        sys.exit(f"error: {error}")
    print(report)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
