"""Weight sets: of a mixer's many, a gate names the one that a position uses and moves. Shapes as in `hedge`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def choose(weights: Tensor, gate_BRM: Tensor) -> Tensor:
    """Look up each position's weights (B, R, M, K) in (R, M, S, K), by gates of int64."""
    set_index = _numbers(weights.shape[0], gate_BRM.device)[:, None]
    mixer = _numbers(weights.shape[1], gate_BRM.device)
    return weights[set_index, mixer, gate_BRM]


def membership(gate_BRM: Tensor, sets: int) -> Tensor:
    """Tell which set each gate names, int64: one-hot (B, R, M, S), float64."""
    return (gate_BRM[..., None] == _numbers(sets, gate_BRM.device)).double()


def sums(member_BRMS: Tensor, values_BRMQ: Tensor) -> Tensor:
    """Sum the values over the positions of each set: (R, M, S, Q)."""
    return member_BRMS.permute(1, 2, 3, 0) @ values_BRMQ.permute(1, 2, 0, 3)


@cache
def _numbers(size: int, device: torch.device) -> Tensor:
    """0, 1, ...; kept, since every array operation of a block counts."""
    return torch.arange(size, device=device)
