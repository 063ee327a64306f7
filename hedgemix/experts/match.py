"""The longest-match expert: where the text repeats itself, the token that followed last time.

Of the match lengths, the longest m whose last m tokens occurred before wins; their most recent occurrence predicts the
token that followed it, with the share of tokens that matches of this length got right so far as confidence. Equality is
exact, without hashing: m-grams are told apart by labels of the two shorter ones that they consist of (prefix doubling,
Karp, Miller and Rosenberg 1972), with no loop over tokens; see `sorted_ngrams`. Whether two grams are equal depends on
their m tokens alone (tests change the future, bitwise).

`match_online` is the same expert for a decoder, one token after another.

Shapes: N tokens of the text, B positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hedgemix.experts import sorted_ngrams

PRIOR_HITS, PRIOR_TRIES = 0.5, 1.0
_COLUMNS = ("predicted_N", "class_N", "tries_N", "hits_N")


@dataclass(frozen=True)
class MatchIndex:
    """Holds what the expert says at every position of a text. All arrays int32."""

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
    """Compute the probability given to the predicted token, below 1, for integers or arrays of them."""
    return (hits + PRIOR_HITS) / (tries + PRIOR_TRIES)


def start(total: int, lengths: tuple[int, ...], arrays: sorted_ngrams.Arrays) -> MatchIndex:
    """Begin an index in which nothing matches yet; `ngram_index.build` fills it in beside its pairs."""
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


def rows(index: MatchIndex, top_BV: Tensor, start: int, stop: int) -> Tensor:
    """Make probability rows (B, V), of the type of the top n-gram expert's rows, of positions start..stop-1."""
    here = slice(start, stop)
    share = confidence(np.asarray(index.hits_N[here]), np.asarray(index.tries_N[here])).astype(np.float32)
    predicted_B = torch.from_numpy(index.predicted_N[here].astype(np.int64))
    return lean(top_BV, predicted_B, torch.from_numpy(share))


def lean(top_BV: Tensor, predicted_B: Tensor, confidence_B: Tensor) -> Tensor:
    """Make rows (B, V) of (1 - c) times the top n-gram expert's row, and c on the predicted token.

    `predicted_B` int64, `confidence_B` of the rows' type; where nothing is predicted (-1) the row stays what it is.
    """
    share_B1 = torch.where(predicted_B >= 0, confidence_B, 0.0)[:, None]
    return (top_BV * (1 - share_B1)).scatter_add_(1, predicted_B.clamp_min(0)[:, None], share_B1)


def load(folder: Path, lengths: tuple[int, ...]) -> MatchIndex:
    """Map the arrays that `start` made in a folder, read only."""
    columns = (np.load(folder / f"match_{name}.npy", mmap_mode="r", allow_pickle=False) for name in _COLUMNS)
    return MatchIndex(lengths, *columns)
