"""Online mixtures of experts, each a code: the mixed row is normalised, and it moves only after it was scored.

Fixed share mixes probabilities and follows the best expert, from one token to the next. Linear mixing looks for the
best mixture of probabilities, by expectation maximisation. Logistic mixing adds weighted log probabilities and may use
what one expert knows beyond another: it learns to take the lift of a trigram over a bigram, with a negative weight on
the bigram. Its weights start at (1, 0, ..., 0), which is the first expert exactly, so a strong model loses little.

Shapes: B positions, R row sets (one model each, mixed apart), K experts, V vocabulary, L linear and
M logistic mixers, S weight sets of a mixer, C lanes, L steps of a lane, Q values of any kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LOG_FLOOR = -60.0
"""Log probabilities are raised to this inside logistic mixing, which normalises its own rows."""
CURVATURE_STRIDE = 4
"""Curvature is summed over every fourth token of a block and scaled up; gradients use all."""
LINEAR_FLOOR = 1e-5
"""Least weight in a linear mixture: an expert that was useless for a million tokens can still come back."""
_LANE = 16
_MAX_STEP = 0.5
_MAX_WEIGHT = 4.0
_MAX_BIAS = 4.0


@dataclass(frozen=True)
class LinearState:
    """Weights (R, L, S, K), float64, of each set adding up to 1; rate a token. Learning moves them in place."""

    weights: Tensor
    rate: float


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


def fixed_share(log_p_BRK: Tensor, log_w_RK: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Score B outcomes one after the other: returns log p (B, R), the weights used (B, R, K) and the next log weights.

    Takes the experts' log probabilities of what occurred and normalised log weights, float64. After each outcome the
    weights become `(1 - share) * posterior + share / K` (Herbster and Warmuth 1998, fixed share with uniform
    redistribution, learning rate 1, log loss); share 0 is the Bayes mixture, within ln K of the best expert.
    Exact to rounding, however many outcomes a call has, in some 85 + 4 log2(B / 16) array operations: the update is
    linear in the unnormalised weights, so lanes of 16 outcomes run side by side, first from every single expert. What
    those matrices do one after the other is found by doubling (Hillis and Steele 1986).
    """
    size, sets, experts = log_p_BRK.shape
    if share == 0:
        log_w_BRK = torch.cat([log_w_RK[None], log_w_RK + log_p_BRK.cumsum(0)]).log_softmax(-1)
        return (log_w_BRK[:-1] + log_p_BRK).logsumexp(-1), log_w_BRK[:-1].exp(), log_w_BRK[-1]
    lanes = -(-size // _LANE)
    top_BR1 = log_p_BRK.amax(-1, keepdim=True)
    # What pads the last lane comes after everything that is read.
    p = torch.ones(lanes * _LANE, sets, experts, dtype=log_p_BRK.dtype, device=log_p_BRK.device)
    torch.sub(log_p_BRK, top_BR1, out=p[:size]).exp_()
    p_CLRK = p.view(lanes, _LANE, sets, experts)
    one = torch.eye(experts, dtype=p.dtype, device=p.device)
    share_KK = (1 - share) * one + share / experts
    w_CRK = _lane_starts(log_w_RK.exp(), p_CLRK[:-1], share_KK)
    # The best expert of a step has probability 1 here and weight at least share / K: 16 steps cannot underflow.
    used_LCRK = torch.empty(_LANE + 1, lanes, sets, experts, dtype=p.dtype, device=p.device)
    used_LCRK[0] = w_CRK
    for step in range(_LANE):
        torch.matmul(used_LCRK[step] * p_CLRK[:, step], share_KK, out=used_LCRK[step + 1])
    used_LCRK /= used_LCRK.sum(-1, keepdim=True)
    weights = used_LCRK[:-1].transpose(0, 1).reshape(-1, sets, experts)[:size]
    log_mix = (weights * p[:size]).sum(-1).log() + top_BR1[..., 0]
    return log_mix, weights, used_LCRK[size - (lanes - 1) * _LANE, -1].log()


def _lane_starts(w_RK: Tensor, p_CLRK: Tensor, share_KK: Tensor) -> Tensor:
    """The weights that each lane begins with, (C + 1, R, K), from those of the first and what occurred in the lanes."""
    lanes, steps = p_CLRK.shape[:2]
    if not lanes:
        return w_RK[None]
    reach = torch.diag_embed(p_CLRK[:, 0]) @ share_KK
    for step in range(1, steps):
        reach = (reach * p_CLRK[:, step, :, None]) @ share_KK
    ahead = 1
    while ahead < lanes:
        reach = reach / reach.amax((-2, -1), keepdim=True)
        reach = torch.cat([reach[:ahead], reach[:-ahead] @ reach[ahead:]])
        ahead *= 2
    moved_CRK = (w_RK[:, None] @ reach)[:, :, 0]
    return torch.cat([w_RK[None], moved_CRK / moved_CRK.sum(-1, keepdim=True)])


def share_step(log_p_RK: Tensor, log_w_RK: Tensor, share: float) -> Tensor:
    """The log weights (R, K) after one outcome: `fixed_share` for a decoder that meets them one at a time."""
    log_posterior_RK = (log_w_RK + log_p_RK).log_softmax(-1)
    return _share(log_posterior_RK.exp(), share).log() if share else log_posterior_RK


def _share(weights: Tensor, share: float) -> Tensor:
    return (1 - share) * weights + share / weights.shape[-1] * weights.sum(-1, keepdim=True)


def start_linear(
    sets: int, mixers: int, gates: int, experts: int, rate: float, device: torch.device | str
) -> LinearState:
    """R = sets row sets; the first expert has half of the weight, so a strong model loses one bit a set at most."""
    shape = (sets, mixers, gates, experts)
    weights = torch.full(shape, 0.5 / max(experts - 1, 1), dtype=torch.float64, device=device)
    weights[..., 0] = 0.5
    return LinearState(weights / weights.sum(-1, keepdim=True), rate)


def linear_weights(state: LinearState, gate_BRL: Tensor) -> Tensor:
    """Each position's weights (B, R, L, K), float64, of the set that each gate names."""
    return _chosen(state.weights, gate_BRL)


def linear_rows(weights_BRLK: Tensor, p_BRV: Tensor, p_BKV: Tensor) -> Tensor:
    """Mixtures (B, R, L, V), float32, of each row set's own first expert (B, R, V) and the K - 1 experts they share."""
    size, sets, mixers, experts = weights_BRLK.shape
    weights = weights_BRLK.float()
    shared = weights[..., 1:].reshape(size, sets * mixers, experts - 1) @ p_BKV
    return shared.view(size, sets, mixers, p_BKV.shape[2]).addcmul_(weights[..., :1], p_BRV[:, :, None])


def learn_linear(state: LinearState, weights_BRLK: Tensor, p_BRK: Tensor, gate_BRL: Tensor) -> None:
    """Move the weights after the block was scored; `p_BRK`: the experts' probabilities of what occurred, float64.

    Towards the best mixture, not the best expert: the weights of a set become
    `(1 - rate)^n * weights + (1 - (1 - rate)^n) * mean responsibility` over its n positions of the block, where the
    responsibility of an expert is its share of the mixture's probability (one step of expectation maximisation).
    """
    share_BRLK = weights_BRLK * p_BRK[:, :, None]
    share_BRLK /= share_BRLK.sum(-1, keepdim=True)
    member_BRLS = _members(gate_BRL, state.weights.shape[2])
    count_RLS1 = member_BRLS.sum(0)[..., None]
    mean_RLSK = _sums(member_BRLS, share_BRLK) / count_RLS1.clamp_min(1)
    moved = torch.lerp(mean_RLSK, state.weights, (1 - state.rate) ** count_RLS1).clamp_min_(LINEAR_FLOOR)
    torch.div(moved, moved.sum(-1, keepdim=True), out=state.weights)


def start_logistic(
    sets: int, memory: tuple[float, ...], gates: int, experts: int, ridge: float, device: torch.device | str,
    vocab_size: int, bias_rate: float = 0.0,
) -> LogisticState:  # fmt: skip
    """R = sets row sets, one mixer for each memory, all weights (1, 0, ..., 0), no bias."""
    shape = (sets, len(memory), gates, experts)
    weights = torch.zeros(shape, dtype=torch.float64, device=device)
    weights[..., 0] = 1
    curvature = torch.zeros(*shape, experts, dtype=torch.float64, device=device)
    memory_M = torch.tensor(memory, dtype=torch.float64, device=device)
    bias_RMV = torch.zeros(sets, len(memory), vocab_size, device=device)
    return LogisticState(weights, curvature, memory_M, ridge, bias_RMV, bias_rate)


def logistic_rows(state: LogisticState, log_rows_BRKV: Tensor, gate_BRM: Tensor) -> Tensor:
    """Normalised log rows (B, R, M, V), p proportional to exp(bias + sum_k w_k log p_k), with the set a gate names."""
    return (_chosen(state.weights, gate_BRM).float() @ log_rows_BRKV).add_(state.bias_RMV).log_softmax(-1)


def learn_logistic(
    state: LogisticState, log_rows_BRKV: Tensor, mixed_BRMV: Tensor, token_B: Tensor, gate_BRM: Tensor
) -> None:
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
    member_BRMS = _members(gate_BRM, state.weights.shape[2])
    gradient_RMSK = _sums(member_BRMS, gradient_BRMK)
    seen_RMSQ = _sums(member_BRMS[some], covariance.double().flatten(3))
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
    """E_p[log p_k log p_j], (B, R, M, K, K)."""
    weighted = p_BRMV[:, :, :, None] * log_rows_BRKV[:, :, None]
    moments = weighted.flatten(2, 3) @ log_rows_BRKV.transpose(2, 3)
    return moments.view(*weighted.shape[:-1], -1)


def _members(gate_BRM: Tensor, sets: int) -> Tensor:
    """Which set each gate names, one-hot (B, R, M, S) float64."""
    return (gate_BRM[..., None] == _numbers(sets, gate_BRM.device)).double()


def _sums(member_BRMS: Tensor, values_BRMQ: Tensor) -> Tensor:
    """The values' sum over each set's positions, (R, M, S, Q)."""
    return member_BRMS.permute(1, 2, 3, 0) @ values_BRMQ.permute(1, 2, 0, 3)


@cache
def _numbers(size: int, device: torch.device) -> Tensor:
    """0, 1, ...; kept, since every array operation of a block counts."""
    return torch.arange(size, device=device)


@cache
def _ridge(experts: int, ridge: float, device: torch.device) -> Tensor:
    return ridge * torch.eye(experts, dtype=torch.float64, device=device)


def _chosen(weights: Tensor, gate_BRM: Tensor) -> Tensor:
    """Each position's weights (B, R, M, K) out of (R, M, S, K)."""
    set_index = _numbers(weights.shape[0], gate_BRM.device)[:, None]
    mixer = _numbers(weights.shape[1], gate_BRM.device)
    return weights[set_index, mixer, gate_BRM]


def mix(weights_BK: Tensor, log_rows_BKV: Tensor) -> Tensor:
    """Log of the linear mixture, (B, V) float32, of normalised log rows."""
    return (log_rows_BKV + weights_BK.float().log()[..., None]).logsumexp(1)
