"""GPTQ as published (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), one matrix at a time, in given steps.

Columns in natural order; the rounding error of a column goes to the later ones through the upper Cholesky factor of the
inverse Hessian, at once within a block and lazily beyond it. Float32, as the authors' program is.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def quantize(
    weight_RC: Tensor, hessian_CC: Tensor, step_R: Tensor, step_C: Tensor, damping: float, block_columns: int = 128
) -> Tensor:
    """Codes int32 (R, C) for steps `step_R * step_C`; damping: share of the Hessian's mean diagonal."""
    weight_RC, hessian_CC = weight_RC.float().clone(), hessian_CC.clone()
    columns = weight_RC.shape[1]
    hessian_CC.diagonal().add_(damping * hessian_CC.diagonal().mean())
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(hessian_CC))
    upper_CC = torch.linalg.cholesky(inverse_CC, upper=True)
    codes_RC = torch.empty_like(weight_RC)
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        block_RK = weight_RC[:, start:stop].clone()
        error_RK = torch.empty_like(block_RK)
        factor_KK = upper_CC[start:stop, start:stop]
        for k in range(stop - start):
            step = step_R * step_C[start + k]
            codes_RC[:, start + k] = torch.round(block_RK[:, k] / step)
            error_RK[:, k] = (block_RK[:, k] - codes_RC[:, start + k] * step) / factor_KK[k, k]
            block_RK[:, k + 1 :] -= torch.outer(error_RK[:, k], factor_KK[k, k + 1 :])
        weight_RC[:, stop:] -= error_RK @ upper_CC[start:stop, stop:]
    return codes_RC.to(torch.int32)
