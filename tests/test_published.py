"""The published rule against a slow version, and the reason why it is no code length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hedgemix import published

VOCAB, BUCKETS = 11, 97


def slow(logits: np.ndarray, tokens: list[int], chunk: int, batch: int, warm: int) -> tuple[list[float], list[float]]:
    """One token and one chunk at a time, with dictionaries; position t is scored from row t - 2."""
    counts: list[dict[tuple[int, int], int]] = [{}, {}, {}]
    logw, losses, nll, mass = [2.0, 0, 0, 0, 0], [], [], []
    counted, pending = 0, []
    for t in range(2, len(tokens)):
        y, contexts = tokens[t], (0, tokens[t - 1], ((36313 * tokens[t - 2]) ^ (27191 * tokens[t - 1])) % BUCKETS)
        p = np.exp(logits[t - 2]) / np.exp(logits[t - 2]).sum()
        heat = min(max(1 - 0.02 * (1 + (p * np.log(p)).sum() / math.log(VOCAB)), 0.9), 1.05)
        p = p ** (1 / heat) / (p ** (1 / heat)).sum()
        entropy = -(p * np.log(p)).sum()
        experts, total = [p[y]], 1.0
        for table, context, plus in zip(counts, contexts, (0.1, 0.1, 0.01), strict=True):
            seen = [table.get((context, w), 0) + plus for w in range(VOCAB)]
            experts.append(seen[y] / sum(seen))
        experts.append(math.exp(-entropy))
        if counted < warm:
            nll.append(-math.log(p[y]))
        else:
            w = np.exp(logw) / np.exp(logw).sum()
            nll.append(-math.log(float(w @ np.array(experts))))
            total = float(w[:4].sum() + w[4] * VOCAB * math.exp(-entropy))
            losses.append([-math.log(e) for e in experts])
            if len(losses) == batch:
                logw, losses = list(np.array(logw) - 0.1 * np.mean(losses, axis=0)), []
        mass.append(total)
        pending.append((contexts, y))
        if len(pending) == chunk:
            for seen_contexts, token in pending:
                for table, context in zip(counts, seen_contexts, strict=True):
                    table[context, token] = table.get((context, token), 0) + 1
            counted, pending = counted + chunk, []
    return nll, mass


@pytest.mark.parametrize("pieces", [1, 3])
def test_equals_a_slow_version(pieces: int) -> None:
    rng = np.random.default_rng(0)
    tokens, logits = rng.integers(0, VOCAB, 302), rng.normal(0, 2, (300, VOCAB))
    expected, expected_mass = slow(logits, tokens.tolist(), chunk=60, batch=16, warm=100)
    state = published.start(VOCAB, buckets=BUCKETS)
    token_N, rows_NV = torch.from_numpy(tokens), torch.from_numpy(logits)
    history_N2 = torch.stack([token_N[:-2], token_N[1:-1]], 1)
    nll, mass = [], []
    for start in range(0, 300, 60):
        step = 60 // pieces
        for a in range(start, start + 60, step):
            here = slice(a, a + step)
            part = published.score(state, rows_NV[here], history_N2[here], token_N[2:][here], 16, 100)
            nll.append(part[0])
            mass.append(part[1])
        chunk = slice(start, start + 60)
        published.count(state, history_N2[chunk], token_N[2:][chunk])
    np.testing.assert_allclose(torch.cat(nll), expected, rtol=1e-5)
    np.testing.assert_allclose(torch.cat(mass), expected_mass, rtol=1e-5)
    assert torch.cat(mass)[:120].eq(1).all() and torch.cat(mass)[120:].max() > 1


def test_confidence_about_nothing_scores_well() -> None:
    """Rows sure of a random token: wrong ten times of eleven, and yet the rule reports almost no loss."""
    torch.manual_seed(0)
    size = 4096
    token_B, guess_B = torch.randint(VOCAB, (size,)), torch.randint(VOCAB, (size,))
    rows_BV = 50.0 * torch.nn.functional.one_hot(guess_B, VOCAB)
    state = published.start(VOCAB, buckets=BUCKETS)
    nll_B, mass_B = published.score(state, rows_BV, torch.zeros(size, 2, dtype=torch.long), token_B, 64, warm_tokens=0)
    assert nll_B[-64:].mean() < 0.05
    assert mass_B[-64:].min() > 0.95 * VOCAB
    # Divided by its mass, the same "row" is worth no more than a uniform guess.
    assert (nll_B + mass_B.log())[-64:].mean() > 0.95 * math.log(VOCAB)
