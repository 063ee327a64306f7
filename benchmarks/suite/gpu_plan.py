"""What recipe `record` should take on a node of 8 GPUs, stage by stage, from one device's rates.

Operations, bytes, launches and waits come from the recipe and the code; rates are measured where this machine has the
device, and assumed elsewhere. The plan says which is which, and which assumption it rests on most. Every document's
figure for a GPU is computed here, from these rates and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.suite import operations
from benchmarks.suite.machine import Limits
from benchmarks.suite.setup import Row
from hedgemix.config import EvaluateConfig, ModelConfig, Recipe
from hedgemix.data.bpb import ByteTables
from hedgemix.data.device_text import Text
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.experts import feature_experts, neural_cache, ngram_index
from hedgemix.mixers import published
from hedgemix.mixers.batch_mixer import SPAN_TOKENS, BatchMixer, Scores
from hedgemix.model.transformer import Model, parameter_count

VALID_TOKENS = 62_021_846
"""FineWeb's validation shard with this tokenizer."""
PIECE_WAITS, CHUNK_WAITS = 1, 6
"""Times that the host waits for a GPU beside the mixer, which never waits. For each piece: what the tally is told. For
each chunk: all sums, the four kinds of weights that the trace shows, and the clock of its phases."""
EVALUATION = ("scoring", "experts over features", "test-time training", "mixing", "published rule and sums")
"""Stages inside the evaluation's clock."""
FREE = torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default
"""Array operations that start nothing on a device, beside those that torch calls views."""


@dataclass(frozen=True)
class Rates:
    """Of one GPU of the node, unless it says CPU. The defaults are assumptions for an H100 SXM."""

    peak: float = 989e12
    """bfloat16 operations a second, dense, as the vendor states"""
    train_share: float = 0.27
    """share of it that compiled training reaches: what the reference did, at 97 ms for 98,304 tokens a GPU"""
    eager_share: float = 0.15
    """share of it that scoring and test-time training reach: not compiled, they wait for memory, not for products"""
    double: float = 20e12
    """float64 operations a second of Cholesky factors"""
    bandwidth: float = 2.5e12
    """bytes a second from and to memory"""
    link: float = 200e9
    """bytes a second of an all-reduce or all-gather over the node"""
    launch_seconds: float = 8e-6
    """from one small array operation to the next: 6.3 us of torch's own work on a CPU core, and a launch"""
    replay_seconds: float = 2.2e-6
    """from one operation of a CUDA graph to the next, all of them small"""
    wait_seconds: float = 1.1e-5
    """each time the host waits for what it queued: a copy from pageable memory, or a number that is read"""
    coding: float = 3e6
    """CPU: weights a second through the entropy coder"""
    indexing: float = 1e6
    """CPU: tokens a second into the n-gram index"""
    measured: tuple[str, ...] = field(default=(), compare=False)
    """Names of the rates above that a device or this machine gave."""

    def assumed(self) -> list[str]:
        return [each.name for each in fields(self) if each.name not in (*self.measured, "measured")]


@dataclass(frozen=True)
class Stage:
    name: str
    operations: float
    """On all devices together."""
    n_bytes: float
    launches: float
    """Small array operations one after the other, on one device."""
    seconds: float
    what: str


def rates_from(rows: Iterable[Row], limits: Limits, cuda: bool, indexing: float) -> Rates:
    """The defaults, with what was measured in their place: all on a GPU, the CPU's own rates everywhere."""
    found: dict[str, Any] = {"indexing": indexing}
    for row in rows:
        if (row.stage, row.what) == ("coding", "encode"):
            found["coding"] = row.units_per_second
        if cuda and row.stage == "training":
            found |= {"peak": limits.bfloat16, "train_share": min(1.0, row.operations / row.seconds / limits.bfloat16)}
        if cuda and row.stage == "streaming":
            found["eager_share"] = min(1.0, row.operations / row.seconds / limits.bfloat16)
    if cuda:
        found["bandwidth"] = limits.bandwidth
    return replace(Rates(), **found, measured=tuple(found))


@dataclass(frozen=True)
class Launches:
    """Array operations of one piece of `segment_tokens`, one after the other on one device; see `count_launches`."""

    asked: float
    """By the host while it mixes; a replay of a graph is one."""
    replayed: float
    """In graphs, while it mixes."""
    rule: float
    """By the host, beside the mixer: the published rule and the sums."""
    adapting: float = 0.0
    """By the host, for the experts over features."""
    adapting_replayed: float = 0.0
    """In graphs, for them."""


def plan(recipe: Recipe, rates: Rates, counted: Launches, valid_tokens: int = VALID_TOKENS) -> list[Stage]:
    """Predicted seconds of each stage."""
    model, train, evaluate, V = recipe.model, recipe.train, recipe.evaluate, recipe.data.vocab_size
    world, scorers = recipe.compute.workers, recipe.compute.evaluate_workers
    shell = built(recipe)
    parameters = parameter_count(shell)
    shapes = operations.matrix_shapes(model)
    forward = rates.peak * rates.eager_share
    muon = operations.muon_operations(shapes, train.newton_schulz_steps)
    exchange = 2 * 4 * parameters + 4 * sum(r * c for r, c in shapes)
    state = operations.step_bytes(parameters)
    stages, steps, before = [], 0.0, train.loop_from_fraction if model.looped_layers else 0.0
    for name, looped, share in (("training step, no loop yet", False, before), ("training step", True, 1 - before)):
        step = operations.train_operations(model, train, V, looped) + muon
        seconds = step / (world * rates.peak * rates.train_share) + exchange / rates.link + state / rates.bandwidth
        steps += share * (train.budget_seconds - train.reserve_seconds) / seconds
        if share:
            part = "" if looped else f"{share:.0%} of "
            stages.append(Stage(name, step, state, 0, seconds, f"{steps:,.0f} steps in {part}the budget"))
    tokens = train.calibration_sequences * train.sequence_tokens
    inputs = [shell.get_parameter(name).shape[1] for name in shell.inputs()]
    calibrate = 3 * tokens * operations.token_operations(model, train.sequence_tokens / 2, V)
    calibrate += 2 * tokens * sum(size**2 for size in inputs)
    stages.append(Stage("calibration", calibrate, 0, 0, calibrate / (world * forward), "inside the reserve"))
    gptq = operations.gptq_operations(shapes, inputs)
    columns = 3 * sum({shape: shape[1] for shape in shapes}.values())
    seconds = sum(size**3 / 3 for size in inputs) / rates.double + columns * rates.launch_seconds
    seconds += (gptq - sum(size**3 / 3 for size in inputs)) / (rates.peak / 16)
    stages.append(Stage("quantization, one theta", gptq, 0, columns, seconds, "float32 products at 1/16 of the peak"))
    stages.append(Stage("coding, once", 0, 4 * parameters, 0, parameters / rates.coding, "on one CPU core, each try"))
    seconds = valid_tokens / rates.indexing
    stages.append(Stage("n-gram index", 0, 0, 0, seconds, f"{valid_tokens:,} tokens, CPU, before evaluation's clock"))
    given = feature_experts.names(evaluate)
    models, row_sets = 1 + evaluate.ttt.trains_weights, len(row_set_names(evaluate))
    score = models * operations.streaming_operations(
        model, V, valid_tokens, evaluate.window_tokens, evaluate.segment_tokens, evaluate.overlap_tokens
    )
    rows = valid_tokens * 4 * (models * V + (model.width if given else 0))
    seconds = score / (scorers * forward) + rows / rates.link
    stages.append(Stage("scoring", score, rows, 0, seconds, f"{models} models; rows gathered on every rank"))
    if given:
        adapt = valid_tokens * operations.feature_operations(model, evaluate, V)
        asked = counted.adapting * valid_tokens / evaluate.segment_tokens
        seconds = counted.adapting * rates.launch_seconds + counted.adapting_replayed * rates.replay_seconds
        seconds = seconds * valid_tokens / evaluate.segment_tokens + adapt / (rates.peak / 16)
        what = f"{counted.adapting:.0f} operations asked for and {counted.adapting_replayed:.0f} replayed a piece of "
        what += f"{evaluate.segment_tokens:,}; float32 products at 1/16 of the peak; on every rank"
        stages.append(Stage("experts over features", adapt, 0, asked, seconds, what))
    if evaluate.ttt.trains_weights:
        adapt = 3 * evaluate.ttt.epochs * valid_tokens
        adapt *= operations.token_operations(model, evaluate.ttt.sequence_tokens / 2, V)
        stages.append(Stage("test-time training", adapt, 0, 0, adapt / (scorers * forward),
                            f"{evaluate.ttt.epochs} epochs; backward through all blocks counted"))  # fmt: skip
    mixer = evaluate.mixer
    products, n_bytes = operations.mixing_costs(V, mixer)
    pieces = valid_tokens / evaluate.segment_tokens
    n_bytes *= row_sets * valid_tokens
    products *= row_sets * valid_tokens
    # As if the host asked for nothing while a graph is replayed, and operations took their time beside their bytes.
    seconds = counted.asked * rates.launch_seconds + counted.replayed * rates.replay_seconds
    seconds = pieces * seconds + n_bytes / rates.bandwidth
    what = f"{counted.asked:.0f} array operations asked for and {counted.replayed:.0f} replayed a piece of "
    what += f"{evaluate.segment_tokens:,}, in blocks of {mixer.block_tokens}; every rank mixes all"
    stages.append(Stage("mixing", products, n_bytes, counted.asked * pieces, seconds, what))
    n_bytes = valid_tokens * operations.rule_bytes(V)
    waits = PIECE_WAITS * pieces + CHUNK_WAITS * valid_tokens / evaluate.chunk_tokens
    seconds = counted.rule * pieces * rates.launch_seconds + waits * rates.wait_seconds + n_bytes / rates.bandwidth
    what = (
        f"{counted.rule:.0f} array operations a piece of {evaluate.segment_tokens:,}, {waits:,.0f} waits; on every rank"
    )
    stages.append(Stage("published rule and sums", 0, n_bytes, counted.rule * pieces, seconds, what))
    return stages


def built(recipe: Recipe) -> Model:
    """The recipe's model without its numbers."""
    with torch.device("meta"):
        return Model(recipe.model, recipe.data.vocab_size, recipe.train.sequence_tokens, draw=False)


def evaluation_seconds(stages: Sequence[Stage]) -> float:
    return sum(stage.seconds for stage in stages if stage.name in EVALUATION)


def weakest(recipe: Recipe, rates: Rates, counted: Launches) -> tuple[str, float]:
    """The assumption that, twice as bad, adds most to the evaluation, and the seconds it adds."""
    base = evaluation_seconds(plan(recipe, rates, counted))

    def added(name: str) -> float:
        worse = getattr(rates, name) * (2 if name.endswith("_seconds") else 0.5)
        return evaluation_seconds(plan(recipe, replace(rates, **{name: worse}), counted)) - base

    return max(((name, added(name)) for name in rates.assumed()), key=lambda pair: pair[1])


class Counter(TorchDispatchMode):
    """Counts the array operations inside it that do work: views are free, and so is memory that is not filled."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func in FREE)
        return func(*args, **(kwargs or {}))


class Graphs:
    """In the place of CUDA graphs where there are none: what would be replayed is run, and counted."""

    def __init__(self) -> None:
        self.replays = self.operations = 0

    def record(self, work: Callable[[], object], device: torch.device) -> Callable[[], object]:
        def replay() -> None:
            self.replays += 1
            self.operations += counted(work)

        return replay


def count_launches(config: EvaluateConfig, vocab_size: int) -> Launches:
    """Of one piece of an evaluation, counted on a CPU on random tokens, as a GPU would work: with a
    resident index, and what is in graphs apart."""
    size = config.segment_tokens
    tokens = np.random.default_rng(0).integers(0, vocab_size, 3 * size).astype(np.uint16)
    index = ngram_index.build(tokens, config.mixer.orders, vocab_size, config.mixer.match_lengths)
    said = {name: torch.rand(size, vocab_size).softmax(1) for name in feature_experts.names(config)}
    asked, replayed = count_mixing(
        config, index, said | {name: torch.randn(size, vocab_size) for name in row_set_names(config)}
    )
    rows = {name: torch.randn(size, vocab_size) for name in ("frozen", "adapted")}
    tables = ByteTables(
        np.ones(vocab_size, np.int16), *np.ones((2, vocab_size), bool), *np.zeros((2, vocab_size), bool)
    )
    shape = ModelConfig(
        layers=1, width=64, heads=1, kv_heads=1, mlp_hidden=64, bigram_buckets=0, value_embedding_layers=0
    )
    model = Model(shape, vocab_size, 64, draw=False)
    trained = replace(config.ttt, enabled=True, kind="weights")
    settings = replace(config, ttt=trained, cache=replace(config.cache, enabled=False))
    work = Evaluation(model, Text(tokens, torch.device("cpu")), tables, index, settings)
    work.published.counted = size**2  # long past its beginning, when it has nothing to do
    published.open_chunk(work.published, config.chunk_tokens)
    mixing = 0

    def score(*args: Any) -> Scores:
        nonlocal mixing
        with Counter() as counter:
            scores = mix(*args)
        mixing = counter.count
        return scores

    mix, work.mixer.score = work.mixer.score, score  # type: ignore[method-assign]
    first = {name: of[1:] for name, of in rows.items()}
    rule = counted(lambda: work.score(Piece(1, size), first)) - mixing
    return Launches(asked, replayed, rule, *count_adapting(config, vocab_size))


def row_set_names(config: EvaluateConfig) -> tuple[str, ...]:
    """The row sets that an evaluation mixes."""
    return ("frozen", "adapted") if config.ttt.trains_weights or feature_experts.names(config) else ("frozen",)


def count_adapting(config: EvaluateConfig, vocab_size: int) -> tuple[int, int]:
    """Of a piece that is no text's first, for the experts over features in a GPU's blocks: operations that the host
    asks for, and those in graphs."""
    size, width, graphs = config.segment_tokens, 16, Graphs()
    with patch.dict(neural_cache.BLOCK_TOKENS, cpu=neural_cache.BLOCK_TOKENS["cuda"]):
        experts = feature_experts.FeatureExperts(config, vocab_size, width)
    given = torch.randn(size, vocab_size), torch.randn(size, width), torch.zeros(size, dtype=torch.int64)
    if not experts.names:
        return 0, 0
    if experts.head:
        experts.head.record = graphs.record
    experts.rows(*(each[1:] for each in given))
    experts.rows(*given)
    if experts.head and experts.head.span:
        experts.head.span[2].unchecked = 0
    graphs.replays = graphs.operations = 0
    total = counted(lambda: experts.rows(*given))
    return total - graphs.operations + graphs.replays, graphs.operations


def count_mixing(config: EvaluateConfig, index: ngram_index.NgramIndex, rows: dict[str, Tensor]) -> tuple[int, int]:
    """Of a piece that is no text's first: operations that the host asks for, and those in graphs."""
    size, graphs = config.segment_tokens, Graphs()
    span = min(SPAN_TOKENS["cuda"], size)
    names, given = row_set_names(config), feature_experts.names(config)
    options: dict[str, Any] = {"names": names, "given": given, "plain": names[:1], "resident": True}
    mixer = BatchMixer(config.mixer, index.vocab_size, index, span_tokens=span, **options)
    for sets in mixer.sets:
        sets.record = graphs.record
    mixer.score({name: of[1:] for name, of in rows.items()}, 1, size)
    mixer.score(rows, size, 2 * size)
    for sets in mixer.sets:
        assert sets.spans is not None and sets.call is not None, "pieces are no whole spans: nothing is replayed"
        sets.spans.unchecked = sets.call[2].unchecked = 0
    graphs.replays = graphs.operations = 0
    total = counted(lambda: mixer.score(rows, 2 * size, 3 * size))
    return total - graphs.operations + graphs.replays, graphs.operations


def counted(work: Callable[[], Any]) -> int:
    with Counter() as counter:
        work()
    return counter.count
