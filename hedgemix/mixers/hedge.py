"""Hedge with fixed share: the mixture of probabilities that follows the best expert, from one token to the next.

Like every mixer here it is a code: the mixed row is normalised, and the weights move only after it was scored.

Shapes, also of `linear` and `logistic`: B positions, R row sets (one model each, mixed apart), K experts, V vocabulary,
L linear and M logistic mixers, S weight sets of a mixer, Q values of any kind. Here, C lanes of T steps each.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LANE = 16


def fixed_share(log_p_BRK: Tensor, log_w_RK: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Score B outcomes one after the other: returns log p (B, R), in nats, the weights used (B, R, K) and the next log
    weights (R, K).

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
    p_CTRK = p.view(lanes, _LANE, sets, experts)
    one = torch.eye(experts, dtype=p.dtype, device=p.device)
    share_KK = (1 - share) * one + share / experts
    w_CRK = _lane_starts(log_w_RK.exp(), p_CTRK[:-1], share_KK)
    # The best expert of a step has probability 1 here and weight at least share / K: 16 steps cannot underflow.
    used_TCRK = torch.empty(_LANE + 1, lanes, sets, experts, dtype=p.dtype, device=p.device)
    used_TCRK[0] = w_CRK
    for step in range(_LANE):
        torch.matmul(used_TCRK[step] * p_CTRK[:, step], share_KK, out=used_TCRK[step + 1])
    used_TCRK /= used_TCRK.sum(-1, keepdim=True)
    weights = used_TCRK[:-1].transpose(0, 1).reshape(-1, sets, experts)[:size]
    log_mix = (weights * p[:size]).sum(-1).log() + top_BR1[..., 0]
    return log_mix, weights, used_TCRK[size - (lanes - 1) * _LANE, -1].log()


def _lane_starts(w_RK: Tensor, p_CTRK: Tensor, share_KK: Tensor) -> Tensor:
    """The weights that each lane begins with, (C + 1, R, K), from those of the first and what occurred in the lanes."""
    lanes, steps = p_CTRK.shape[:2]
    if not lanes:
        return w_RK[None]
    reach = torch.diag_embed(p_CTRK[:, 0]) @ share_KK
    for step in range(1, steps):
        reach = (reach * p_CTRK[:, step, :, None]) @ share_KK
    ahead = 1
    while ahead < lanes:
        reach = reach / reach.amax((-2, -1), keepdim=True)
        reach = torch.cat([reach[:ahead], reach[:-ahead] @ reach[ahead:]])
        ahead *= 2
    moved_CRK = (w_RK[:, None] @ reach)[:, :, 0]
    return torch.cat([w_RK[None], moved_CRK / moved_CRK.sum(-1, keepdim=True)])


def share_step(log_p_RK: Tensor, log_w_RK: Tensor, share: float) -> Tensor:
    """Move log weights (R, K) past one outcome of log probabilities (R, K), float64: `fixed_share` for a decoder, which
    meets them one at a time."""
    log_posterior_RK = (log_w_RK + log_p_RK).log_softmax(-1)
    return _share(log_posterior_RK.exp(), share).log() if share else log_posterior_RK


def _share(weights: Tensor, share: float) -> Tensor:
    return (1 - share) * weights + share / weights.shape[-1] * weights.sum(-1, keepdim=True)


def mix(weights_BK: Tensor, log_rows_BKV: Tensor) -> Tensor:
    """Mix normalised log rows (B, K, V), float32, by weights (B, K): log rows (B, V)."""
    return (log_rows_BKV + weights_BK.float().log()[..., None]).logsumexp(1)
