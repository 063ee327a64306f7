"""Linear mixing: exact against a slow loop, near the best mixture, and valid on any row."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.mixers import hedge, linear


def slow_best_mixture(p: np.ndarray, gate: np.ndarray, weights: np.ndarray, rate: float) -> np.ndarray:
    """One block, one row set, one mixer: every set moves by its own positions."""
    moved = weights.copy()
    for number in range(len(weights)):
        mine = p[gate == number]
        if len(mine):
            joint = weights[number] * mine
            kept = (1 - rate) ** len(mine)
            moved[number] = kept * weights[number] + (1 - kept) * (joint / joint.sum(1, keepdims=True)).mean(0)
    return moved


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.sampled_from([0.02, 0.5]), st.integers(0, 10**6))
def test_linear_weights_equal_a_slow_loop(size: int, experts: int, rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, gates = rng.dirichlet(np.ones(20), (size, 2, experts))[..., 0], rng.integers(0, 3, (size, 2, 2))
    state = linear.start(2, 2, 3, experts, rate, "cpu")
    expected = [[slow_best_mixture(p[:, r], gates[:, r, m], state.weights[r, m].numpy(), rate) for m in range(2)]
                for r in range(2)]  # fmt: skip
    gate = torch.from_numpy(gates)
    linear.learn(state, linear.position_weights(state, gate), torch.from_numpy(p), gate)
    np.testing.assert_allclose(state.weights, np.array(expected), rtol=1e-3, atol=experts * linear.WEIGHT_FLOOR)
    torch.testing.assert_close(state.weights.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_linear_mixing_finds_the_best_mixture() -> None:
    """Where no expert is best, fixed share goes to and fro between them and the best mixture does not."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(8), (8000, 1, 3))  # rows of three experts
    truth = p[:, 0].transpose(0, 2, 1) @ np.array([0.6, 0.3, 0.1])
    token = (truth.cumsum(1) < rng.random((8000, 1))).sum(1)
    p_y = torch.from_numpy(np.take_along_axis(p, token[:, None, None, None], 3)[..., 0])
    state, gate, nats = linear.start(1, 1, 1, 3, 0.005, "cpu"), torch.zeros(100, 1, 1, dtype=torch.long), 0.0
    for a in range(0, 8000, 100):
        weights, here = linear.position_weights(state, gate), p_y[a : a + 100]
        nats -= float((weights[:, 0, 0] * here[:, 0]).sum(1).log().sum())
        linear.learn(state, weights, here, gate)
    torch.testing.assert_close(state.weights[0, 0, 0].float(), torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.06)
    start = torch.full((1, 3), -math.log(3), dtype=torch.float64)
    for share in (0.0, 0.02):
        assert nats < -hedge.fixed_share(p_y.log(), start, share)[0].sum() - 100
    best = -(p_y[:, 0] @ torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)).log().sum()
    assert nats < best + 60


def test_linear_mixing_survives_deterministic_experts() -> None:
    p = torch.full((6000, 1, 3), 1e-13, dtype=torch.float64)
    p[:3000, 0, 1], p[3000:, 0, 2] = 1.0, 1.0
    state, gate = linear.start(1, 1, 1, 3, 0.5, "cpu"), torch.zeros(100, 1, 1, dtype=torch.long)
    for a in range(0, 6000, 100):
        linear.learn(state, linear.position_weights(state, gate), p[a : a + 100], gate)
        assert state.weights.isfinite().all() and state.weights.min() > linear.WEIGHT_FLOOR / 2
    assert state.weights[0, 0, 0, 2] > 0.99


def test_linear_rows_sum_to_one() -> None:
    rows = torch.randn(50, 5, 40, generator=torch.manual_seed(0)).mul_(3).softmax(-1)
    own, shared = rows[:, :2], rows[:, 2:]
    weights = torch.rand(50, 2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    weights = weights / weights.sum(-1, keepdim=True)
    mixed = linear.rows(weights, own, shared)
    together = torch.cat([own[:, :, None], shared[:, None].expand(-1, 2, -1, -1)], 2)
    torch.testing.assert_close(mixed, weights.float() @ together)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(50, 2, 3), rtol=0, atol=1e-5)
