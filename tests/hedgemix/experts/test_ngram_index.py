"""The index of n-grams: its pairs from dicts, the same in memory and in files, however little is sorted at once."""

from __future__ import annotations

import json
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.data.shards import TokenStream
from hedgemix.experts import ngram_index, sorted_ngrams
from hedgemix.experts.ngram import NgramRows

VOCAB = 7
streams = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60).map(np.array)
repetitive = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(2, 12)).map(
    lambda pair: np.tile(pair[0], pair[1])
)
order_sets = st.sampled_from([(1,), (1, 2, 3), (2, 4), (1, 2, 3, 6)])


def contents(index: ngram_index.NgramIndex) -> dict[str, np.ndarray]:
    """Every array of an index."""
    tables = {f"order{n}_{name}": value for n, table in index.tables.items() for name, value in vars(table).items()}
    matches = {name: value for name, value in vars(index.match).items() if name != "lengths"}
    return {"tokens_N": index.tokens_N, **tables, **matches}


def assert_same(one: ngram_index.NgramIndex, other: ngram_index.NgramIndex) -> None:
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
    whole = ngram_index.build(tokens, orders, VOCAB, lengths)
    assert_same(
        whole, ngram_index.build(tokens, orders, VOCAB, lengths, None, positions * sorted_ngrams.POSITION_BYTES)
    )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_pairs_are_numbered_by_context_then_by_age(text: np.ndarray, n: int) -> None:
    """The whole table, from dicts: the rows need this numbering, and files of two builds must agree."""
    table = ngram_index.build(text, (1, n), 50).tables[n]
    seen: dict[tuple[int, ...], dict[int, int]] = {}
    grams_of = [tuple(text[t - n + 1 : t].tolist()) for t in range(n - 1, len(text))]
    for context, token in zip(grams_of, text[n - 1 :].tolist(), strict=True):
        seen.setdefault(context, {}).setdefault(token, len(seen[context]))
    ordered, before = sorted(seen), 0
    first = {context: (before, before := before + len(seen[context]))[0] for context in ordered}
    assert table.token_P.tolist() == [token for context in ordered for token in seen[context]]
    followers: dict[tuple[int, ...], set[int]] = defaultdict(set)
    assert table.pair_N[: n - 1].tolist() == [-1] * (n - 1)
    for t, (context, token) in enumerate(zip(grams_of, text[n - 1 :].tolist(), strict=True), start=n - 1):
        assert table.first_N[t] == first[context] and table.pair_N[t] == first[context] + seen[context][token]
        assert table.distinct_N[t] == len(followers[context])
        followers[context].add(token)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.zipf(1.3, 1500) % 50).astype(np.uint16)


def test_a_large_vocabulary_changes_no_pair(text: np.ndarray) -> None:
    """Keys of six tokens out of 60,000 would not fit 64 bits; contexts are numbered instead."""
    small, large = (ngram_index.build(text, (1, 2, 4, 6), vocab, (7, 9)) for vocab in (50, 60_000))
    assert_same(small, large)


def test_longest_class(text: np.ndarray) -> None:
    index = ngram_index.build(text, (1, 2, 4), 50, (5, 7))
    longest = ngram_index.longest_class(index, 0, len(text))
    assert set(longest.tolist()) >= set(range(4))
    for t in range(0, len(text), 7):
        expected = 0
        for number, context in enumerate((1, 3, 5, 7), start=1):  # tokens of the context
            grams = {tuple(text[i : i + context]) for i in range(t - context)}
            if t >= context and tuple(text[t - context : t]) in grams:
                expected = number
        assert longest[t] == expected


def test_a_folder_holds_what_memory_does(text: np.ndarray, tmp_path: Path) -> None:
    index = ngram_index.build(text, (1, 2, 3), 50, (4, 6))
    ngram_index.build(TokenStream([text[:700], text[700:]]), (1, 2, 3), 50, (4, 6), tmp_path / "index")
    loaded = ngram_index.load(tmp_path / "index")
    assert loaded.orders == index.orders and isinstance(loaded.tables[3].pair_N, np.memmap)
    assert loaded.match.lengths == (4, 6) and isinstance(loaded.match.class_N, np.memmap)
    assert_same(index, loaded)
    assert not [path for path in (tmp_path / "index").iterdir() if path.suffix not in (".npy", ".json")]
    ngrams, others = NgramRows(index, 0.75), NgramRows(loaded, 0.75)
    for a, b in ((0, 400), (400, 600)):
        assert all(map(torch.equal, ngrams.rows(a, b), others.rows(a, b)))
        ngrams.advance(b)
        others.advance(b)


@settings(max_examples=60, deadline=None)
@given(streams | repetitive, streams | repetitive, order_sets, st.sampled_from([(), (1, 3), (2, 5, 13)]))
def test_a_text_behind_a_memory_goes_on_from_it(
    memory: np.ndarray, tokens: np.ndarray, orders: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    """Bitwise what an index of both, as one text, says there: pairs, classes, matches and rows."""
    size, both = len(memory), np.concatenate([memory, tokens])
    whole = ngram_index.build(both, orders, VOCAB, lengths)
    index = ngram_index.build(tokens, orders, VOCAB, lengths, memory_M=memory)
    assert index.memory_M.tolist() == memory.tolist()
    for name, value in contents(index).items():
        expected = contents(whole)[name]
        assert np.array_equal(value, expected[size:] if name.endswith("_N") else expected), name
    expected_B = ngram_index.longest_class(whole, size, len(both))
    assert ngram_index.longest_class(index, 0, len(tokens)).tolist() == expected_B.tolist()
    ngrams, others = NgramRows(index, 0.75), NgramRows(whole, 0.75)
    others.advance(size)
    for start in range(0, len(tokens), 16):
        stop = min(start + 16, len(tokens))
        assert all(map(torch.equal, ngrams.rows(start, stop), others.rows(size + start, size + stop)))
        ngrams.advance(stop)
        others.advance(size + stop)


def test_a_memory_in_a_folder(text: np.ndarray, tmp_path: Path) -> None:
    index = ngram_index.build(text[700:], (1, 2, 3), 50, (4, 6), memory_M=text[:700])
    ngram_index.build(TokenStream([text[700:]]), (1, 2, 3), 50, (4, 6), tmp_path / "a", memory_M=text[:700])
    loaded = ngram_index.load(tmp_path / "a")
    assert_same(index, loaded)
    assert np.array_equal(loaded.memory_M, text[:700])
    older = json.loads((tmp_path / "a" / "index.json").read_text())
    del older["memory_tokens"]
    (tmp_path / "a" / "index.json").write_text(json.dumps(older))
    assert np.array_equal(ngram_index.load(tmp_path / "a").tokens_N, text)


def test_an_index_in_a_folder_takes_no_memory_of_the_texts_length(tmp_path: Path) -> None:
    """NumPy tells tracemalloc what it allocates; mapped files are none. Measured 0.83 MB, with twice the tokens too."""
    stream = TokenStream([np.random.default_rng(0).integers(0, 256, 200_000).astype(np.uint16)])
    folder = tmp_path / "index"
    tracemalloc.start()
    ngram_index.build(stream, (1, 2, 3, 4), 256, (6, 8), folder, 1 << 20)
    NgramRows(ngram_index.load(folder), 0.75)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in folder.iterdir()) > 12e6
    assert peak < 1.2e6


def test_what_cannot_work_says_so(text: np.ndarray) -> None:
    for orders, vocab in (((1, 9), 50), ((), 50), ((2, 1), 50), ((1, 2), 20)):
        with pytest.raises(RecipeError):
            ngram_index.build(text, orders, vocab)
