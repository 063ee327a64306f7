"""Linear mixing: the best mixture of probabilities, by expectation maximisation, in many weight sets.

Where no expert is the best one, fixed share goes to and fro between them and this does not. Shapes as in `hedge`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hedgemix.mixers import weight_sets

WEIGHT_FLOOR = 1e-5
"""Least weight in a mixture: an expert that was useless for a million tokens can still come back."""


@dataclass(frozen=True)
class LinearState:
    """Weights (R, L, S, K), float64, of each set adding up to 1; rate a token. Learning moves them in place."""

    weights: Tensor
    rate: float


def start(sets: int, mixers: int, gates: int, experts: int, rate: float, device: torch.device | str) -> LinearState:
    """Begin R = sets row sets of L = mixers, S = gates weight sets each; rate: of forgetting, a token.

    The first expert has half of the weight, so a strong model loses one bit a set at most."""
    shape = (sets, mixers, gates, experts)
    weights = torch.full(shape, 0.5 / max(experts - 1, 1), dtype=torch.float64, device=device)
    weights[..., 0] = 0.5
    return LinearState(weights / weights.sum(-1, keepdim=True), rate)


def position_weights(state: LinearState, gate_BRL: Tensor) -> Tensor:
    """Look up each position's weights (B, R, L, K), float64, of the set that each gate names, int64."""
    return weight_sets.choose(state.weights, gate_BRL)


def rows(weights_BRLK: Tensor, p_BRV: Tensor, p_BKV: Tensor) -> Tensor:
    """Mix each row set's own first expert (B, R, V) and the K - 1 that all share (B, K - 1, V): probability rows
    (B, R, L, V), float32."""
    size, sets, mixers, experts = weights_BRLK.shape
    weights = weights_BRLK.float()
    shared = weights[..., 1:].reshape(size, sets * mixers, experts - 1) @ p_BKV
    return shared.view(size, sets, mixers, p_BKV.shape[2]).addcmul_(weights[..., :1], p_BRV[:, :, None])


def learn(state: LinearState, weights_BRLK: Tensor, p_BRK: Tensor, gate_BRL: Tensor) -> None:
    """Move the weights after the block was scored; `p_BRK`: the experts' probabilities of what occurred, float64.

    Towards the best mixture, not the best expert: the weights of a set become
    `(1 - rate)^n * weights + (1 - (1 - rate)^n) * mean responsibility` over its n positions of the block, where the
    responsibility of an expert is its share of the mixture's probability (one step of expectation maximisation).
    """
    share_BRLK = weights_BRLK * p_BRK[:, :, None]
    share_BRLK /= share_BRLK.sum(-1, keepdim=True)
    member_BRLS = weight_sets.membership(gate_BRL, state.weights.shape[2])
    count_RLS1 = member_BRLS.sum(0)[..., None]
    mean_RLSK = weight_sets.sums(member_BRLS, share_BRLK) / count_RLS1.clamp_min(1)
    moved = torch.lerp(mean_RLSK, state.weights, (1 - state.rate) ** count_RLS1).clamp_min_(WEIGHT_FLOOR)
    torch.div(moved, moved.sum(-1, keepdim=True), out=state.weights)
