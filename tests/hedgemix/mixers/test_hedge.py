"""The updates that mixers are made of: exact against slow loops, valid on any row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hedgemix.mixers import hedge

VOCAB = 40


def slow_fixed_share(log_p: np.ndarray, log_w: np.ndarray, share: float) -> tuple[list[float], np.ndarray]:
    weights, out = np.exp(log_w), []
    for row in log_p:
        joint = weights * np.exp(row)
        out.append(math.log(joint.sum()))
        weights = (1 - share) * joint / joint.sum() + share / len(row)
    return out, weights


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 5), st.sampled_from([0.0, 1e-3, 0.3]), st.integers(0, 10**6))
def test_fixed_share_equals_a_slow_loop(size: int, experts: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_p, log_w = -rng.exponential(3, (size, 2, experts)), np.log(rng.dirichlet(np.ones(experts), 2))
    log_mix, used, after = hedge.fixed_share(torch.from_numpy(log_p), torch.from_numpy(log_w), share)
    for r in range(2):
        expected, weights = slow_fixed_share(log_p[:, r], log_w[r], share)
        np.testing.assert_allclose(log_mix[:, r], expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(after[r].exp(), weights, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose((used.log() + torch.from_numpy(log_p)).logsumexp(-1), log_mix, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.3])
def test_one_outcome_at_a_time_moves_the_same_weights(share: float) -> None:
    log_p = -torch.rand(700, 2, 4, generator=torch.manual_seed(1), dtype=torch.float64) * 20
    start = torch.full((2, 4), -math.log(4), dtype=torch.float64)
    _, used, after = hedge.fixed_share(log_p, start, share)
    log_w = start
    for outcome in range(700):
        torch.testing.assert_close(log_w.exp(), used[outcome], rtol=1e-12, atol=1e-12)
        log_w = hedge.share_step(log_p[outcome], log_w, share)
    torch.testing.assert_close(log_w.exp(), after.exp(), rtol=1e-12, atol=1e-12)


class Operations(TorchDispatchMode):
    """Counts array operations that are not views: what a GPU is asked to launch."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (operation.is_view or operation.name() in ("aten::_unsafe_view", "aten::empty.memory_format"))
        return operation(*args, **(kwargs or {}))


def test_fixed_share_takes_few_array_operations_however_many_outcomes() -> None:
    start, counts = torch.full((1, 8), -math.log(8), dtype=torch.float64), []
    for size in (512, 4096, 32_768):
        with Operations() as operations:
            hedge.fixed_share(-torch.rand(size, 1, 8, dtype=torch.float64), start, 0.02)
        counts.append(operations.count)
    assert counts[0] > 50 and counts[-1] < 150, counts


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.01])
def test_fixed_share_survives_deterministic_experts(share: float) -> None:
    log_p = torch.full((2000, 1, 3), -30.0, dtype=torch.float64)
    log_p[torch.arange(2000), 0, torch.randint(3, (2000,), generator=torch.manual_seed(0))] = 0.0
    log_mix, used, after = hedge.fixed_share(log_p, torch.full((1, 3), -math.log(3), dtype=torch.float64), share)
    assert log_mix.isfinite().all() and log_mix.max() <= 1e-12 and after.exp().sum() == pytest.approx(1)
    torch.testing.assert_close(used.sum(-1), torch.ones(2000, 1, dtype=torch.float64))


def test_bayes_mixture_keeps_its_regret_bound() -> None:
    log_p = -torch.rand(5000, 1, 6, generator=torch.manual_seed(1), dtype=torch.float64) * torch.arange(1.0, 7)
    log_mix, _, _ = hedge.fixed_share(log_p, torch.full((1, 6), -math.log(6), dtype=torch.float64), 0.0)
    assert -log_mix.sum() <= (-log_p.sum(0)).min() + math.log(6)
    assert -log_mix.sum() > (-log_p.sum(0)).min()


def log_rows(size: int, experts: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(size, 1, experts, VOCAB, generator=torch.manual_seed(seed)) * scale).log_softmax(-1)


def learn(state: hedge.LogisticState, rows: Tensor, tokens: Tensor, gates: Tensor, block: int = 32) -> None:
    for a in range(0, len(rows), block):
        here = slice(a, a + block)
        mixed = hedge.logistic_rows(state, rows[here], gates[here])
        assert mixed.isfinite().all() and mixed.double().logsumexp(-1).abs().max() < 1e-5
        hedge.learn_logistic(state, rows[here], mixed, tokens[here], gates[here])
        assert state.weights.isfinite().all() and state.weights.abs().max() <= 4


def test_logistic_starts_as_the_first_expert() -> None:
    rows, gates = log_rows(64, 4), torch.randint(3, (64, 1, 2))
    mixed = hedge.logistic_rows(hedge.start_logistic(1, (500.0, 900.0), 3, 4, 10.0, "cpu", VOCAB), rows, gates)
    torch.testing.assert_close(mixed[:, :, 1], rows[:, :, 0], rtol=1e-6, atol=1e-6)


def test_logistic_gradient_and_curvature_are_the_derivatives_of_the_loss() -> None:
    """One step of one set equals Newton's step made by autograd from the loss."""
    rows, tokens = log_rows(8, 3), torch.randint(VOCAB, (8,), generator=torch.manual_seed(5))
    rows, tokens = rows.repeat_interleave(4, 0), tokens.repeat_interleave(4)
    state, gates = hedge.start_logistic(1, (1e9,), 1, 3, 500.0, "cpu", VOCAB), torch.zeros(32, 1, 1, dtype=torch.long)

    def loss(w: Tensor) -> Tensor:
        logits = torch.einsum("k,bkv->bv", w, rows[:, 0].double())
        return torch.nn.functional.cross_entropy(logits, tokens, reduction="sum")

    start = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, start)
    hessian = torch.autograd.functional.hessian(loss, start) + 500.0 * torch.eye(3)
    step = -torch.linalg.solve(hessian, gradient)
    assert 1e-3 < step.norm() < 0.5
    hedge.learn_logistic(state, rows, hedge.logistic_rows(state, rows, gates), tokens, gates)
    torch.testing.assert_close(state.weights[0, 0, 0], start + step, rtol=1e-4, atol=1e-5)


def test_logistic_learns_weights_that_help() -> None:
    rows = log_rows(4000, 3, scale=1.5)
    truth = (0.3 * rows[:, 0, 0] + 0.9 * rows[:, 0, 1] - 0.4 * rows[:, 0, 2]).softmax(-1)
    tokens = torch.multinomial(truth, 1, generator=torch.manual_seed(2))[:, 0]
    state, gates = (
        hedge.start_logistic(1, (4000.0,), 1, 3, 10.0, "cpu", VOCAB),
        torch.zeros(4000, 1, 1, dtype=torch.long),
    )
    learn(state, rows, tokens, gates)
    torch.testing.assert_close(state.weights[0, 0, 0].float(), torch.tensor([0.3, 0.9, -0.4]), rtol=0, atol=0.1)


def test_bias_learns_how_often_tokens_occur() -> None:
    """Experts that know nothing: what is left is a unigram, which the bias becomes."""
    p = torch.tensor([0.7, 0.15, 0.1, *[0.05 / (VOCAB - 3)] * (VOCAB - 3)])
    tokens = torch.multinomial(p, 20_000, replacement=True, generator=torch.manual_seed(0))
    rows, gates = torch.full((100, 1, 2, VOCAB), -math.log(VOCAB)), torch.zeros(100, 1, 1, dtype=torch.long)
    state = hedge.start_logistic(1, (500.0,), 1, 2, 10.0, "cpu", VOCAB, 0.05)
    for a in range(0, 20_000, 100):
        mixed = hedge.logistic_rows(state, rows, gates)
        hedge.learn_logistic(state, rows, mixed, tokens[a : a + 100], gates)
    torch.testing.assert_close(mixed[0, 0, 0].exp()[:3], p[:3], rtol=0.25, atol=0)
    frozen = hedge.start_logistic(1, (500.0,), 1, 2, 10.0, "cpu", VOCAB)
    hedge.learn_logistic(frozen, rows, hedge.logistic_rows(frozen, rows, gates), tokens[:100], gates)
    assert not frozen.bias_RMV.any()


@pytest.mark.parametrize("case", ["deterministic", "identical", "one-hot", "uniform"])
def test_logistic_never_diverges(case: str) -> None:
    size = 512
    generator = torch.manual_seed(3)
    rows = torch.full((size, 1, 3, VOCAB), hedge.LOG_FLOOR if case == "one-hot" else -30.0)
    sure = torch.randint(VOCAB, (size, 1, 3, 1), generator=generator)
    rows = rows.scatter(3, sure, 0.0).log_softmax(-1)
    if case == "identical":
        rows = rows[:, :, :1].expand(-1, -1, 3, -1).contiguous()
    if case == "uniform":
        rows = torch.full_like(rows, -math.log(VOCAB))
    tokens = torch.randint(VOCAB, (size,), generator=generator)
    state = hedge.start_logistic(1, (5.0, 500.0), 2, 3, 1e-6, "cpu", VOCAB, 0.5)
    learn(state, rows, tokens, torch.randint(2, (size, 1, 2), generator=generator))


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
    state = hedge.start_linear(2, 2, 3, experts, rate, "cpu")
    expected = [[slow_best_mixture(p[:, r], gates[:, r, m], state.weights[r, m].numpy(), rate) for m in range(2)]
                for r in range(2)]  # fmt: skip
    gate = torch.from_numpy(gates)
    hedge.learn_linear(state, hedge.linear_weights(state, gate), torch.from_numpy(p), gate)
    np.testing.assert_allclose(state.weights, np.array(expected), rtol=1e-3, atol=experts * hedge.LINEAR_FLOOR)
    torch.testing.assert_close(state.weights.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_linear_mixing_finds_the_best_mixture() -> None:
    """Where no expert is best, fixed share goes to and fro between them and the best mixture does not."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(8), (8000, 1, 3))  # rows of three experts
    truth = p[:, 0].transpose(0, 2, 1) @ np.array([0.6, 0.3, 0.1])
    token = (truth.cumsum(1) < rng.random((8000, 1))).sum(1)
    p_y = torch.from_numpy(np.take_along_axis(p, token[:, None, None, None], 3)[..., 0])
    state, gate, nats = hedge.start_linear(1, 1, 1, 3, 0.005, "cpu"), torch.zeros(100, 1, 1, dtype=torch.long), 0.0
    for a in range(0, 8000, 100):
        weights, here = hedge.linear_weights(state, gate), p_y[a : a + 100]
        nats -= float((weights[:, 0, 0] * here[:, 0]).sum(1).log().sum())
        hedge.learn_linear(state, weights, here, gate)
    torch.testing.assert_close(state.weights[0, 0, 0].float(), torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.06)
    start = torch.full((1, 3), -math.log(3), dtype=torch.float64)
    for share in (0.0, 0.02):
        assert nats < -hedge.fixed_share(p_y.log(), start, share)[0].sum() - 100
    best = -(p_y[:, 0] @ torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)).log().sum()
    assert nats < best + 60


def test_linear_mixing_survives_deterministic_experts() -> None:
    p = torch.full((6000, 1, 3), 1e-13, dtype=torch.float64)
    p[:3000, 0, 1], p[3000:, 0, 2] = 1.0, 1.0
    state, gate = hedge.start_linear(1, 1, 1, 3, 0.5, "cpu"), torch.zeros(100, 1, 1, dtype=torch.long)
    for a in range(0, 6000, 100):
        hedge.learn_linear(state, hedge.linear_weights(state, gate), p[a : a + 100], gate)
        assert state.weights.isfinite().all() and state.weights.min() > hedge.LINEAR_FLOOR / 2
    assert state.weights[0, 0, 0, 2] > 0.99


def test_linear_rows_sum_to_one() -> None:
    own, shared = log_rows(50, 2).exp()[:, 0], log_rows(50, 3, seed=1).exp()[:, 0]
    weights = torch.rand(50, 2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    weights = weights / weights.sum(-1, keepdim=True)
    mixed = hedge.linear_rows(weights, own, shared)
    together = torch.cat([own[:, :, None], shared[:, None].expand(-1, 2, -1, -1)], 2)
    torch.testing.assert_close(mixed, weights.float() @ together)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(50, 2, 3), rtol=0, atol=1e-5)
