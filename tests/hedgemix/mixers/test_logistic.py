"""Logistic mixing: the derivatives of its loss, weights that help, and none that diverge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hedgemix.mixers import logistic

VOCAB = 40


def log_rows(size: int, experts: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(size, 1, experts, VOCAB, generator=torch.manual_seed(seed)) * scale).log_softmax(-1)


def learn(state: logistic.LogisticState, rows: Tensor, tokens: Tensor, gates: Tensor, block: int = 32) -> None:
    for a in range(0, len(rows), block):
        here = slice(a, a + block)
        mixed = logistic.rows(state, rows[here], gates[here])
        assert mixed.isfinite().all() and mixed.double().logsumexp(-1).abs().max() < 1e-5
        logistic.learn(state, rows[here], mixed, tokens[here], gates[here])
        assert state.weights.isfinite().all() and state.weights.abs().max() <= 4


def test_logistic_starts_as_the_first_expert() -> None:
    rows, gates = log_rows(64, 4), torch.randint(3, (64, 1, 2))
    mixed = logistic.rows(logistic.start(1, (500.0, 900.0), 3, 4, 10.0, "cpu", VOCAB), rows, gates)
    torch.testing.assert_close(mixed[:, :, 1], rows[:, :, 0], rtol=1e-6, atol=1e-6)


def test_logistic_gradient_and_curvature_are_the_derivatives_of_the_loss() -> None:
    """One step of one set equals Newton's step made by autograd from the loss."""
    rows, tokens = log_rows(8, 3), torch.randint(VOCAB, (8,), generator=torch.manual_seed(5))
    rows, tokens = rows.repeat_interleave(4, 0), tokens.repeat_interleave(4)
    state, gates = logistic.start(1, (1e9,), 1, 3, 500.0, "cpu", VOCAB), torch.zeros(32, 1, 1, dtype=torch.long)

    def loss(w: Tensor) -> Tensor:
        logits = torch.einsum("k,bkv->bv", w, rows[:, 0].double())
        return torch.nn.functional.cross_entropy(logits, tokens, reduction="sum")

    start = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, start)
    hessian = torch.autograd.functional.hessian(loss, start) + 500.0 * torch.eye(3)
    step = -torch.linalg.solve(hessian, gradient)
    assert 1e-3 < step.norm() < 0.5
    logistic.learn(state, rows, logistic.rows(state, rows, gates), tokens, gates)
    torch.testing.assert_close(state.weights[0, 0, 0], start + step, rtol=1e-4, atol=1e-5)


def test_logistic_learns_weights_that_help() -> None:
    rows = log_rows(4000, 3, scale=1.5)
    truth = (0.3 * rows[:, 0, 0] + 0.9 * rows[:, 0, 1] - 0.4 * rows[:, 0, 2]).softmax(-1)
    tokens = torch.multinomial(truth, 1, generator=torch.manual_seed(2))[:, 0]
    state, gates = (
        logistic.start(1, (4000.0,), 1, 3, 10.0, "cpu", VOCAB),
        torch.zeros(4000, 1, 1, dtype=torch.long),
    )
    learn(state, rows, tokens, gates)
    torch.testing.assert_close(state.weights[0, 0, 0].float(), torch.tensor([0.3, 0.9, -0.4]), rtol=0, atol=0.1)


def test_bias_learns_how_often_tokens_occur() -> None:
    """Experts that know nothing: what is left is a unigram, which the bias becomes."""
    p = torch.tensor([0.7, 0.15, 0.1, *[0.05 / (VOCAB - 3)] * (VOCAB - 3)])
    tokens = torch.multinomial(p, 20_000, replacement=True, generator=torch.manual_seed(0))
    rows, gates = torch.full((100, 1, 2, VOCAB), -math.log(VOCAB)), torch.zeros(100, 1, 1, dtype=torch.long)
    state = logistic.start(1, (500.0,), 1, 2, 10.0, "cpu", VOCAB, 0.05)
    for a in range(0, 20_000, 100):
        mixed = logistic.rows(state, rows, gates)
        logistic.learn(state, rows, mixed, tokens[a : a + 100], gates)
    torch.testing.assert_close(mixed[0, 0, 0].exp()[:3], p[:3], rtol=0.25, atol=0)
    frozen = logistic.start(1, (500.0,), 1, 2, 10.0, "cpu", VOCAB)
    logistic.learn(frozen, rows, logistic.rows(frozen, rows, gates), tokens[:100], gates)
    assert not frozen.bias_RMV.any()


@pytest.mark.parametrize("case", ["deterministic", "identical", "one-hot", "uniform"])
def test_logistic_never_diverges(case: str) -> None:
    size = 512
    generator = torch.manual_seed(3)
    rows = torch.full((size, 1, 3, VOCAB), logistic.LOG_FLOOR if case == "one-hot" else -30.0)
    sure = torch.randint(VOCAB, (size, 1, 3, 1), generator=generator)
    rows = rows.scatter(3, sure, 0.0).log_softmax(-1)
    if case == "identical":
        rows = rows[:, :, :1].expand(-1, -1, 3, -1).contiguous()
    if case == "uniform":
        rows = torch.full_like(rows, -math.log(VOCAB))
    tokens = torch.randint(VOCAB, (size,), generator=generator)
    state = logistic.start(1, (5.0, 500.0), 2, 3, 1e-6, "cpu", VOCAB, 0.5)
    learn(state, rows, tokens, torch.randint(2, (size, 1, 2), generator=generator))
