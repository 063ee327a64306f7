"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): matrices to a few bits, each column's rounding error paid back later.

The published algorithm takes the upper Cholesky factor of the inverse Hessian. This one factors the Hessian itself,
H = U U^T with U upper triangular (QuIP, Chee et al. 2023, arXiv:2307.13304, calls it LDLQ and proves the two equal):
column k is rounded at w_k + sum_{i<k} (w_i - q_i) U_ik / U_kk. Same codes from one factorisation instead of three, and
no inverse to lose digits in. Columns go in descending order of the Hessian's diagonal, so that the errors of loud
inputs still have later columns to go to.

Everything is in units of the row's step and transposed, so the column loop touches contiguous rows and no scale.

Suffixes: B equal matrices in one call, R outputs (rows of the weight), C inputs (its columns), N observed inputs,
Q clip quantiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hedgemix.config import RecipeError
from hedgemix.stored import Stored, dequantize
from hedgemix.validate import LARGEST_DAMPING, LARGEST_STEP, check_rounding

__all__ = ["Quantized", "add_inputs", "dequantize", "prune", "quantize", "round_rows"]

TINY_STEP = 2.0**-24  # the smallest positive float16
ROUNDER = 1.5 * 2.0**23  # float32 numbers next to this are integers
PIVOT_FLOOR = 1e-7  # of the mean diagonal: below this a pivot is the float32 noise of the accumulated sum


@dataclass(frozen=True)
class Quantized(Stored):
    """codes int8 (..., R, C), scale float16 (..., R); dequantized they are codes * scale."""

    damping: Tensor
    """float64 (...): share of the mean diagonal that was added, one for each matrix (0: nothing was factored)."""

    def unbind(self) -> list[Quantized]:
        """The matrices of a batched result, one by one."""
        return [Quantized(*parts) for parts in zip(self.codes, self.scale, self.damping, strict=True)]


@torch.no_grad()
def add_inputs(hessian_sum_CC: Tensor, x_NC: Tensor) -> int:
    """Adds x^T x to the float32 sum in place and returns the rows added; sums and counts add up over ranks.

    x may have any leading dimensions and any float dtype.
    """
    rows_NC = x_NC.reshape(-1, x_NC.shape[-1]).float()
    with torch.autocast(x_NC.device.type, enabled=False):  # calibration hooks run under the forward pass's autocast
        hessian_sum_CC.addmm_(rows_NC.mT, rows_NC)
    return rows_NC.shape[0]


@torch.no_grad()
def quantize(
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
    """Quantizes one weight (R, C) with its Hessian (C, C), or B of them, (B, R, C) with (B, C, C), in one call.

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
    codes_BCR = _round_columns(in_steps_BCR, back_BCC, block_columns, levels)
    codes_BRC = torch.empty_like(ordered_BRC, dtype=torch.int8)
    for b, order_C in enumerate(orders):
        codes_BRC[b, :, order_C] = codes_BCR[b].mT.to(torch.int8)
    result = Quantized(codes_BRC, scale_BR, torch.tensor(dampings, dtype=torch.float64))
    return result if batched else result.unbind()[0]


@torch.no_grad()
def round_rows(
    weight_RC: Tensor, bits: int, clip_quantiles: tuple[float, ...] = (1.0,), name: str = "table"
) -> Quantized:
    """Rounds a table (R, C) to nearest, each row by the clip quantile of |w| with the least squared error.

    Raises as `quantize` does.
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
    """A copy with the `fraction` of its elements (rounded down) that are smallest in magnitude set to zero."""
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


def finite(tensor: Tensor) -> bool:
    """Whether all of it is; one pass over the memory, where `isfinite().all()` makes five."""
    low, high = torch.stack(tensor.aminmax()).tolist()  # NaN where anything is
    return math.isfinite(high - low)


def factor(hessian_CC: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor, float]:
    """Damps H in place; of H = U U^T returns U^T with its diagonal scaled to one, the squared diagonal (C,) and the
    damping it took. Raises ValueError when none is enough."""
    diagonal_C = hessian_CC.diagonal().clone()
    live_C = diagonal_C > 0
    live = int(live_C.sum())
    mean = float(diagonal_C[live_C].double().mean()) if live else 1.0
    if live < len(live_C):
        hessian_CC *= live_C[:, None] & live_C  # off the diagonal of a dead input only noise is left
    used = damping
    while used <= LARGEST_DAMPING:
        hessian_CC.diagonal().copy_(torch.where(live_C, diagonal_C + used * mean, mean))
        lower_CC, failed = torch.linalg.cholesky_ex(hessian_CC.flip(0, 1).double())  # condition up to C / damping
        pivots_C = lower_CC.diagonal().clone()
        if not failed and pivots_C.square().min() >= PIVOT_FLOOR * mean:
            return lower_CC.div_(pivots_C).float().flip(0, 1).mT, pivots_C.square().float().flip(0), used
        used = max(10 * used, 1e-6)
    raise ValueError(f"{name}: no damping up to {LARGEST_DAMPING:g} makes its Hessian positive definite")


@torch.no_grad()
def round_to_steps(
    weight_BRC: Tensor, back_BCC: Tensor, row_steps_BR: Tensor, column_steps_BC: Tensor, block_columns: int
) -> Tensor:
    """Codes int32 (B, R, C) of weights whose steps are `row * column`, without a clip, in natural column order.

    back: what `factor` returns, one for each weight. With a step for each column the order makes no difference worth
    a permutation.
    """
    batch, rows, columns = weight_BRC.shape
    in_steps_BCR = row_steps_BR.new_empty(batch, columns, rows)
    torch.div(weight_BRC.float().mT, row_steps_BR[:, None], out=in_steps_BCR).div_(column_steps_BC[..., None])
    # Of errors counted in steps.
    scaled_BCC = (back_BCC * column_steps_BC[:, None]).div_(column_steps_BC[..., None])
    return _round_columns(in_steps_BCR, scaled_BCC, block_columns, None).mT.to(torch.int32)


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


def _round_columns(rest_BCR: Tensor, back_BCC: Tensor, block: int, levels: int | None) -> Tensor:
    """Codes (B, C, R), float32 integers, of weights given in steps, which it overwrites: rounded columns hold their
    errors, the others still their weights. back: what `factor` returns, row k weighs earlier errors. levels None: no
    largest code."""
    codes_BCR = torch.empty_like(rest_BCR)
    columns = rest_BCR.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        target_BKR = torch.baddbmm(rest_BCR[:, start:stop], back_BCC[:, start:stop, :start], rest_BCR[:, :start])
        for k in range(start, stop):
            target_B1R = target_BKR[:, k - start : k - start + 1]
            if k > start:
                target_B1R.baddbmm_(back_BCC[:, k : k + 1, start:k], rest_BCR[:, start:k])
            if levels is not None:
                target_B1R.clamp_(-levels, levels)
            # Rounds half to even, as round_ does, but round_ starts all threads for these few numbers: on a busy
            # machine their barrier made the loop 10 times slower.
            target_B1R.add_(ROUNDER).sub_(ROUNDER)
            rest_BCR[:, k : k + 1] -= target_B1R
        codes_BCR[:, start:stop] = target_BKR
    return codes_BCR
