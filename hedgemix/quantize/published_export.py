"""The published export, kept for comparison (`quantize.method reference`): matrices of 2^bits - 1 levels a row by GPTQ,
each row's scale by a search over clip quantiles; large tables rounded to nearest; the rest as it is.

Columns go in descending order of the Hessian's diagonal, so that the errors of loud inputs still have later columns to
go to.

Suffixes as in `gptq`: B equal matrices in one call, R outputs, C inputs; Q clip quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hedgemix.artifact.tensors import Stored
from hedgemix.config import QuantizeConfig, RecipeError
from hedgemix.model.transformer import Model
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.gptq import factor, finite, round_columns
from hedgemix.validate import LARGEST_STEP, check_rounding

TINY_STEP = 2.0**-24  # the smallest positive float16
TABLE_ELEMENTS = 65_536
"""2-D tensors of at least this many elements are quantized."""


@dataclass(frozen=True)
class Quantized(Stored):
    """Holds codes int8 (..., R, C) and scales float16 (..., R); dequantized they are codes * scale."""

    damping: Tensor
    """float64 (...): share of the mean diagonal that was added, one for each matrix (0: nothing was factored)."""

    def unbind(self) -> list[Quantized]:
        """Give the matrices of a batched result one by one."""
        return [Quantized(*parts) for parts in zip(self.codes, self.scale, self.damping, strict=True)]


def reference_tensors(model: Model, moments: Moments, config: QuantizeConfig) -> tuple[dict[str, Any], float]:
    """Export every parameter, by its name, and tell the largest damping that a Hessian took.

    Raises ValueError as `quantize_matrices` does.
    """
    owner = {name: shared for shared, names in model.inputs().items() for name in names}
    shapes: dict[torch.Size, list[str]] = {}
    prepared = {
        name: prune(parameter.float(), config.prune_fraction)
        if parameter.dim() == 2 and parameter.numel() > TABLE_ELEMENTS
        else parameter.float()
        for name, parameter in model.named_parameters()
    }
    for name in model.matrices():
        shapes.setdefault(prepared[name].shape, []).append(name)
    tensors: dict[str, Any] = {}
    damping = 0.0
    for names in shapes.values():
        batch = quantize_matrices(
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
            tensors[name] = round_rows(weight, config.table_bits, config.clip_quantiles)
        else:
            tensors[name] = weight.half() if weight.dim() == 2 and min(weight.shape) >= 16 else weight
    return tensors, damping


@torch.no_grad()
def quantize_matrices(
    weight_RC: Tensor,
    hessian_sum_CC: Tensor,
    count: int,
    *,
    bits: int,
    damping: float,
    block_columns: int,
    clip_quantiles: tuple[float, ...],
    scale_floor: float,
    name: str = "weight",
) -> Quantized:
    """Quantize one weight (R, C) with its Hessian (C, C), or B of them, (B, R, C) with (B, C, C), in one call.

    Codes are symmetric, within +-(2^(bits-1) - 1). Each row keeps the clip quantile of |w| whose round-to-nearest
    error e has the least e H e^T; its step is rounded to float16 before anything is rounded by it. Weights of inputs
    that were never active become zero. Where H + damping * mean(diag H) cannot be factored the damping grows tenfold,
    and the result says so. Weights that share their inputs (q, k, v) can be stacked along R.

    count: inputs summed in the Hessian. Raises RecipeError for settings that cannot work, ValueError, naming `name`,
    for weights or Hessians that are not finite, not usable or of other shapes.
    """
    levels = _levels(bits)
    check_rounding(damping, block_columns, clip_quantiles, scale_floor)
    batched = weight_RC.ndim == 3
    weight_BRC = (weight_RC if batched else weight_RC[None]).float()
    sum_BCC = hessian_sum_CC if batched else hessian_sum_CC[None]
    _check_tensors(weight_BRC, sum_BCC, count, name)

    columns = weight_BRC.shape[-1]
    ordered_BRC = torch.empty_like(weight_BRC)
    hessian_BCC, back_BCC = (weight_BRC.new_empty(len(weight_BRC), columns, columns) for _ in range(2))
    orders, dampings = [], []
    for b, sum_CC in enumerate(sum_BCC):
        diagonal_C = sum_CC.diagonal()
        live_C = diagonal_C > 0
        order_C = torch.argsort(diagonal_C, descending=True, stable=True)
        hessian_BCC[b] = sum_CC[order_C[:, None], order_C] / count
        back_BCC[b], _, used = factor(hessian_BCC[b], damping, f"{name}[{b}]" if batched else name)
        ordered_BRC[b] = (weight_BRC[b] * live_C)[:, order_C]
        orders.append(order_C)
        dampings.append(used)

    scale_BR = _search(ordered_BRC, clip_quantiles, levels, scale_floor, name, hessian_BCC)
    in_steps_BCR = (ordered_BRC / scale_BR.float()[..., None]).mT.contiguous()
    codes_BCR = round_columns(in_steps_BCR, back_BCC, block_columns, levels)
    codes_BRC = torch.empty_like(ordered_BRC, dtype=torch.int8)
    for b, order_C in enumerate(orders):
        codes_BRC[b, :, order_C] = codes_BCR[b].mT.to(torch.int8)
    result = Quantized(codes_BRC, scale_BR, torch.tensor(dampings, dtype=torch.float64))
    return result if batched else result.unbind()[0]


@torch.no_grad()
def round_rows(
    weight_RC: Tensor, bits: int, clip_quantiles: tuple[float, ...] = (1.0,), name: str = "table"
) -> Quantized:
    """Round a table (R, C) to nearest, each row by the clip quantile of |w| with the least squared error.

    Raises as `quantize_matrices` does.
    """
    levels = _levels(bits)
    check_rounding(0.0, 1, clip_quantiles, 0.0)
    weight_RC = weight_RC.float()
    if not finite(weight_RC):
        raise ValueError(f"{name}: its weights are not all finite")
    scale_R = _search(weight_RC, clip_quantiles, levels, 0.0, name)
    codes_RC = (weight_RC / scale_R.float()[..., None]).round_().clamp_(-levels, levels).to(torch.int8)
    return Quantized(codes_RC, scale_R, torch.zeros(weight_RC.shape[:-2], dtype=torch.float64))


def prune(weight: Tensor, fraction: float) -> Tensor:
    """Copy a tensor with the `fraction` of its elements (rounded down) that are smallest in magnitude set to zero.

    Raises RecipeError for what is no share.
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"prune_fraction is {fraction}; it is a share, at least 0 and below 1")
    smallest = weight.detach().abs().flatten().argsort(stable=True)[: int(fraction * weight.numel())]
    return weight.detach().flatten().index_fill(0, smallest, 0.0).view(weight.shape)


def _levels(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise RecipeError(f"bits is {bits}; codes are stored as int8, so choose 2 to 8")
    return 2 ** (bits - 1) - 1


def _check_tensors(weight_BRC: Tensor, sum_BCC: Tensor, count: int, name: str) -> None:
    batch, _, columns = weight_BRC.shape
    if sum_BCC.shape != (batch, columns, columns):
        raise ValueError(f"{name}: weights {tuple(weight_BRC.shape)} do not fit Hessians {tuple(sum_BCC.shape)}")
    if count < 1:
        raise ValueError(f"{name}: its Hessian has seen no inputs; calibrate before quantizing")
    for what, tensor in (("weights", weight_BRC), ("Hessian sums", sum_BCC)):
        if not finite(tensor):
            bad = next(b for b, each in enumerate(tensor) if not finite(each))
            where = f" (matrix {bad} of {batch})" if batch > 1 else ""
            raise ValueError(f"{name}: its {what} are not all finite{where}")


def _search(
    weight_BRC: Tensor,
    clip_quantiles: tuple[float, ...],
    levels: int,
    floor: float,
    name: str,
    hessian_BCC: Tensor | None = None,
) -> Tensor:
    """Steps float16 (..., R) with the least rounding error, squared or (e H e^T) weighted by the Hessian."""
    clip_QBR = _quantiles(weight_BRC.abs(), clip_quantiles)
    if clip_QBR.max() / levels > LARGEST_STEP:
        raise ValueError(f"{name}: its largest weight needs a step beyond float16; check that training converged")
    scale_QBR = (clip_QBR / levels).clamp_min(max(floor, TINY_STEP)).half()
    best_BR, least_BR = scale_QBR[0], torch.full_like(clip_QBR[0], torch.inf)
    for scale_BR in scale_QBR:
        step_BR1 = scale_BR.float()[..., None]
        error_BRC = (weight_BRC / step_BR1).round_().clamp_(-levels, levels).mul_(step_BR1).sub_(weight_BRC)
        weighted_BRC = error_BRC if hessian_BCC is None else error_BRC @ hessian_BCC
        loss_BR = torch.linalg.vecdot(error_BRC, weighted_BRC)
        best_BR = torch.where(loss_BR < least_BR, scale_BR, best_BR)
        least_BR = torch.minimum(loss_BR, least_BR)
    return best_BR


def _quantiles(magnitude_BRC: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """(Q, ..., R), interpolated linearly; torch.quantile sorts everything and refuses more than 16 M elements."""
    last = magnitude_BRC.shape[-1] - 1
    ranks = [(1 - quantile) * last for quantile in quantiles]  # counted from the largest
    top_BRC = magnitude_BRC.topk(min(int(max(ranks)) + 2, last + 1)).values
    low_QBR = torch.stack([top_BRC[..., int(rank)] for rank in ranks])
    high_QBR = torch.stack([top_BRC[..., min(int(rank) + 1, last)] for rank in ranks])
    part_Q = torch.tensor([rank % 1 for rank in ranks], device=low_QBR.device)
    return torch.lerp(low_QBR, high_QBR, part_Q.view(-1, *[1] * (low_QBR.ndim - 1)))
