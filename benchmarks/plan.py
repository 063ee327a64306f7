"""What recipe `record` should take on a node of 8 GPUs, stage by stage, from one device's rates.

Operations and bytes come from the recipe; rates are measured where this machine has the device, and assumed elsewhere.
The plan says which is which, and which assumption it rests on most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import operations
from benchmarks.machine import Limits
from benchmarks.subject import Row
from hedgemix import ngram
from hedgemix.config import MixerConfig, Recipe
from hedgemix.mixer import SPAN_TOKENS, Mixer
from hedgemix.model import Model, parameter_count

VALID_TOKENS = 62_021_846
"""FineWeb's validation shard with this tokenizer."""


@dataclass(frozen=True)
class Rates:
    """Of one GPU of the node, unless it says CPU. The defaults are assumptions for an H100 SXM."""

    peak: float = 989e12
    """bfloat16 operations a second, dense, as the vendor states"""
    train_share: float = 0.35
    """share of it that training reaches; 512 columns are few"""
    score_share: float = 0.35
    """share of it that scoring reaches"""
    double: float = 20e12
    """float64 operations a second of Cholesky factors"""
    bandwidth: float = 2.5e12
    """bytes a second from and to memory"""
    link: float = 200e9
    """bytes a second of an all-reduce or all-gather over the node"""
    launch_seconds: float = 5e-6
    """from one small array operation to the next"""
    coding: float = 3e6
    """CPU: weights a second through the entropy coder"""
    indexing: float = 1e6
    """CPU: tokens a second into the n-gram index"""
    measured: tuple[str, ...] = field(default=(), compare=False)

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
            found["score_share"] = min(1.0, row.operations / row.seconds / limits.bfloat16)
    if cuda:
        found["bandwidth"] = limits.bandwidth
    return replace(Rates(), **found, measured=tuple(found))


def plan(recipe: Recipe, rates: Rates, block_launches: float, valid_tokens: int = VALID_TOKENS) -> list[Stage]:
    """Predicted seconds of each stage; block_launches: array operations of one block of the mixer."""
    model, train, evaluate, V = recipe.model, recipe.train, recipe.evaluate, recipe.data.vocab_size
    world, scorers = recipe.compute.workers, recipe.compute.evaluate_workers
    shell = built(recipe)
    parameters = parameter_count(shell)
    shapes = operations.matrix_shapes(model)
    forward = rates.peak * rates.score_share
    step = operations.train_operations(model, train, V)
    muon = operations.muon_operations(shapes, train.newton_schulz_steps)
    exchange = 2 * 4 * parameters + 4 * sum(r * c for r, c in shapes)
    state = operations.step_bytes(parameters)
    step_seconds = (step + muon) / (world * rates.peak * rates.train_share)
    step_seconds += exchange / rates.link + state / rates.bandwidth
    steps = (train.budget_seconds - train.reserve_seconds) / step_seconds
    stages = [Stage("training step", step + muon, state, 0, step_seconds, f"{steps:,.0f} steps in the budget")]
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
    row_sets = 1 + evaluate.ttt.enabled
    score = row_sets * operations.streaming_operations(
        model, V, valid_tokens, evaluate.window_tokens, evaluate.segment_tokens, evaluate.overlap_tokens
    )
    rows = row_sets * valid_tokens * 4 * V
    seconds = score / (scorers * forward) + rows / rates.link
    stages.append(Stage("scoring", score, rows, 0, seconds, f"{row_sets} models; rows gathered on every rank"))
    if evaluate.ttt.enabled:
        adapt = 3 * evaluate.ttt.epochs * valid_tokens
        adapt *= operations.token_operations(model, evaluate.ttt.sequence_tokens / 2, V)
        stages.append(Stage("test-time training", adapt, 0, 0, adapt / (scorers * rates.peak * rates.train_share),
                            f"{evaluate.ttt.epochs} epochs; backward through all blocks counted"))  # fmt: skip
    mixer = evaluate.mixer
    products, n_bytes = operations.mixing_costs(V, mixer)
    launches = block_launches * valid_tokens / mixer.block_tokens
    n_bytes *= row_sets * valid_tokens
    products *= row_sets * valid_tokens
    seconds = launches * rates.launch_seconds + n_bytes / rates.bandwidth
    what = f"{block_launches:.0f} array operations a block of {mixer.block_tokens}; every rank mixes all"
    stages.append(Stage("mixing", products, n_bytes, launches, seconds, what))
    return stages


def built(recipe: Recipe) -> Model:
    """The recipe's model without its numbers."""
    with torch.device("meta"):
        return Model(recipe.model, recipe.data.vocab_size, recipe.train.sequence_tokens, draw=False)


def evaluation_seconds(stages: Sequence[Stage]) -> float:
    return sum(stage.seconds for stage in stages if stage.name in ("scoring", "test-time training", "mixing"))


def weakest(recipe: Recipe, rates: Rates, block_launches: float) -> tuple[str, float]:
    """The assumption that, twice as bad, adds most to the evaluation, and the seconds it adds."""
    base = evaluation_seconds(plan(recipe, rates, block_launches))

    def added(name: str) -> float:
        worse = getattr(rates, name) * (2 if name == "launch_seconds" else 0.5)
        return evaluation_seconds(plan(recipe, replace(rates, **{name: worse}), block_launches)) - base

    return max(((name, added(name)) for name in rates.assumed()), key=lambda pair: pair[1])


class Counter(TorchDispatchMode):
    """Counts the array operations inside it that do work: views are free."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_block_launches(config: MixerConfig, vocab_size: int) -> float:
    """Array operations of one of the mixer's blocks, its share of a span's included, at two row sets; counted on a CPU
    on random tokens, where they are those of a GPU."""
    size = SPAN_TOKENS["cuda"]
    tokens = np.random.default_rng(0).integers(0, vocab_size, size).astype(np.uint16)
    index = ngram.build_index(tokens, config.orders, vocab_size, config.match_lengths)
    mixer = Mixer(config, vocab_size, index, names=("frozen", "adapted"), span_tokens=size)
    rows = {name: torch.randn(size - 1, vocab_size) for name in mixer.names}
    return counted(lambda: mixer.score(rows, 1, size)) / (size / config.block_tokens)


def counted(work: Callable[[], Any]) -> int:
    with Counter() as counter:
        work()
    return counter.count
