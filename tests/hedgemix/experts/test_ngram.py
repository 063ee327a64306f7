"""N-gram rows against a sequential table of counters, and against their own past."""

from __future__ import annotations

import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.data.shards import TokenStream
from hedgemix.experts import ngram, sorted_ngrams

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
    index = ngram.build_index(tokens, orders, vocab)
    state = ngram.start_state(index)
    parts = []
    for start in range(0, len(tokens), block):
        stop = min(start + block, len(tokens))
        parts.append(torch.stack(ngram.rows(state, index, start, stop)))
        ngram.advance(state, index, start, stop)
    return torch.cat(parts, dim=1)


@settings(max_examples=60, deadline=None)
@given(streams | repetitive, order_sets, st.sampled_from([1, 3, 16, 100]))
def test_rows_equal_a_sequential_table(tokens: np.ndarray, orders: tuple[int, ...], block: int) -> None:
    rows = rows_in_blocks(tokens, orders, block).double().numpy()
    np.testing.assert_allclose(rows, sequential_rows(tokens, orders, VOCAB), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-6)


def contents(index: ngram.NgramIndex) -> dict[str, np.ndarray]:
    """Every array of an index."""
    tables = {f"order{n}_{name}": value for n, table in index.tables.items() for name, value in vars(table).items()}
    matches = {name: value for name, value in vars(index.match).items() if name != "lengths"}
    return {"tokens_N": index.tokens_N, **tables, **matches}


def assert_same(one: ngram.NgramIndex, other: ngram.NgramIndex) -> None:
    mine, theirs = contents(one), contents(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype and np.array_equal(value, theirs[name]), name


@settings(max_examples=60, deadline=None)
@given(streams | repetitive, order_sets, st.sampled_from([(), (1, 3), (2, 5, 13)]), st.integers(1, 30))
def test_partitions_change_nothing_bitwise(
    tokens: np.ndarray, orders: tuple[int, ...], lengths: tuple[int, ...], positions: int
) -> None:
    """However few positions are sorted at once, down to one, where every repeated gram is larger than a block."""
    whole = ngram.build_index(tokens, orders, VOCAB, lengths)
    assert_same(
        whole, ngram.build_index(tokens, orders, VOCAB, lengths, None, positions * sorted_ngrams.POSITION_BYTES)
    )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_pairs_are_numbered_by_context_then_by_age(text: np.ndarray, n: int) -> None:
    """The whole table, from dicts: the rows need this numbering, and files of two builds must agree."""
    table = ngram.build_index(text, (1, n), 50).tables[n]
    seen: dict[tuple[int, ...], dict[int, int]] = {}
    grams_of = [tuple(text[t - n + 1 : t].tolist()) for t in range(n - 1, len(text))]
    for context, token in zip(grams_of, text[n - 1 :].tolist(), strict=True):
        seen.setdefault(context, {}).setdefault(token, len(seen[context]))
    ordered, before = sorted(seen), 0
    first = {context: (before, before := before + len(seen[context]))[0] for context in ordered}
    assert table.token_P.tolist() == [token for context in ordered for token in seen[context]]
    counts: Counter[tuple[int, ...]] = Counter()
    followers: dict[tuple[int, ...], set[int]] = defaultdict(set)
    assert table.pair_N[: n - 1].tolist() == [-1] * (n - 1)
    for t, (context, token) in enumerate(zip(grams_of, text[n - 1 :].tolist(), strict=True), start=n - 1):
        assert table.first_N[t] == first[context] and table.pair_N[t] == first[context] + seen[context][token]
        assert (table.count_N[t], table.distinct_N[t]) == (counts[context], len(followers[context]))
        counts[context] += 1
        followers[context].add(token)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.zipf(1.3, 1500) % 50).astype(np.uint16)


def test_a_large_vocabulary_changes_no_pair(text: np.ndarray) -> None:
    """Keys of six tokens out of 60,000 would not fit 64 bits; contexts are numbered instead."""
    small, large = (ngram.build_index(text, (1, 2, 4, 6), vocab, (7, 9)) for vocab in (50, 60_000))
    assert_same(small, large)


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


def test_longest_class(text: np.ndarray) -> None:
    index = ngram.build_index(text, (1, 2, 4), 50, (5, 7))
    longest = ngram.longest_class(index, 0, len(text))
    assert set(longest.tolist()) >= set(range(4))
    for t in range(0, len(text), 7):
        expected = 0
        for number, context in enumerate((1, 3, 5, 7), start=1):  # tokens of the context
            grams = {tuple(text[i : i + context]) for i in range(t - context)}
            if t >= context and tuple(text[t - context : t]) in grams:
                expected = number
        assert longest[t] == expected


def test_a_folder_holds_what_memory_does(text: np.ndarray, tmp_path: Path) -> None:
    index = ngram.build_index(text, (1, 2, 3), 50, (4, 6))
    ngram.build_index(TokenStream([text[:700], text[700:]]), (1, 2, 3), 50, (4, 6), tmp_path / "index")
    loaded = ngram.load(tmp_path / "index")
    assert loaded.orders == index.orders and isinstance(loaded.tables[3].pair_N, np.memmap)
    assert loaded.match.lengths == (4, 6) and isinstance(loaded.match.class_N, np.memmap)
    assert_same(index, loaded)
    assert not [path for path in (tmp_path / "index").iterdir() if path.suffix not in (".npy", ".json")]
    state, other = ngram.start_state(index), ngram.start_state(loaded)
    for a, b in ((0, 400), (400, 600)):
        assert all(map(torch.equal, ngram.rows(state, index, a, b), ngram.rows(other, loaded, a, b)))
        ngram.advance(state, index, a, b)
        ngram.advance(other, loaded, a, b)


def test_an_index_in_a_folder_takes_no_memory_of_the_texts_length(tmp_path: Path) -> None:
    """NumPy tells tracemalloc what it allocates; mapped files are none. Measured 0.83 MB, with twice the tokens too."""
    stream = TokenStream([np.random.default_rng(0).integers(0, 256, 200_000).astype(np.uint16)])
    folder = tmp_path / "index"
    tracemalloc.start()
    ngram.build_index(stream, (1, 2, 3, 4), 256, (6, 8), folder, 1 << 20)
    ngram.start_state(ngram.load(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in folder.iterdir()) > 12e6
    assert peak < 1.2e6


def test_what_cannot_work_says_so(text: np.ndarray) -> None:
    for orders, vocab in (((1, 7), 50), ((), 50), ((2, 1), 50), ((1, 2), 20)):
        with pytest.raises(RecipeError):
            ngram.build_index(text, orders, vocab)
    index = ngram.build_index(text, (1, 2), 50)
    state = ngram.start_state(index)
    with pytest.raises(ValueError, match="stand at 0"):
        ngram.rows(state, index, 5, 9)
    with pytest.raises(ValueError, match="stand at 0"):
        ngram.advance(state, index, 5, 9)
