"""The longest-match expert against a slow search and against its own past."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.experts import match, ngram_index
from support.text_data import repetitive_tokens

LENGTHS = (1, 3, 4, 9)
streams = st.lists(st.integers(0, 3), max_size=80).map(lambda tokens: np.array(tokens, np.uint16))
repetitive = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=15), st.integers(2, 6)).map(
    lambda pair: np.tile(np.array(pair[0], np.uint16), pair[1])
)
length_sets = st.sampled_from([(), (1,), LENGTHS, (2, 5), (7, 8, 33)])


def build(tokens: np.ndarray, lengths: tuple[int, ...], vocab_size: int) -> match.MatchIndex:
    return ngram_index.build(tokens, (1,), vocab_size, lengths).match


def searched(tokens: list[int], lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Predicted token and class at every position, by looking at every earlier position."""
    out = []
    for t in range(len(tokens)):
        found = (-1, 0)
        for number, m in enumerate(lengths, start=1):
            for s in range(t - 1, m - 1, -1) if t >= m else ():
                if tokens[s - m : s] == tokens[t - m : t]:
                    found = (tokens[s], number)
                    break
        out.append(found)
    return out


@settings(max_examples=80, deadline=None)
@given(streams | repetitive, length_sets)
def test_matches_equal_a_slow_search(tokens: np.ndarray, lengths: tuple[int, ...]) -> None:
    index, expected = build(tokens, lengths, 4), searched(tokens.tolist(), lengths)
    assert list(zip(index.predicted_N.tolist(), index.class_N.tolist(), strict=True)) == expected
    tries, hits = [0] * (len(lengths) + 1), [0] * (len(lengths) + 1)
    for t, (predicted, number) in enumerate(expected):
        if number:
            assert (index.tries_N[t], index.hits_N[t]) == (tries[number], hits[number])
            tries[number] += 1
            hits[number] += predicted == tokens[t]


@pytest.mark.parametrize("t", [1, 2, 300, 999])
def test_the_target_and_the_future_change_nothing(t: int) -> None:
    text = repetitive_tokens()["small alphabet"][:1000]
    changed = text.copy()
    changed[t:] = (changed[t:] + 1 + np.arange(1000 - t) % 2) % 3
    before, after = (build(tokens, LENGTHS, 3) for tokens in (text, changed))
    top = torch.rand(1000, 3, generator=torch.manual_seed(0)).softmax(-1)
    rows, other = (match.rows(index, top, 0, 1000) for index in (before, after))
    assert torch.equal(rows[: t + 1], other[: t + 1])
    assert t == 999 or not torch.equal(rows[t + 1 :], other[t + 1 :])


def test_rows_sum_to_one_and_predict() -> None:
    text = repetitive_tokens()["real"].astype(np.uint16)
    index = build(text, (8, 16), 512)
    top = torch.randn(len(text), 512, generator=torch.manual_seed(0)).softmax(-1)
    rows = match.rows(index, top, 0, len(text))
    torch.testing.assert_close(rows.double().sum(1), torch.ones(len(text), dtype=torch.float64), rtol=0, atol=1e-5)
    none = torch.from_numpy(index.class_N == 0)
    assert torch.equal(rows[none], top[none]) and 0 < none.sum() < len(text)
    copied = torch.arange(3200, 3900)  # inside the first repetition
    predicted = torch.from_numpy(text[copied].astype(np.int64))
    assert (rows[copied, predicted] > 0.9).double().mean() > 0.9
    assert torch.equal(match.rows(index, top[100:300], 100, 300), rows[100:300])


def test_what_cannot_work_says_so() -> None:
    for lengths in ((0,), (8, 4), (4, 4), (5000,)):
        with pytest.raises(RecipeError, match="match_lengths"):
            build(np.zeros(10, np.uint16), lengths, 4)
