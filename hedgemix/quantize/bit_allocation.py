"""Where the bits go: one step size for each row and each column of every quantized tensor.

Rounding in GPTQ's order adds about `1/24 sum_rc G_r D_c step_rc^2` nats a token (a uniform error has variance
step^2 / 12), with G_r as in `calibration` and D_c the squared diagonal of the factor U of H = U U^T: what GPTQ cannot
pass on to later columns. An ideal coder spends a constant less log2(step) bits on a weight. Equal slopes give

    step_rc = theta / sqrt(G_r D_c),   loss = weights * theta^2 / 24,

reverse water-filling with one theta for the whole file. Steps lie on a grid of an eighth of an octave, so that they
cost a few bits a row and a column. Codes are integers without a clip: the entropy coder has no largest value.

Shapes: R rows, C columns of one tensor; B tensors of one shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hedgemix.artifact.tensors import LARGEST_INDEX, OCTAVE

SMOOTHING = 0.01
"""Share of the mean added to each row's weight: a row never seen still gets finite steps."""
TABLE_SMOOTHING = 0.1
"""The same for tables that are read by row: what is read rarely is read where the gradient is large. On a laptop record
0.01 cost 20 % more loss at equal bytes, and 0.3 as much as 0.1."""


@dataclass(frozen=True)
class Sensitivity:
    """Holds what a tensor's weights (R, C) matter: an error E costs about 1/2 sum_r rows_r e_r H e_r^T nats a token,
    with H = back' diag(pivots) back."""

    rows_R: Tensor
    """G, float32, positive."""
    pivots_C: Tensor
    """D, float32, positive."""
    back_CC: Tensor
    """Row k: what of each earlier column's error column k is to undo, U_ik / U_kk."""


def smooth(rows_R: Tensor, share: float = SMOOTHING) -> Tensor:
    """Add a share of their mean to row weights (R,), so that none is zero."""
    return rows_R + share * rows_R.mean().clamp_min(1e-30)


def loss_of(theta: float, weights: int) -> float:
    """Tell the nats a token that quantizing this many weights is expected to add."""
    return weights * theta**2 / 24


def theta_for(loss_nats: float, weights: int) -> float:
    """Find the theta of a loss in nats a token; the inverse of `loss_of`."""
    return math.sqrt(24 * loss_nats / weights)


def indices(sensitivity: Sensitivity, theta: float) -> tuple[Tensor, Tensor]:
    """Choose the steps: indices int8 of the rows (R,) and of the columns (C,), step_rc = 2^((i_r + j_c) / OCTAVE)."""
    rows, columns = sensitivity.rows_R.double().log2() / -2, sensitivity.pivots_C.double().log2() / -2
    middle = columns.mean()  # the columns' indices stay near zero, the rows carry the level

    def on_grid(log2_step: Tensor) -> Tensor:
        return (OCTAVE * log2_step).round().clamp(-LARGEST_INDEX, LARGEST_INDEX).to(torch.int8)

    return on_grid(rows + middle + math.log2(theta)), on_grid(columns - middle)
