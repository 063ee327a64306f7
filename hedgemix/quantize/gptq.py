"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): a matrix to integers, each column's rounding error paid back later.

The published algorithm takes the upper Cholesky factor of the inverse Hessian. This one factors the Hessian itself,
H = U U^T with U upper triangular (QuIP, Chee et al. 2023, arXiv:2307.13304, calls it LDLQ and proves the two equal):
column k is rounded at w_k + sum_{i<k} (w_i - q_i) U_ik / U_kk. Same codes from one factorisation instead of three, and
no inverse to lose digits in.

In this order: `add_inputs` sums the Hessian, `factor` makes U of it, `round_to_steps` rounds a matrix whose rows and
columns have steps, `round_columns` is the algorithm's loop. Everything in it is in units of the steps and transposed,
so it touches contiguous rows and no scale.

Suffixes: B equal matrices in one call, R outputs (rows of the weight), C inputs (its columns), K columns of a block, N
observed inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hedgemix.validate import LARGEST_DAMPING

ROUNDER = 1.5 * 2.0**23  # float32 numbers next to this are integers
PIVOT_FLOOR = 1e-7  # of the mean diagonal: below this a pivot is the float32 noise of the accumulated sum


@torch.no_grad()
def add_inputs(hessian_sum_CC: Tensor, x_NC: Tensor) -> int:
    """Add x^T x to the float32 sum in place and return the rows added; sums and counts add up over ranks.

    x may have any leading dimensions and any float dtype.
    """
    rows_NC = x_NC.reshape(-1, x_NC.shape[-1]).float()
    with torch.autocast(x_NC.device.type, enabled=False):  # calibration hooks run under the forward pass's autocast
        hessian_sum_CC.addmm_(rows_NC.mT, rows_NC)
    return rows_NC.shape[0]


def factor(hessian_CC: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor, float]:
    """Damp H (C, C) in place and factor it, H = U U^T.

    Returns U^T with its diagonal scaled to one (C, C), the squared diagonal (C,), both float32, and the damping it
    took, a share of the mean diagonal. Raises ValueError, naming `name`, when none is enough.
    """
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
    """Round weights (B, R, C) whose steps are `row * column` to codes int32 (B, R, C), without a clip.

    back: what `factor` returns, one for each weight. Columns go in their natural order: with a step for each column the
    order makes no difference worth a permutation.
    """
    batch, rows, columns = weight_BRC.shape
    in_steps_BCR = row_steps_BR.new_empty(batch, columns, rows)
    torch.div(weight_BRC.float().mT, row_steps_BR[:, None], out=in_steps_BCR).div_(column_steps_BC[..., None])
    # Of errors counted in steps.
    scaled_BCC = (back_BCC * column_steps_BC[:, None]).div_(column_steps_BC[..., None])
    return round_columns(in_steps_BCR, scaled_BCC, block_columns, None).mT.to(torch.int32)


def round_columns(rest_BCR: Tensor, back_BCC: Tensor, block: int, levels: int | None) -> Tensor:
    """Round weights (B, C, R), given in steps, to codes (B, C, R), float32 integers.

    The weights are overwritten: columns that were rounded hold their errors. back: what `factor` returns; row k weighs
    the errors of earlier columns. levels: the largest code (None: there is none).
    """
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


def finite(tensor: Tensor) -> bool:
    """Tell whether all of a tensor is finite; one pass over the memory, where `isfinite().all()` makes five."""
    low, high = torch.stack(tensor.aminmax()).tolist()  # NaN where anything is
    return math.isfinite(high - low)
