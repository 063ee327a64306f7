"""Mixers: exact against slow loops, valid on any row, blind to the future."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hedgemix import hedge, ngram
from hedgemix.config import MixerConfig, RecipeError
from hedgemix.mixer import Mixer, classes, gate_sets, weight_sets

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
    log_p = -torch.rand(200, 2, 4, generator=torch.manual_seed(1), dtype=torch.float64) * 20
    start = torch.full((2, 4), -math.log(4), dtype=torch.float64)
    _, used, after = hedge.fixed_share(log_p, start, share)
    log_w = start
    for outcome in range(200):
        torch.testing.assert_close(log_w.exp(), used[outcome], rtol=1e-12, atol=1e-12)
        log_w = hedge.share_step(log_p[outcome], log_w, share)
    torch.testing.assert_close(log_w.exp(), after.exp(), rtol=1e-12, atol=1e-12)


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
    mixed = hedge.logistic_rows(hedge.start_logistic(1, (500.0, 900.0), 3, 4, 10.0, "cpu"), rows, gates)
    torch.testing.assert_close(mixed[:, :, 1], rows[:, :, 0], rtol=1e-6, atol=1e-6)


def test_logistic_gradient_and_curvature_are_the_derivatives_of_the_loss() -> None:
    """One step of one set equals Newton's step made by autograd from the loss."""
    rows, tokens = log_rows(8, 3), torch.randint(VOCAB, (8,), generator=torch.manual_seed(5))
    rows, tokens = rows.repeat_interleave(4, 0), tokens.repeat_interleave(4)
    state, gates = hedge.start_logistic(1, (1e9,), 1, 3, 500.0, "cpu"), torch.zeros(32, 1, 1, dtype=torch.long)

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
    state, gates = hedge.start_logistic(1, (4000.0,), 1, 3, 10.0, "cpu"), torch.zeros(4000, 1, 1, dtype=torch.long)
    learn(state, rows, tokens, gates)
    torch.testing.assert_close(state.weights[0, 0, 0].float(), torch.tensor([0.3, 0.9, -0.4]), rtol=0, atol=0.1)


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
    state = hedge.start_logistic(1, (5.0, 500.0), 2, 3, 1e-6, "cpu")
    learn(state, rows, tokens, torch.randint(2, (size, 1, 2), generator=generator))


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return (np.random.default_rng(0).zipf(1.4, 700) % VOCAB).astype(np.uint16)


def neural_rows(text: np.ndarray, seed: int = 0) -> Tensor:
    return torch.randn(len(text), VOCAB, generator=torch.manual_seed(seed)) * 2


CONFIG = MixerConfig(orders=(1, 2, 3), match_lengths=(3, 4), block_tokens=32)


def index_of(text: np.ndarray, config: MixerConfig = CONFIG) -> ngram.NgramIndex:
    return ngram.build_index(text, config.orders, VOCAB, config.match_lengths)


def scored(text: np.ndarray, cuts: list[int], config: MixerConfig = CONFIG) -> dict[str, Tensor]:
    mixer = Mixer(config, VOCAB, index_of(text, config), names=("a", "b"))
    rows = {"a": neural_rows(text), "b": neural_rows(text, 1)}
    parts = []
    for start, stop in zip([1, *cuts], [*cuts, len(text)], strict=True):
        parts.append(mixer.score({name: rows[name][start:stop] for name in rows}, start, stop).nll)
    return {f"{name}.{kind}": torch.cat([part[name][kind] for part in parts]) for name in rows for kind in mixer.kinds}


def test_cuts_at_blocks_do_not_matter(text: np.ndarray) -> None:
    whole, cut = scored(text, []), scored(text, [32, 64, 320, 640])
    for kind in whole:
        torch.testing.assert_close(cut[kind], whole[kind], rtol=1e-5, atol=1e-6, msg=kind)


def test_hedge_does_not_depend_on_cuts_at_all(text: np.ndarray) -> None:
    torch.testing.assert_close(scored(text, [7, 100])["a.hedge"], scored(text, [])["a.hedge"], rtol=1e-9, atol=1e-9)


def test_row_sets_are_scored_apart(text: np.ndarray) -> None:
    index = index_of(text)
    alone = Mixer(CONFIG, VOCAB, index, names=("b",)).score({"b": neural_rows(text, 1)[1:]}, 1, len(text)).nll["b"]
    both = scored(text, [])
    for kind, nll in alone.items():
        torch.testing.assert_close(both[f"b.{kind}"], nll, rtol=1e-5, atol=1e-6, msg=kind)


def test_scores_are_gathered_from_rows_that_sum_to_one(text: np.ndarray) -> None:
    mixer = Mixer(CONFIG, VOCAB, index_of(text))
    neural = neural_rows(text)
    neural[5, 3:] = -1e30
    for start, stop in ((1, 320), (320, 700)):
        given = {"neural": neural[start:stop]}
        rows = mixer.rows(given, start, stop)["neural"]
        nll = mixer.score(given, start, stop).nll["neural"]
        token = torch.from_numpy(text[start:stop].astype(np.int64))
        for kind, row in rows.items():
            assert row.shape == (stop - start, VOCAB)
            assert row.double().logsumexp(1).abs().max() < 1e-5, kind
            gathered = -row.gather(1, token[:, None])[:, 0].double()
            torch.testing.assert_close(nll[kind], gathered, rtol=1e-5, atol=1e-5, msg=kind)


@pytest.mark.parametrize("t", [1, 33, 350])
def test_the_target_and_the_future_change_no_row(text: np.ndarray, t: int) -> None:
    changed = text.copy()
    changed[t:] = np.random.default_rng(1).integers(0, VOCAB, len(text) - t)
    neural = {"neural": neural_rows(text)[1:]}
    before, after = (
        Mixer(CONFIG, VOCAB, index_of(tokens)).rows(neural, 1, len(text))["neural"] for tokens in (text, changed)
    )
    for kind in before:
        assert torch.equal(before[kind][:t], after[kind][:t]), kind
    assert not torch.equal(before["ensemble"][t:], after["ensemble"][t:])


def test_ensemble_is_close_to_the_best_of_its_members(text: np.ndarray) -> None:
    nll = scored(text, [], replace(CONFIG, hedge_share=0.0))
    best = min(nll["a.neural"].sum(), nll["a.logistic"].sum())
    assert nll["a.ensemble"].sum() <= best + math.log(4)
    assert nll["a.hedge"].sum() <= min(nll[f"a.{k}"].sum() for k in ("neural", "order1", "order3", "match")) + math.log(
        5
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"hedge_share": 1.0},
        {"gates": ()},
        {"orders": (1, 2)},
        {"memory_tokens": (1.0,)},
        {"match_lengths": (2,)},
        {"match_lengths": ()},
    ],
)
def test_what_cannot_work_says_so(text: np.ndarray, bad: dict) -> None:
    with pytest.raises(RecipeError):
        Mixer(replace(CONFIG, **bad), VOCAB, index_of(text))


def test_one_position_has_the_gates_of_its_batch(text: np.ndarray) -> None:
    config = replace(CONFIG, gates=("order", "both", "none", "entropy"), memory_tokens=(1.0, 1.0, 1.0, 1.0))
    rows, longest = neural_rows(text).log_softmax(-1), ngram.longest_class(index_of(text), 0, len(text))
    together = gate_sets(config, rows[:, None], torch.from_numpy(longest)[:, None])
    assert together.shape == (len(text), 1, 4) and together.amax() < weight_sets(config)
    assert [len(together[..., gate].unique()) for gate in (0, 2)] == [classes(config), 1]
    for t in range(0, len(text), 50):
        alone = gate_sets(config, rows[t : t + 1], torch.tensor([longest[t]]))
        assert torch.equal(alone, together[t])
