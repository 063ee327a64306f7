"""The match found one token after another against that of the whole text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.experts import match, ngram_index
from hedgemix.experts.match_online import OnlineMatch
from hedgemix.experts.memory_lookup import MemoryLookup
from support.text_data import repetitive_tokens

memories = st.lists(st.integers(0, 2), max_size=40)
streams = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@pytest.mark.parametrize("name", ["small alphabet", "skewed", "real"])
def test_every_prediction_is_the_batchs_exactly(name: str) -> None:
    tokens, lengths = repetitive_tokens()[name].astype(np.uint16), (2, 5, 8, 24)
    index, online = ngram_index.build(tokens, (1,), 512, lengths).match, OnlineMatch(lengths, 512)
    share = match.confidence(index.hits_N, index.tries_N).astype(np.float32)
    for t, token in enumerate(tokens.tolist()):
        known = index.class_N[t] > 0
        assert online.predict() == (index.predicted_N[t], index.class_N[t], share[t] if known else 0.0), t
        online.update(token)
    assert set(index.class_N.tolist()) >= (set(range(5)) if name == "real" else {0, 1, 2})


@settings(max_examples=60, deadline=None)
@given(memories, streams, st.sampled_from([(1, 2), (2, 3, 7), (5,)]))
def test_behind_a_memory_too(memory: list[int], tokens: list[int], lengths: tuple[int, ...]) -> None:
    """As the batch, and as one that was told the memory's tokens first."""
    before_M = np.array(memory, np.uint16)
    index = ngram_index.build(np.array(tokens), (1,), 3, lengths, memory_M=before_M).match
    share = match.confidence(index.hits_N, index.tries_N).astype(np.float32)
    online, told = OnlineMatch(lengths, 3, MemoryLookup(before_M, 3, lengths[-1])), OnlineMatch(lengths, 3)
    for token in memory:
        told.update(token)
    for t, token in enumerate(tokens):
        known = index.class_N[t] > 0
        assert online.predict() == (index.predicted_N[t], index.class_N[t], share[t] if known else 0.0)
        assert online.predict() == told.predict()
        online.update(token)
        told.update(token)


def test_what_cannot_work_says_so() -> None:
    with pytest.raises(RecipeError, match="match_lengths"):
        OnlineMatch((8, 4), 4)
    with pytest.raises(ValueError, match="outside"):
        OnlineMatch((1,), 4).update(4)
