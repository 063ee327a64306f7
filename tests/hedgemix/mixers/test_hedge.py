"""Fixed share: exact against a slow loop, however many outcomes a call has, and valid on any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hedgemix.mixers import hedge


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
