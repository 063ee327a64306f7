"""A trained model to the tensors of its artifact: GPTQ for attention and MLP matrices, rounded rows for the other
large tables, float16 for small matrices, float32 for gates and scales."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hedgemix import gptq
from hedgemix.config import QuantizeConfig, RecipeError
from hedgemix.gptq import Quantized
from hedgemix.model import Model

TABLE_ELEMENTS = 65_536
"""2-D tensors of at least this many elements are quantized."""


@torch.no_grad()
def quantize_model(
    model: Model, hessian_sums: dict[str, Tensor], count: int, config: QuantizeConfig
) -> tuple[dict[str, Quantized | Tensor], dict[str, Any]]:
    """Every parameter of `model`, ready for `artifact.write`, and a report (seconds, largest damping).

    `hessian_sums`: by the name of one matrix an input, float32 (C, C) sum of x x^T over `count` positions
    (`Model.inputs` says which matrices share it). Equal shapes are quantized as one batch.
    """
    began = time.monotonic()
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
    tensors: dict[str, Quantized | Tensor] = {}
    damping = 0.0
    for names in shapes.values():
        batch = gptq.quantize(
            torch.stack([prepared[name] for name in names]),
            torch.stack([hessian_sums[owner[name]] for name in names]),
            count,
            bits=config.matrix_bits,
            damping=config.damping,
            block_columns=config.block_columns,
            clip_quantiles=config.clip_quantiles,
            scale_floor=config.scale_floor,
            name=f"{names[0]} and {len(names) - 1} more",
        )
        for name, quantized in zip(names, batch.unbind(), strict=True):
            tensors[name] = quantized
            damping = max(damping, float(quantized.damping))
    for name, weight in prepared.items():
        if name in tensors:
            continue
        if weight.dim() == 2 and weight.numel() >= TABLE_ELEMENTS:
            tensors[name] = gptq.round_rows(weight, config.table_bits, config.clip_quantiles)
        else:
            tensors[name] = weight.half() if weight.dim() == 2 and min(weight.shape) >= 16 else weight
    ordered = {name: tensors[name] for name, _ in model.named_parameters()}
    return ordered, {"gptq_seconds": time.monotonic() - began, "largest_damping": damping}


def validate(config: QuantizeConfig) -> None:
    """Raise RecipeError, naming the field, for settings that cannot work."""
    for name in ("matrix_bits", "table_bits"):
        if not 2 <= getattr(config, name) <= 8:
            raise RecipeError(f"quantize.{name} is {getattr(config, name)}; it must be between 2 and 8")
    if not 0 <= config.prune_fraction < 1:
        raise RecipeError("quantize.prune_fraction must be at least 0 and below 1")
    if not 1 <= config.zstd_level <= 22:
        raise RecipeError("quantize.zstd_level must be between 1 and 22")
    try:
        gptq.check_settings(config.damping, config.block_columns, config.clip_quantiles, config.scale_floor)
    except RecipeError as error:
        raise RecipeError(f"quantize.{error}") from None
