"""Contexts found in a memory by narrowing, against looking at every place of it."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.experts import memory_lookup
from hedgemix.experts.memory_lookup import MemoryLookup

tokens = st.lists(st.integers(0, 2), max_size=50)


@settings(max_examples=200, deadline=None)
@given(tokens, tokens, st.integers(0, 6))
def test_contexts_are_where_they_occurred(memory: list[int], context: list[int], depth: int) -> None:
    lookup = MemoryLookup(np.array(memory, np.uint16), 3, depth)
    found = list(lookup.ranges(context))
    for n in range(1, min(depth, len(context)) + 1):
        places = [t for t in range(n, len(memory)) if memory[t - n : t] == context[-n:]]
        assert (n <= len(found)) == bool(places)
        if places:
            assert lookup.followers(found[n - 1]) == Counter(memory[t] for t in places)
            assert lookup.latest(found[n - 1]) == places[-1]
    assert len(found) <= min(depth, len(context))


@settings(max_examples=100, deadline=None)
@given(tokens, tokens, st.integers(1, 3), st.sampled_from([0, memory_lookup.FEW_PLACES]))
def test_followers_count_once_for_each_content_farther_back(
    memory: list[int], context: list[int], longer: int, few: int
) -> None:
    """Of few places and of many; a context that the memory begins with has a content of its own there."""
    depth = 4
    lookup = MemoryLookup(np.array(memory, np.uint16), 3, depth)
    with patch.object(memory_lookup, "FEW_PLACES", few):
        for n, found in enumerate(lookup.ranges(context)[: depth - longer], 1):
            padded = [3] * depth + memory
            contents = {
                (*padded[t + depth - n - longer : t + depth], memory[t])
                for t in range(len(memory))
                if padded[t + depth - n : t + depth] == context[-n:]
            }
            counted = lookup.followers(found, range(n + 1, n + 1 + longer))
            assert counted == Counter(content[-1] for content in contents)
            assert lookup.followers(found) == Counter(
                memory[t] for t in range(len(memory)) if padded[t + depth - n : t + depth] == context[-n:]
            )


def test_the_largest_vocabulary_has_a_token_more() -> None:
    memory = np.array([65535, 0, 65535, 0, 7], np.uint16)
    lookup = MemoryLookup(memory, 65536, 3)
    assert [lookup.followers(found) for found in lookup.ranges([65535, 0])] == [{65535: 1, 7: 1}] * 2
    assert not list(MemoryLookup(memory[:1], 65536, 3).ranges([65535]))


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"the memory has tokens outside 0\.\.3"):
        MemoryLookup(np.array([1, 4]), 4, 2)
