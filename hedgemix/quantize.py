"""A trained model to the tensors of its artifact.

By default every matrix and table gets steps by row and column from what its weights matter (`allocate`), GPTQ in those
steps, and an entropy coder; what is left (gates, scales) is float16. Method `reference` is the published export, for
comparison: 31 levels a row with a floor under the step, int8 tables, and a general compressor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hedgemix import allocate, gptq
from hedgemix.allocate import Sensitivity
from hedgemix.calibrate import Moments
from hedgemix.config import QuantizeConfig, RecipeError
from hedgemix.model import Model
from hedgemix.stored import Stepped, steps

TABLE_ELEMENTS = 65_536
"""reference: 2-D tensors of at least this many elements are quantized."""
SMALLEST_SIDE = 16
"""2-D tensors with a shorter side stay float16."""
CLOSE_ENOUGH = 0.005
"""Share of the target that may stay unused."""
MOST_TRIES = 12
LARGEST_CODE = 2**22
"""Beyond this float32 arithmetic does not round to integers any more."""
LONGEST_MOVE = 4.0
"""Octaves of theta that one try may go beyond the last."""

Tensors = dict[str, Any]
SizeOf = Callable[[Tensors], int]


@torch.no_grad()
def quantize_model(
    model: Model, moments: Moments, config: QuantizeConfig, target_bytes: int, size_of: SizeOf
) -> tuple[Tensors, dict[str, Any]]:
    """Every parameter of `model`, ready for `artifact.pack`, and a report.

    size_of: bytes of the whole artifact with these tensors. The steps are those of `config.loss_nats`, or so much wider
    that it takes at most `target_bytes`; raises RecipeError when no step does. Method reference knows no target.
    """
    began = time.monotonic()
    if config.method == "reference":
        tensors, damping = reference_tensors(model, moments, config)
        report: dict[str, Any] = {}
    else:
        tensors, damping, report = stepped_tensors(model, moments, config, target_bytes, size_of)
    ordered = {name: tensors[name] for name, _ in model.named_parameters()}
    return ordered, {**report, "gptq_seconds": time.monotonic() - began, "largest_damping": damping}


def stepped_tensors(
    model: Model, moments: Moments, config: QuantizeConfig, target_bytes: int, size_of: SizeOf
) -> tuple[Tensors, float, dict[str, Any]]:
    weights = {name: parameter.float() for name, parameter in model.named_parameters() if quantized(parameter)}
    plain = {name: parameter.half() for name, parameter in model.named_parameters() if name not in weights}
    known, damping = sensitivities(model, moments, list(weights), config.damping)
    count = sum(weight.numel() for weight in weights.values())

    def at(theta: float) -> tuple[Tensors, int]:
        tensors = {**plain, **rounded(weights, known, theta, config.block_columns)}
        return tensors, size_of(tensors)

    theta, tensors, tries = fitting(allocate.theta_for(config.loss_nats, count), at, target_bytes, count)
    report = {"theta": theta, "expected_loss_nats": allocate.loss_of(theta, count), "tries": tries}
    return tensors, damping, report


def fitting(
    theta: float, at: Callable[[float], tuple[Tensors, int]], target_bytes: int, weights: int
) -> tuple[float, Tensors, int]:
    """The least theta, from this one on, whose tensors take at most `target_bytes`, its tensors and the tries it took.

    Unless the first fits, the file leaves at most CLOSE_ENOUGH of the target unused (as long as MOST_TRIES allow).
    Bytes fall and flatten out as log2(theta) grows, by up to a bit a weight for each unit: the first move goes along
    that line, the others along the secant of the last two points, kept between the points on both sides of the target.
    Raises RecipeError when nothing fits.
    """
    here, aim, slope = math.log2(theta), (1 - CLOSE_ENOUGH / 2) * target_bytes, -weights / 8
    before: tuple[float, int] | None = None
    below: tuple[float, Tensors] | None = None
    above = last = -math.inf
    for tries in range(1, MOST_TRIES + 1):
        tensors, size = at(2.0**here)
        if size <= target_bytes:
            if tries == 1 or size >= (1 - CLOSE_ENOUGH) * target_bytes:
                return 2.0**here, tensors, tries
            below = here, tensors
        else:
            above = here
        if before is not None:
            slope = (size - before[1]) / (here - before[0])
        before = here, size
        if below is None:
            if slope >= 0 and here >= last + LONGEST_MOVE:
                break  # nothing gained by the longest move
            last = here
            here += min((aim - size) / slope, LONGEST_MOVE) if slope < 0 else LONGEST_MOVE
        else:
            towards = here + (aim - size) / slope if slope < 0 else math.inf
            here = towards if above < towards < below[0] else (above + below[0]) / 2
    if below is None:
        raise RecipeError(
            f"{weights:,} weights and what goes with them do not fit {target_bytes:,} bytes at any step; raise "
            "quantize.target_bytes or limits.total_bytes, or train a smaller model"
        )
    return 2.0 ** below[0], below[1], MOST_TRIES


def quantized(parameter: Tensor) -> bool:
    return parameter.dim() == 2 and min(parameter.shape) >= SMALLEST_SIDE


def sensitivities(
    model: Model, moments: Moments, names: list[str], damping: float
) -> tuple[dict[str, Sensitivity], float]:
    """What each of these tensors' weights matter, and the largest damping it took; tensors with one input share its
    factor."""
    owner = {name: shared for shared, names in model.inputs().items() for name in names}
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    known = {}
    for name in names:
        key = owner.get(name, name)
        if key not in factors:
            check(name, moments.columns[key])
            factors[key] = gptq.factor(moments.columns[key].clone(), damping, name)
        back, pivots, _ = factors[key]
        check(name, moments.rows[name])
        share = allocate.TABLE_SMOOTHING if name.endswith(".table.weight") else allocate.SMOOTHING
        known[name] = Sensitivity(allocate.smooth(moments.rows[name], share), pivots, back)
    return known, max(used for _, _, used in factors.values())


def check(name: str, moment: Tensor) -> None:
    if not gptq.finite(moment):
        raise ValueError(f"{name}: its calibration is not finite; check that training converged")


def rounded(
    weights: dict[str, Tensor], known: dict[str, Sensitivity], theta: float, block_columns: int
) -> dict[str, Stepped]:
    """GPTQ in the steps that theta gives, tensors of one shape at once."""
    shapes: dict[torch.Size, list[str]] = {}
    for name, weight in weights.items():
        if not gptq.finite(weight):
            raise ValueError(f"{name}: its weights are not all finite")
        shapes.setdefault(weight.shape, []).append(name)
    out: dict[str, Stepped] = {}
    for names in shapes.values():
        index = [allocate.indices(known[name], theta) for name in names]
        rows, columns = (torch.stack(part) for part in zip(*index, strict=True))
        codes = gptq.round_to_steps(
            torch.stack([weights[name] for name in names]),
            torch.stack([known[name].back_CC for name in names]),
            steps(rows),
            steps(columns),
            block_columns,
        )
        if largest(codes) > LARGEST_CODE:
            name = next(name for name, each in zip(names, codes, strict=True) if largest(each) > LARGEST_CODE)
            raise ValueError(f"{name}: over {LARGEST_CODE:,} steps to a weight; raise quantize.loss_nats")
        out |= {name: Stepped(codes[b], rows[b], columns[b]) for b, name in enumerate(names)}
    return out


def largest(codes: Tensor) -> int:
    """The largest magnitude; the least int32 has none of its own type."""
    low, high = torch.stack(codes.aminmax()).tolist()
    return max(-low, high)


def reference_tensors(model: Model, moments: Moments, config: QuantizeConfig) -> tuple[Tensors, float]:
    """The published export: matrices of 2^bits - 1 levels by GPTQ, tables rounded by row, the rest as it is."""
    owner = {name: shared for shared, names in model.inputs().items() for name in names}
    shapes: dict[torch.Size, list[str]] = {}
    prepared = {
        name: gptq.prune(parameter.float(), config.prune_fraction)
        if parameter.dim() == 2 and parameter.numel() > TABLE_ELEMENTS
        else parameter.float()
        for name, parameter in model.named_parameters()
    }
    for name in model.matrices():
        shapes.setdefault(prepared[name].shape, []).append(name)
    tensors: Tensors = {}
    damping = 0.0
    for names in shapes.values():
        batch = gptq.quantize(
            torch.stack([prepared[name] for name in names]),
            torch.stack([moments.columns[owner[name]] for name in names]),
            1,
            bits=config.matrix_bits,
            damping=config.damping,
            block_columns=config.block_columns,
            clip_quantiles=config.clip_quantiles,
            scale_floor=config.scale_floor,
            name=f"{names[0]} and {len(names) - 1} more",
        )
        for name, each in zip(names, batch.unbind(), strict=True):
            tensors[name] = each
            damping = max(damping, float(each.damping))
    for name, weight in prepared.items():
        if name in tensors:
            continue
        if weight.dim() == 2 and weight.numel() >= TABLE_ELEMENTS:
            tensors[name] = gptq.round_rows(weight, config.table_bits, config.clip_quantiles)
        else:
            tensors[name] = weight.half() if weight.dim() == 2 and min(weight.shape) >= 16 else weight
    return tensors, damping
