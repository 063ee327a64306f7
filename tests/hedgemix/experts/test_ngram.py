"""N-gram rows against a sequential table of counters, and against their own past."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.experts import ngram_index
from hedgemix.experts.ngram import NgramRows

VOCAB = 7
streams = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60).map(np.array)
repetitive = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(2, 12)).map(
    lambda pair: np.tile(pair[0], pair[1])
)
order_sets = st.sampled_from([(1,), (1, 2, 3), (2, 4), (1, 2, 3, 6)])


def sequential_rows(tokens: np.ndarray, orders: tuple[int, ...], vocab: int) -> np.ndarray:
    """Witten-Bell rows (orders, N, V), one token and one counter at a time."""
    tables: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    out = np.zeros((len(orders), len(tokens), vocab))
    for t, token in enumerate(tokens.tolist()):
        row = np.full(vocab, 1 / vocab)
        for n in sorted({1, *orders}):
            if t < n - 1:
                context = None
            else:
                context = (n, *tokens[t - n + 1 : t].tolist())
                seen = tables[context]
                if seen:
                    counts = np.array([seen[w] for w in range(vocab)])
                    row = (counts + len(seen) * row) / (counts.sum() + len(seen))
            if n in orders:
                out[orders.index(n), t] = row
            if context:
                tables[context][token] += 1
    return out


def rows_in_blocks(tokens: np.ndarray, orders: tuple[int, ...], block: int, vocab: int = VOCAB) -> torch.Tensor:
    ngrams, parts = NgramRows(ngram_index.build(tokens, orders, vocab)), []
    for start in range(0, len(tokens), block):
        stop = min(start + block, len(tokens))
        parts.append(torch.stack(ngrams.rows(start, stop)))
        ngrams.advance(stop)
    return torch.cat(parts, dim=1)


@settings(max_examples=60, deadline=None)
@given(streams | repetitive, order_sets, st.sampled_from([1, 3, 16, 100]))
def test_rows_equal_a_sequential_table(tokens: np.ndarray, orders: tuple[int, ...], block: int) -> None:
    rows = rows_in_blocks(tokens, orders, block).double().numpy()
    np.testing.assert_allclose(rows, sequential_rows(tokens, orders, VOCAB), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-6)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.zipf(1.3, 1500) % 50).astype(np.uint16)


def test_rows_of_a_longer_text(text: np.ndarray) -> None:
    rows = rows_in_blocks(text, (1, 2, 3, 4), 256, 50).double().numpy()
    np.testing.assert_allclose(rows, sequential_rows(text, (1, 2, 3, 4), 50), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("block", [1, 17, 256])
def test_blocks_do_not_matter_bitwise(text: np.ndarray, block: int) -> None:
    assert torch.equal(rows_in_blocks(text, (1, 2, 3), block, 50), rows_in_blocks(text, (1, 2, 3), len(text), 50))


@pytest.mark.parametrize("t", [1, 2, 300, 511, 512])
def test_the_future_changes_no_row(text: np.ndarray, t: int) -> None:
    changed = text.copy()
    changed[t:] = np.random.default_rng(1).integers(0, 50, len(text) - t)
    before, after = (rows_in_blocks(tokens, (1, 2, 3), 256, 50) for tokens in (text, changed))
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


def test_what_cannot_work_says_so(text: np.ndarray) -> None:
    ngrams = NgramRows(ngram_index.build(text, (1, 2), 50))
    with pytest.raises(ValueError, match="stand at 0"):
        ngrams.rows(5, 9)
    ngrams.advance(9)
    with pytest.raises(ValueError, match="stand at 9"):
        ngrams.advance(8)
