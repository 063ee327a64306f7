"""Logistic mixing: weighted log probabilities, with weights of either sign, moved by an online Newton step a block.

It may use what one expert knows beyond another: it learns to take the lift of a trigram over a bigram, with a negative
weight on the bigram. Its weights start at (1, 0, ..., 0), which is the first expert exactly, so a strong model loses
little. Shapes as in `hedge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hedgemix.mixers import weight_sets

LOG_FLOOR = -60.0
"""Log probabilities are raised to this before they are mixed; the mixed rows are normalised anyway."""
CURVATURE_STRIDE = 4
"""Curvature is summed over every fourth token of a block and scaled up; gradients use all."""
_MAX_STEP = 0.5
_MAX_WEIGHT = 4.0
_MAX_BIAS = 4.0


@dataclass(frozen=True)
class LogisticState:
    """Weights (R, M, S, K) and curvature (R, M, S, K, K), float64; memory_M in tokens of one set. Bias (R, M, V).
    Learning moves them in place."""

    weights: Tensor
    curvature: Tensor
    memory_M: Tensor
    ridge: float
    bias_RMV: Tensor
    bias_rate: float


def start(
    sets: int, memory: tuple[float, ...], gates: int, experts: int, ridge: float, device: torch.device | str,
    vocab_size: int, bias_rate: float = 0.0,
) -> LogisticState:  # fmt: skip
    """Begin R = sets row sets of one mixer for each memory, in tokens, with S = gates weight sets each.

    All weights are (1, 0, ..., 0), and there is no bias yet; bias_rate 0 keeps it so."""
    shape = (sets, len(memory), gates, experts)
    weights = torch.zeros(shape, dtype=torch.float64, device=device)
    weights[..., 0] = 1
    curvature = torch.zeros(*shape, experts, dtype=torch.float64, device=device)
    memory_M = torch.tensor(memory, dtype=torch.float64, device=device)
    bias_RMV = torch.zeros(sets, len(memory), vocab_size, device=device)
    return LogisticState(weights, curvature, memory_M, ridge, bias_RMV, bias_rate)


def rows(state: LogisticState, log_rows_BRKV: Tensor, gate_BRM: Tensor) -> Tensor:
    """Mix log rows (B, R, K, V) into normalised ones (B, R, M, V), float32, by the set that each gate names.

    p is proportional to exp(bias + sum_k w_k log p_k)."""
    return (weight_sets.choose(state.weights, gate_BRM).float() @ log_rows_BRKV).add_(state.bias_RMV).log_softmax(-1)


def learn(state: LogisticState, log_rows_BRKV: Tensor, mixed_BRMV: Tensor, token_B: Tensor, gate_BRM: Tensor) -> None:
    """Move the weights by one online Newton step, after the block's rows (`mixed_BRMV`) were scored.

    Per set: gradient sum over the block of `log p_k(y) - E_p[log p_k]`; curvature the covariance of the log rows under
    the mixed row, the exact Hessian of the loss, from every fourth token and forgotten with `exp(-tokens / memory)`.
    A step is at most 0.5 long and weights stay within 4 of zero, so no sequence of rows can make them diverge.
    A token's bias moves by how much oftener it occurred than was expected, over `1 / bias_rate` plus the expected
    count, which bounds the curvature: however frequent a token, no step goes too far.
    """
    size, sets, experts = log_rows_BRKV.shape[:3]
    p_BRMV = mixed_BRMV.softmax(-1)  # exp(mixed), in less time
    observed_BRK = log_rows_BRKV.gather(3, token_B[:, None, None, None].expand(-1, sets, experts, 1))[..., 0]
    mean_BRMK = p_BRMV @ log_rows_BRKV.transpose(2, 3)
    gradient_BRMK = (observed_BRK[:, :, None] - mean_BRMK).double()
    some = slice(None, None, CURVATURE_STRIDE)
    covariance = _second_moments(p_BRMV[some], log_rows_BRKV[some])
    covariance -= mean_BRMK[some, ..., None] * mean_BRMK[some, ..., None, :]
    member_BRMS = weight_sets.membership(gate_BRM, state.weights.shape[2])
    gradient_RMSK = weight_sets.sums(member_BRMS, gradient_BRMK)
    seen_RMSQ = weight_sets.sums(member_BRMS[some], covariance.double().flatten(3))
    kept = torch.exp(member_BRMS.sum(0) / -state.memory_M[:, None])[..., None, None]
    state.curvature.mul_(kept).add_(seen_RMSQ.view_as(state.curvature), alpha=CURVATURE_STRIDE)
    # solve_ex does not wait for the device; a system it cannot solve gives no step.
    ridge = _ridge(experts, state.ridge, p_BRMV.device)
    step, _ = torch.linalg.solve_ex(state.curvature + ridge, gradient_RMSK[..., None])
    step = step[..., 0].nan_to_num(0.0, 0.0, 0.0)
    length = step.norm(dim=-1, keepdim=True).clamp_min_(_MAX_STEP)
    state.weights.addcdiv_(step, length, value=_MAX_STEP).clamp_(-_MAX_WEIGHT, _MAX_WEIGHT)
    if state.bias_rate:
        occurred_V = torch.zeros_like(state.bias_RMV[0, 0]).index_add_(0, token_B, p_BRMV.new_ones(size))
        expected_RMV = p_BRMV.sum(0)
        more_RMV = occurred_V - expected_RMV
        step_RMV = more_RMV.div_(expected_RMV.add_(1 / state.bias_rate))
        state.bias_RMV.add_(step_RMV).clamp_(-_MAX_BIAS, _MAX_BIAS)


def _second_moments(p_BRMV: Tensor, log_rows_BRKV: Tensor) -> Tensor:
    """Compute E_p[log p_k log p_j], (B, R, M, K, K)."""
    weighted = p_BRMV[:, :, :, None] * log_rows_BRKV[:, :, None]
    moments = weighted.flatten(2, 3) @ log_rows_BRKV.transpose(2, 3)
    return moments.view(*weighted.shape[:-1], -1)


@cache
def _ridge(experts: int, ridge: float, device: torch.device) -> Tensor:
    return ridge * torch.eye(experts, dtype=torch.float64, device=device)
