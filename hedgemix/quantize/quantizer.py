"""A trained model to the tensors of its artifact.

By default every matrix and table gets steps by row and column from what its weights matter (`bit_allocation`), GPTQ in
those steps, and an entropy coder; what is left (gates, scales) is float16. Method `reference` is the published export,
for comparison: `published_export`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hedgemix.artifact.tensors import Stepped, steps
from hedgemix.config import QuantizeConfig
from hedgemix.model.transformer import Model
from hedgemix.quantize import bit_allocation, gptq
from hedgemix.quantize.bit_allocation import Sensitivity
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.fit_to_size import fit_to_size
from hedgemix.quantize.published_export import reference_tensors

SMALLEST_SIDE = 16
"""2-D tensors with a shorter side stay float16."""
LARGEST_CODE = 2**22
"""Beyond this float32 arithmetic does not round to integers any more."""

Tensors = dict[str, Any]
"""By parameter name: `Stepped`, `Stored`, or a float16 or float32 tensor."""


@torch.no_grad()
def quantize_model(
    model: Model, moments: Moments, config: QuantizeConfig, target_bytes: int, size_of: Callable[[Tensors], int]
) -> tuple[Tensors, dict[str, Any]]:
    """Quantize every parameter of `model`: tensors for `artifact.pack`, and a report.

    size_of: bytes of the whole artifact with these tensors. The steps are those of `config.loss_nats`, or so much wider
    that it takes at most `target_bytes`; raises RecipeError when no step does. Method reference knows no target.
    Raises ValueError, naming the tensor, where weights or moments are not finite or do not go with these settings.
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
    model: Model, moments: Moments, config: QuantizeConfig, target_bytes: int, size_of: Callable[[Tensors], int]
) -> tuple[Tensors, float, dict[str, Any]]:
    """Quantize as `quantize_model` does by default: the tensors, the largest damping a Hessian took, and a report."""
    weights = {name: parameter.float() for name, parameter in model.named_parameters() if is_quantized(parameter)}
    halves = {name: parameter.half() for name, parameter in model.named_parameters() if name not in weights}
    matter, damping = sensitivities(model, moments, list(weights), config.damping)
    count = sum(weight.numel() for weight in weights.values())

    def tensors_at(theta: float) -> tuple[Tensors, int]:
        tensors = {**halves, **round_to_integers(weights, matter, theta, config.block_columns)}
        return tensors, size_of(tensors)

    theta, tensors, tries = fit_to_size(
        bit_allocation.theta_for(config.loss_nats, count), tensors_at, target_bytes, count
    )
    report = {"theta": theta, "expected_loss_nats": bit_allocation.loss_of(theta, count), "tries": tries}
    return tensors, damping, report


def is_quantized(parameter: Tensor) -> bool:
    """Tell matrices and tables, which get steps, from what stays float16."""
    return parameter.dim() == 2 and min(parameter.shape) >= SMALLEST_SIDE


def sensitivities(
    model: Model, moments: Moments, names: list[str], damping: float
) -> tuple[dict[str, Sensitivity], float]:
    """Find what each of these tensors' weights matter, and the largest damping it took; tensors with one input share
    its factor. Raises ValueError, naming the tensor, for moments that are not finite or cannot be factored."""
    owner = {name: shared for shared, names in model.inputs().items() for name in names}
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    matter = {}
    for name in names:
        key = owner.get(name, name)
        if key not in factors:
            check_finite(name, moments.columns[key])
            factors[key] = gptq.factor(moments.columns[key].clone(), damping, name)
        back, pivots, _ = factors[key]
        check_finite(name, moments.rows[name])
        share = bit_allocation.TABLE_SMOOTHING if name.endswith(".table.weight") else bit_allocation.SMOOTHING
        matter[name] = Sensitivity(bit_allocation.smooth(moments.rows[name], share), pivots, back)
    return matter, max(used for _, _, used in factors.values())


def check_finite(name: str, moment: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless its calibration is finite."""
    if not gptq.finite(moment):
        raise ValueError(f"{name}: its calibration is not finite; check that training converged")


def round_to_integers(
    weights: dict[str, Tensor], matter: dict[str, Sensitivity], theta: float, block_columns: int
) -> dict[str, Stepped]:
    """Round float32 weights (R, C) by GPTQ in the steps that theta gives, tensors of one shape at once.

    Raises ValueError, naming the tensor, for weights that are not finite or too large for their steps.
    """
    shapes: dict[torch.Size, list[str]] = {}
    for name, weight in weights.items():
        if not gptq.finite(weight):
            raise ValueError(f"{name}: its weights are not all finite")
        shapes.setdefault(weight.shape, []).append(name)
    tensors: dict[str, Stepped] = {}
    for names in shapes.values():
        index = [bit_allocation.indices(matter[name], theta) for name in names]
        rows, columns = (torch.stack(part) for part in zip(*index, strict=True))
        codes = gptq.round_to_steps(
            torch.stack([weights[name] for name in names]),
            torch.stack([matter[name].back_CC for name in names]),
            steps(rows),
            steps(columns),
            block_columns,
        )
        if largest(codes) > LARGEST_CODE:
            name = next(name for name, each in zip(names, codes, strict=True) if largest(each) > LARGEST_CODE)
            raise ValueError(f"{name}: over {LARGEST_CODE:,} steps to a weight; raise quantize.loss_nats")
        tensors |= {name: Stepped(codes[b], rows[b], columns[b]) for b, name in enumerate(names)}
    return tensors


def largest(codes: Tensor) -> int:
    """Find the largest magnitude; the least int32 has none of its own type."""
    low, high = torch.stack(codes.aminmax()).tolist()
    return max(-low, high)
