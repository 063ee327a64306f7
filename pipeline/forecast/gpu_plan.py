"""What a recipe should take on GPUs, stage by stage, from one device's rates.

Operations, bytes, launches and waits come from the recipe and the code. Rates are assumptions until a device gives
them: the benchmark suite puts what it measures in their place. Every figure for a GPU, in `--plan`, in the suite and in
documents, is computed here, from these rates and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import torch

from hedgemix.config import EvaluateConfig, ModelConfig, Recipe
from hedgemix.experts import feature_experts
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.recipes import LONG_BLOCKS
from pipeline.forecast import operations

DEVICE = "H100 SXM"
"""What the rates assume."""
VALID_TOKENS = 62_021_846
"""FineWeb's validation shard with the official tokenizer of 1,024 pieces."""
TOKENS_OF_SHARDS = {1024: VALID_TOKENS, 8192: 47_853_344}
"""Validation tokens of the shards that `hedgemix download` fetches for the recipes, by vocabulary."""
PIECE_WAITS, CHUNK_WAITS = 1, 6
"""Times that the host waits for a GPU beside the mixer, which never waits. For each piece: what the tally is told. For
each chunk: all sums, the four kinds of weights that the trace shows, and the clock of its phases."""
EVALUATION = ("scoring", "experts over features", "test-time training", "mixing", "published rule and sums")
"""Stages inside the evaluation's clock."""


@dataclass(frozen=True)
class Rates:
    """Holds the rates of one GPU of the node, unless it says CPU. The defaults are assumptions for an H100 SXM."""

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
        """Name the rates that nothing measured."""
        return [each.name for each in fields(self) if each.name not in (*self.measured, "measured")]


@dataclass(frozen=True)
class Stage:
    """Holds what a stage does, and the seconds that should take."""

    name: str
    operations: float
    """On all devices together."""
    n_bytes: float
    launches: float
    """Small array operations one after the other, on one device."""
    seconds: float
    what: str


@dataclass(frozen=True)
class Launches:
    """Holds the array operations of one piece of `segment_tokens`, one after the other on one device."""

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


COUNTED_OF, COUNTED = EvaluateConfig(mixer=LONG_BLOCKS), Launches(234, 2882, 180, 240, 4240)
"""The settings of the recipes for GPUs, and the launches that `benchmarks/suite/launches.py` counts of them in seconds,
whatever the vocabulary; tests/benchmarks/test_suite.py counts them again."""


def launches_of(config: EvaluateConfig) -> Launches | None:
    """Look up the launches of an evaluation; None where its settings are others than those that were counted."""

    def read(config: EvaluateConfig) -> tuple[object, ...]:
        return config.segment_tokens, config.mixer, config.cache, config.ttt.enabled, config.ttt.kind, config.ttt.head

    return COUNTED if read(config) == read(COUNTED_OF) else None


def plan(recipe: Recipe, rates: Rates, counted: Launches, valid_tokens: int = VALID_TOKENS) -> list[Stage]:
    """Predict the seconds of each stage."""
    return [*training(recipe, rates), *export(recipe, rates), *evaluation(recipe, rates, counted, valid_tokens)]


def training(recipe: Recipe, rates: Rates) -> list[Stage]:
    """Predict a training step, without its loop of layers and with it, and the calibration behind the last."""
    model, train, V, world = recipe.model, recipe.train, recipe.data.vocab_size, recipe.compute.workers
    stages, steps, before = [], 0.0, train.loop_from_fraction if model.looped_layers else 0.0
    for name, looped, share in (("training step, no loop yet", False, before), ("training step", True, 1 - before)):
        step, state, seconds = step_costs(recipe, rates, looped)
        steps += share * (train.budget_seconds - train.reserve_seconds) / seconds
        if share:
            part = "" if looped else f"{share:.0%} of "
            stages.append(Stage(name, step, state, 0, seconds, f"{steps:,.0f} steps in {part}the budget"))
    tokens = train.calibration_sequences * train.sequence_tokens
    calibrate = 3 * tokens * operations.token_operations(model, train.sequence_tokens / 2, V)
    calibrate += 2 * tokens * sum(size**2 for size in input_widths(built(recipe)))
    seconds = calibrate / (world * rates.peak * rates.eager_share)
    return [*stages, Stage("calibration", calibrate, 0, 0, seconds, "inside the reserve")]


def step_costs(recipe: Recipe, rates: Rates, looped: bool) -> tuple[float, float, float]:
    """Compute the operations, bytes and seconds of a training step."""
    model, train, world = recipe.model, recipe.train, recipe.compute.workers
    parameters, shapes = parameter_count(built(recipe)), operations.matrix_shapes(model)
    exchange = 2 * 4 * parameters + 4 * sum(r * c for r, c in shapes) if world > 1 else 0
    state = operations.step_bytes(parameters)
    step = operations.train_operations(model, train, recipe.data.vocab_size, looped)
    step += operations.muon_operations(shapes, train.newton_schulz_steps)
    seconds = step / (world * rates.peak * rates.train_share) + exchange / rates.link + state / rates.bandwidth
    return step, state, seconds


def export(recipe: Recipe, rates: Rates) -> list[Stage]:
    """Predict a try of the export, and the index of the validation text's n-grams."""
    shell = built(recipe)
    shapes, inputs, parameters = operations.matrix_shapes(recipe.model), input_widths(shell), parameter_count(shell)
    gptq = operations.gptq_operations(shapes, inputs)
    columns = 3 * sum({shape: shape[1] for shape in shapes}.values())
    seconds = sum(size**3 / 3 for size in inputs) / rates.double + columns * rates.launch_seconds
    seconds += (gptq - sum(size**3 / 3 for size in inputs)) / (rates.peak / 16)
    return [
        Stage("quantization, one theta", gptq, 0, columns, seconds, "float32 products at 1/16 of the peak"),
        Stage("coding, once", 0, 4 * parameters, 0, parameters / rates.coding, "on one CPU core, each try"),
    ]


def evaluation(recipe: Recipe, rates: Rates, counted: Launches, valid_tokens: int) -> list[Stage]:
    """Predict the index of the text's n-grams, and the stages inside the evaluation's clock."""
    model, evaluate, V = recipe.model, recipe.evaluate, recipe.data.vocab_size
    forward, scorers = rates.peak * rates.eager_share, recipe.compute.evaluate_workers
    seconds = valid_tokens / rates.indexing
    stages = [Stage("n-gram index", 0, 0, 0, seconds, f"{valid_tokens:,} tokens, CPU, before evaluation's clock")]
    given = feature_experts.names(evaluate)
    models = 1 + evaluate.ttt.trains_weights
    score = models * scoring_operations(recipe, valid_tokens)
    rows = valid_tokens * 4 * (models * V + (model.width if given else 0))
    seconds = score / (scorers * forward) + (rows / rates.link if scorers > 1 else 0)
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
    return [*stages, *mixing(recipe, rates, counted, valid_tokens)]


def scoring_operations(recipe: Recipe, valid_tokens: int) -> float:
    """Count the operations of one model's pass over the text, in the recipe's order."""
    model, evaluate, V = recipe.model, recipe.evaluate, recipe.data.vocab_size
    if evaluate.order == "sliding":
        return operations.sliding_operations(model, V, valid_tokens, evaluate.window_tokens, evaluate.stride_tokens)
    lengths = evaluate.window_tokens, evaluate.segment_tokens, evaluate.overlap_tokens
    return operations.streaming_operations(model, V, valid_tokens, *lengths)


def mixing(recipe: Recipe, rates: Rates, counted: Launches, valid_tokens: int) -> list[Stage]:
    """Predict the mixture, and the published rule beside it; every rank does all of both."""
    evaluate, V = recipe.evaluate, recipe.data.vocab_size
    mixer, row_sets = evaluate.mixer, len(row_set_names(evaluate))
    products, n_bytes = operations.mixing_costs(V, mixer)
    pieces = valid_tokens / evaluate.segment_tokens
    n_bytes *= row_sets * valid_tokens
    products *= row_sets * valid_tokens
    # As if the host asked for nothing while a graph is replayed, and operations took their time beside their bytes.
    seconds = counted.asked * rates.launch_seconds + counted.replayed * rates.replay_seconds
    seconds = pieces * seconds + n_bytes / rates.bandwidth
    what = f"{counted.asked:.0f} array operations asked for and {counted.replayed:.0f} replayed a piece of "
    what += f"{evaluate.segment_tokens:,}, in blocks of {mixer.block_tokens}; every rank mixes all"
    mixed = Stage("mixing", products, n_bytes, counted.asked * pieces, seconds, what)
    n_bytes = valid_tokens * operations.rule_bytes(V)
    waits = PIECE_WAITS * pieces + CHUNK_WAITS * valid_tokens / evaluate.chunk_tokens
    seconds = counted.rule * pieces * rates.launch_seconds + waits * rates.wait_seconds + n_bytes / rates.bandwidth
    what = f"{counted.rule:.0f} array operations a piece of {evaluate.segment_tokens:,}, {waits:,.0f} waits; "
    return [
        mixed,
        Stage("published rule and sums", 0, n_bytes, counted.rule * pieces, seconds, what + "on every rank"),
    ]


def row_set_names(config: EvaluateConfig) -> tuple[str, ...]:
    """Name the row sets that an evaluation mixes."""
    return ("frozen", "adapted") if config.ttt.trains_weights or feature_experts.names(config) else ("frozen",)


def built(recipe: Recipe) -> Model:
    """Build the recipe's model without its numbers."""
    return _built(recipe.model, recipe.data.vocab_size, recipe.train.sequence_tokens)


@lru_cache(maxsize=4)
def _built(model: ModelConfig, vocab_size: int, context_tokens: int) -> Model:
    with torch.device("meta"):
        return Model(model, vocab_size, context_tokens, draw=False)


def input_widths(model: Model) -> list[int]:
    """List the widths of what matrices read, those with one input once."""
    return [model.get_parameter(name).shape[1] for name in model.inputs()]


def evaluation_seconds(stages: Sequence[Stage]) -> float:
    """Add up what is inside the evaluation's clock."""
    return sum(stage.seconds for stage in stages if stage.name in EVALUATION)


def weakest(recipe: Recipe, rates: Rates, counted: Launches) -> tuple[str, float]:
    """Find the assumption that, twice as bad, adds most to the evaluation, and the seconds it adds."""
    base = evaluation_seconds(plan(recipe, rates, counted))

    def added(name: str) -> float:
        worse = getattr(rates, name) * (2 if name.endswith("_seconds") else 0.5)
        return evaluation_seconds(plan(recipe, replace(rates, **{name: worse}), counted)) - base

    return max(((name, added(name)) for name in rates.assumed()), key=lambda pair: pair[1])
