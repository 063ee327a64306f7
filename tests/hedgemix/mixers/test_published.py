"""The published rule against a slow version, and the reason why it is no code length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hedgemix.mixers import published
from hedgemix.mixers.published import EXPERTS

VOCAB, BUCKETS = 11, 97


def slow(
    logits: np.ndarray, tokens: list[int], chunk: int, batch: int, warm: int, ranks: int
) -> tuple[list[float], list[float]]:
    """One token and one chunk at a time, with dictionaries; position t is scored from row t - 2."""
    counts: list[dict[tuple[int, int], int]] = [{}, {}, {}]
    logws: list[list[float]] = [[2.0, 0, 0, 0, 0] for _ in range(ranks)]
    losses: list[list[float]] = []
    nll, mass = [], []
    counted, pending, rank = 0, [], 0
    windows = -(-chunk // published.WINDOW_TOKENS)
    owners = [
        next(r for r in range(ranks) if windows * r // ranks <= w < windows * (r + 1) // ranks) for w in range(windows)
    ]
    for t in range(2, len(tokens)):
        owner = owners[len(pending) // published.WINDOW_TOKENS]
        if losses and (owner != rank or not pending):  # its share of the chunk is over
            logws[rank], losses = list(np.array(logws[rank]) - 0.1 * np.mean(losses, axis=0)), []
        rank = owner
        logw = logws[rank]
        y, contexts = tokens[t], (0, tokens[t - 1], ((36313 * tokens[t - 2]) ^ (27191 * tokens[t - 1])) % BUCKETS)
        p = np.exp(logits[t - 2]) / np.exp(logits[t - 2]).sum()
        heat = min(max(1 - 0.02 * (1 + (p * np.log(p)).sum() / math.log(VOCAB)), 0.9), 1.05)
        p = p ** (1 / heat) / (p ** (1 / heat)).sum()
        entropy = -(p * np.log(p)).sum()
        experts, sums = [p[y]], [1.0]
        for table, context, plus in zip(counts, contexts, (0.1, 0.1, 0.01), strict=True):
            seen = [table.get((context, w), 0) + plus for w in range(VOCAB)]
            below = max(sum(seen), 1 + VOCAB * plus) if plus == 0.01 else sum(seen)
            experts.append(seen[y] / below)
            sums.append(sum(seen) / below)
        experts.append(math.exp(-entropy))
        total = 1.0
        if counted < warm:
            nll.append(-math.log(p[y]))
        else:
            w = np.exp(logw) / np.exp(logw).sum()
            nll.append(-math.log(float(w @ np.array(experts))))
            total = float(w @ np.array([*sums, VOCAB * math.exp(-entropy)]))
            losses.append([-math.log(e) for e in experts])
            if len(losses) == batch:
                logws[rank], losses = list(np.array(logw) - 0.1 * np.mean(losses, axis=0)), []
        mass.append(total)
        pending.append((contexts, y))
        if len(pending) == chunk:
            for seen_contexts, token in pending:
                for table, context in zip(counts, seen_contexts, strict=True):
                    table[context, token] = table.get((context, token), 0) + 1
            counted, pending = counted + chunk, []
    return nll, mass


@pytest.mark.parametrize(
    ("pieces", "ranks", "chunk"), [(1, 1, 60), (3, 1, 60), (1, 2, 100), (5, 2, 100), (2, 4, 100), (2, 8, 100)]
)
def test_equals_a_slow_version(pieces: int, ranks: int, chunk: int) -> None:
    rng = np.random.default_rng(0)
    tokens, logits = rng.integers(0, VOCAB, 302), rng.normal(0, 2, (300, VOCAB))
    expected, expected_mass = slow(logits, tokens.tolist(), chunk, batch=16, warm=100, ranks=ranks)
    state = published.start(VOCAB, ranks=ranks, buckets=BUCKETS, batch_tokens=16, warm_tokens=100)
    token_N, rows_NV = torch.from_numpy(tokens), torch.from_numpy(logits)
    history_N2 = torch.stack([token_N[:-2], token_N[1:-1]], 1)
    nll, mass = [], []
    for start in range(0, 300, chunk):
        published.open_chunk(state, chunk)
        step = chunk // pieces
        for a in range(start, start + chunk, step):
            here = slice(a, a + step)
            part = published.score(state, rows_NV[here], history_N2[here], token_N[2:][here])
            nll.append(part[0])
            mass.append(part[1])
        counted = slice(start, start + chunk)
        published.count(state, history_N2[counted], token_N[2:][counted])
    np.testing.assert_allclose(torch.cat(nll), expected, rtol=1e-5)
    np.testing.assert_allclose(torch.cat(mass), expected_mass, rtol=1e-5)
    first = -(-100 // chunk) * chunk
    assert torch.cat(mass)[:first].eq(1).all() and torch.cat(mass)[first:].max() > 1


def test_an_unseen_context_s_row_adds_up_to_less_than_one() -> None:
    """As published: 10.24 / 11.24 of 1,024 tokens."""
    state = published.start(1024, buckets=BUCKETS)
    history, every = torch.zeros(1024, 2, dtype=torch.long), torch.arange(1024)
    loss, mass = published.losses(state, torch.zeros(1024, 1024), history, every)
    total = loss[:, EXPERTS.index("trigram")].neg().exp().sum()
    assert total == pytest.approx(0.911, abs=1e-3) and torch.allclose(mass[:, EXPERTS.index("trigram")], total)


def test_every_rank_moves_weights_of_its_own() -> None:
    """Shares are whole windows; ranks without one keep what they started with."""
    torch.manual_seed(0)
    state = published.start(VOCAB, ranks=8, buckets=BUCKETS, warm_tokens=0)
    published.open_chunk(state, 100)
    assert state.shares == (32, 0, 32, 0, 32, 0, 4)
    published.score(state, torch.randn(100, VOCAB), torch.zeros(100, 2, dtype=torch.long), torch.randint(VOCAB, (100,)))
    moved = (state.log_weights_NK != state.log_weights_NK[0]).any(1)
    assert moved.tolist() == [rank % 2 == 1 for rank in range(8)] and state.shares == (0,)


def test_confidence_about_nothing_scores_well() -> None:
    """Rows sure of a random token: wrong ten times of eleven, and yet the rule reports almost no loss."""
    torch.manual_seed(0)
    size = 4096
    token_B, guess_B = torch.randint(VOCAB, (size,)), torch.randint(VOCAB, (size,))
    rows_BV = 50.0 * torch.nn.functional.one_hot(guess_B, VOCAB)
    state = published.start(VOCAB, buckets=BUCKETS, batch_tokens=64, warm_tokens=0)
    published.open_chunk(state, size)
    nll_B, mass_B = published.score(state, rows_BV, torch.zeros(size, 2, dtype=torch.long), token_B)
    assert nll_B[-64:].mean() < 0.05
    assert mass_B[-64:].min() > 0.95 * VOCAB
    # Divided by its mass, the same "row" is worth no more than a uniform guess.
    assert (nll_B + mass_B.log())[-64:].mean() > 0.95 * math.log(VOCAB)
