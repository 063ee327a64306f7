"""Counts that grow a token at a time against the index of the whole text."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.data import tokenizer
from hedgemix.experts import ngram_index, ngram_online
from hedgemix.experts.memory_lookup import MemoryLookup
from hedgemix.experts.ngram import NgramRows
from hedgemix.experts.ngram_online import OnlineNgram
from support.text_data import documents, processor

memories = st.lists(st.integers(0, 3), max_size=40)
streams = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def predicted(online: OnlineNgram) -> torch.Tensor:
    """The rows of the next token, (orders, V)."""
    rows_KV = torch.full((len(online.orders), online.vocab_size), torch.nan)
    online.predict(rows_KV.numpy())
    return rows_KV


@pytest.mark.parametrize("orders", [(1, 2, 3, 4), (1,), (2, 3), (3, 6)])
@pytest.mark.parametrize("source", ["text", "noise"])
def test_rows_are_those_of_the_index_bitwise(source: str, orders: tuple[int, ...]) -> None:
    if source == "text":
        tokens, vocab_size = np.array(tokenizer.encode(processor(), documents()[3][:900])), processor().vocab_size()
    else:
        tokens, vocab_size = np.random.default_rng(0).integers(0, 3, 200), 4
    index = ngram_index.build(tokens, orders, vocab_size)
    batch, online = NgramRows(index, 0.6), OnlineNgram(orders, vocab_size, 0.6)
    longest = ngram_index.longest_class(index, 0, len(tokens))
    for t, token in enumerate(tokens.tolist()):
        for row, expected in zip(predicted(online), batch.rows(t, t + 1), strict=True):
            assert torch.equal(row, expected[0])
        assert online.longest_class() == longest[t]
        online.update(token)
        batch.advance(t + 1)


@settings(max_examples=40, deadline=None)
@given(memories, streams, st.sampled_from([(1,), (1, 2, 3, 4), (2, 6)]), st.sampled_from([(6, 32), (0, 0), (0, 9)]))
def test_behind_a_memory_too(
    memory: list[int], tokens: list[int], orders: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    """Also where what a context adds to a row is kept as arrays, and made anew once it changed."""
    with patch.multiple(ngram_online, FEW_TOKENS=sizes[0], MANY_TOKENS=sizes[1]):
        compare_behind(memory, tokens, orders)


def compare_behind(memory: list[int], tokens: list[int], orders: tuple[int, ...]) -> None:
    before_M, text = np.array(memory, np.uint16), np.array(tokens)
    index = ngram_index.build(text, orders, 4, memory_M=before_M)
    batch, online = NgramRows(index, 0.6), OnlineNgram(orders, 4, 0.6, MemoryLookup(before_M, 4, orders[-1] - 1))
    told = OnlineNgram(orders, 4, 0.6)
    for token in memory:
        told.update(token)
    longest = ngram_index.longest_class(index, 0, len(text))
    for t, token in enumerate(tokens):
        for row, expected, slow in zip(predicted(online), batch.rows(t, t + 1), predicted(told), strict=True):
            assert torch.equal(row, expected[0]) and torch.equal(row, slow)
        assert online.longest_class() == longest[t] == told.longest_class()
        for each in (online, told):
            each.update(token)
        batch.advance(t + 1)


def test_orders_are_checked() -> None:
    with pytest.raises(RecipeError, match="orders"):
        OnlineNgram((3, 2), 4, 0.75)
