"""The longest-match expert: where the text repeats itself, the token that followed last time.

Of the match lengths, the longest m whose last m tokens occurred before wins; their most recent occurrence predicts the
token that followed it, with the share of tokens that matches of this length got right so far as confidence. Equality is
exact, without hashing: m-grams are told apart by labels of the two shorter ones that they consist of (prefix doubling,
Karp, Miller and Rosenberg 1972), with no loop over tokens; see `sorted_ngrams`. Whether two grams are equal depends on
their m tokens alone (tests change the future, bitwise).

`Follower` is the same expert for a decoder, one token after another.

Shapes: N tokens of the text, B positions, V vocabulary.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hedgemix.experts import sorted_ngrams
from hedgemix.validate import check_match_lengths

PRIOR_HITS, PRIOR_TRIES = 0.5, 1.0
_COLUMNS = ("predicted_N", "class_N", "tries_N", "hits_N")


@dataclass(frozen=True)
class MatchIndex:
    """What the expert says at every position of a text. All arrays int32."""

    lengths: tuple[int, ...]
    predicted_N: np.ndarray
    """The token that followed the match, -1 where there is none."""
    class_N: np.ndarray
    """1 + the place in `lengths` of the longest that matches, 0 where none does."""
    tries_N: np.ndarray
    """How many earlier positions have this class (0 in class 0)."""
    hits_N: np.ndarray
    """At how many of those the prediction came true."""


def confidence(hits: Any, tries: Any) -> Any:
    """Probability given to the predicted token, below 1, for integers or arrays of them."""
    return (hits + PRIOR_HITS) / (tries + PRIOR_TRIES)


def build(tokens_N: np.ndarray, lengths: tuple[int, ...], vocab_size: int) -> MatchIndex:
    """Matches at every position of a text, in memory; `ngram.build_index` finds them beside its pairs."""
    check_match_lengths(lengths)
    found = sorted_ngrams.Grams(tokens_N, vocab_size, sorted_ngrams.Arrays(None))
    index = start(len(tokens_N), lengths, found.arrays)
    for m in lengths:
        found.grow_to(m)
        follow(index, found)
    rate(index, found)
    return index


def start(total: int, lengths: tuple[int, ...], arrays: sorted_ngrams.Arrays) -> MatchIndex:
    """An index in which nothing matches yet."""
    columns = [arrays.result(f"match_{name}", total) for name in _COLUMNS]
    for column, fill in zip(columns, (-1, 0, 0, 0), strict=True):
        column[:] = fill
    return MatchIndex(tuple(lengths), *columns)


def follow(index: MatchIndex, found: sorted_ngrams.Grams) -> None:
    """Enter the matches of the grams' length, if it is one of the index's; lengths must come in rising order."""
    m, total = found.length, len(found.tokens_N)
    if m not in index.lengths:
        return
    number = 1 + index.lengths.index(m)
    for begin, before in found.repeats():
        inside = begin < total - m
        at = begin[inside] + m
        index.predicted_N[at], index.class_N[at] = found.tokens_N[before[inside] + m], number


def rate(index: MatchIndex, found: sorted_ngrams.Grams) -> None:
    """Count each class's tries and hits, once all matches are entered."""
    tries, hits = np.zeros(len(index.lengths) + 1, np.int64), np.zeros(len(index.lengths) + 1, np.int64)
    for span in found.spans(len(found.tokens_N)):
        class_B, hit_B = index.class_N[span], index.predicted_N[span] == found.tokens_N[span]
        for number in range(1, len(index.lengths) + 1):
            here = np.flatnonzero(class_B == number)
            hit = np.cumsum(hit_B[here])
            index.tries_N[span.start + here] = tries[number] + np.arange(len(here))
            index.hits_N[span.start + here] = hits[number] + hit - hit_B[here]
            tries[number] += len(here)
            hits[number] += hit_B[here].sum()


def rows(top_BV: Tensor, predicted_B: Tensor, confidence_B: Tensor) -> Tensor:
    """Probability rows (B, V) of the expert: (1 - c) times the top n-gram expert's row, and c on the predicted token.

    `predicted_B` int64, `confidence_B` of the rows' type; where nothing is predicted (-1) the row stays what it is.
    """
    share_B1 = torch.where(predicted_B >= 0, confidence_B, 0.0)[:, None]
    return (top_BV * (1 - share_B1)).scatter_add_(1, predicted_B.clamp_min(0)[:, None], share_B1)


def rows_at(index: MatchIndex, top_BV: Tensor, start: int, stop: int) -> Tensor:
    """`rows` of the positions start..stop-1 of the text."""
    here = slice(start, stop)
    share = confidence(np.asarray(index.hits_N[here]), np.asarray(index.tries_N[here])).astype(np.float32)
    predicted_B = torch.from_numpy(index.predicted_N[here].astype(np.int64))
    return rows(top_BV, predicted_B, torch.from_numpy(share))


def load(folder: Path, lengths: tuple[int, ...]) -> MatchIndex:
    """Map the arrays that `start` made in a folder, read only."""
    columns = (np.load(folder / f"match_{name}.npy", mmap_mode="r", allow_pickle=False) for name in _COLUMNS)
    return MatchIndex(lengths, *columns)


class Follower:
    """The expert one token after another; memory grows with every token and length."""

    def __init__(self, lengths: tuple[int, ...], vocab_size: int) -> None:
        check_match_lengths(lengths)
        self.lengths, self.vocab_size = lengths, vocab_size
        self.tries, self.hits = [0] * len(lengths), [0] * len(lengths)
        self._history = array("i")
        self._next: list[dict[bytes, int]] = [{} for _ in lengths]
        self._predicted, self._class = -1, 0

    def predict(self) -> tuple[int, int, float]:
        """The predicted token (-1: none), its length class (0: none) and its confidence, a float32 value (none: 0)."""
        if not self._class:
            return -1, 0, 0.0
        at = self._class - 1
        return self._predicted, self._class, float(np.float32(confidence(self.hits[at], self.tries[at])))

    def update(self, token: int) -> None:
        """Take the token that occurred; ValueError outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} outside 0..{self.vocab_size - 1}")
        if self._class:
            self.tries[self._class - 1] += 1
            self.hits[self._class - 1] += token == self._predicted
        self._history.append(token)
        self._predicted, self._class = -1, 0
        for at, m in enumerate(self.lengths):
            if m > len(self._history):
                break
            key = self._history[-m:].tobytes()
            source = self._next[at].get(key)
            if source is not None:
                self._predicted, self._class = self._history[source], at + 1
            self._next[at][key] = len(self._history)
