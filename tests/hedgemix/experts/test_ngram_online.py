"""Counts that grow a token at a time against the index of the whole text."""

import numpy as np
import pytest
import torch

from hedgemix.config import RecipeError
from hedgemix.data import tokenizer
from hedgemix.experts import ngram_index
from hedgemix.experts.ngram import NgramRows
from hedgemix.experts.ngram_online import OnlineNgram
from support.text_data import documents, processor


@pytest.mark.parametrize("orders", [(1, 2, 3, 4), (1,), (2, 3), (3, 6)])
@pytest.mark.parametrize("source", ["text", "noise"])
def test_rows_are_those_of_the_index_bitwise(source: str, orders: tuple[int, ...]) -> None:
    if source == "text":
        tokens, vocab_size = np.array(tokenizer.encode(processor(), documents()[3][:900])), processor().vocab_size()
    else:
        tokens, vocab_size = np.random.default_rng(0).integers(0, 3, 200), 4
    index = ngram_index.build(tokens, orders, vocab_size)
    batch, online = NgramRows(index), OnlineNgram(orders, vocab_size)
    longest = ngram_index.longest_class(index, 0, len(tokens))
    for t, token in enumerate(tokens.tolist()):
        for row, expected in zip(online.predict(), batch.rows(t, t + 1), strict=True):
            assert torch.equal(row, expected[0])
        assert online.longest_class() == longest[t]
        online.update(token)
        batch.advance(t + 1)


def test_orders_are_checked() -> None:
    with pytest.raises(RecipeError, match="orders"):
        OnlineNgram((3, 2), 4)
