"""The longest-match expert: where the text repeats itself, the token that followed last time.

Of the match lengths, the longest m whose last m tokens occurred before wins; their most recent occurrence predicts the
token that followed it, with the share of tokens that matches of this length got right so far as confidence. Equality is
exact, without hashing: m-grams are numbered by sorting pairs of numbers of shorter ones (prefix doubling, Karp, Miller
and Rosenberg 1972), O(N log N) for every length, with no loop over tokens. Numbers depend on the whole text, but only
whether two of them are equal is used, which depends on those m tokens alone (tests change the future, bitwise).

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

from hedgemix.config import RecipeError

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


def check_lengths(lengths: tuple[int, ...]) -> None:
    """Raises RecipeError unless lengths rise from 1 or more to 4096 at most; no length means no expert."""
    if list(lengths) != sorted(set(lengths)) or any(not 1 <= m <= 4096 for m in lengths):
        raise RecipeError(f"evaluate.mixer.match_lengths {lengths}: give rising lengths from 1 to 4096, or none")


def confidence(hits: Any, tries: Any) -> Any:
    """Probability given to the predicted token, below 1, for integers or arrays of them."""
    return (hits + PRIOR_HITS) / (tries + PRIOR_TRIES)


def build(tokens_N: np.ndarray, lengths: tuple[int, ...], vocab_size: int, grams: Grams | None = None) -> MatchIndex:
    """Matches at every position of a text. One or two sorts of the text for each length; `grams` may know some."""
    check_lengths(lengths)
    total = len(tokens_N)
    source_N, class_N = np.full(total, -1, np.int32), np.zeros(total, np.int32)
    grams = grams or Grams(tokens_N, vocab_size)
    for number, m in enumerate(lengths, start=1):
        if m >= total:
            break
        source = grams.previous(m)[: total - m] + m
        found = source >= m
        source_N[m:][found], class_N[m:][found] = source[found], number
    predicted_N = np.where(source_N >= 0, tokens_N[source_N].astype(np.int32), np.int32(-1))
    tries_N, hits_N = np.zeros(total, np.int32), np.zeros(total, np.int32)
    for number in range(1, len(lengths) + 1):
        here = np.flatnonzero(class_N == number)
        hit = (predicted_N[here] == tokens_N[here]).astype(np.int32)
        tries_N[here], hits_N[here] = np.arange(len(here)), np.cumsum(hit) - hit
    return MatchIndex(tuple(lengths), predicted_N, class_N, tries_N, hits_N)


class Grams:
    """Numbers for the m-grams of a text: equal grams have equal numbers."""

    def __init__(self, tokens_N: np.ndarray, vocab_size: int) -> None:
        self.tokens_N, self.vocab_size = tokens_N, vocab_size
        self.numbers: dict[int, np.ndarray] = {}
        self.by_gram: dict[int, np.ndarray] = {}

    def previous(self, m: int) -> np.ndarray:
        """Where each position's m-gram last began before, int32 (N - m + 1,); -1 where it is new."""
        number = self.number(m)
        order = self.by_gram.pop(m) if m in self.by_gram else np.argsort(number, kind="stable")
        again = np.flatnonzero(number[order[1:]] == number[order[:-1]])
        before = np.full(len(number), -1, np.int32)
        before[order[again + 1]] = order[again]
        return before

    def number(self, m: int) -> np.ndarray:
        """Each m-gram's number, int32 (N - m + 1,)."""
        if m in self.numbers:
            return self.numbers[m]
        size = max(len(self.tokens_N) - m + 1, 0)
        if m == 1:
            self.numbers[1] = self.tokens_N.astype(np.int32)
            return self.numbers[1]
        if self.vocab_size**m < 2**63:
            key = np.zeros(size, np.int64)
            for i in range(m):
                key *= self.vocab_size
                key += self.tokens_N[i : i + size]
        else:
            # Two overlapping shorter grams are equal exactly when the long one is.
            part = max((known for known in self.numbers if 2 * known >= m), default=-(-m // 2))
            number = self.number(part)
            key = number[:size] * np.int64(max(len(self.tokens_N), self.vocab_size))
            key += number[m - part : m - part + size]
        order = np.argsort(key, kind="stable")
        self.keep(m, order, np.flatnonzero(np.append(True, key[order[1:]] != key[order[:-1]])[:size]))
        return self.numbers[m]

    def keep(self, m: int, order: np.ndarray, opens: np.ndarray) -> None:
        """Number the m-grams, from their sorted order and where runs of equal ones start in it."""
        numbers = np.empty(len(order), np.int32)
        numbers[order] = np.repeat(np.arange(len(opens), dtype=np.int32), np.diff(opens, append=len(order)))
        self.numbers[m], self.by_gram = numbers, {m: order}


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
    predicted_B = torch.from_numpy(index.predicted_N[here].astype(np.int64)).to(top_BV.device)
    return rows(top_BV, predicted_B, torch.from_numpy(share).to(top_BV.device))


def save(index: MatchIndex, folder: Path) -> None:
    """Write the arrays as plain .npy files."""
    for name in _COLUMNS:
        np.save(folder / f"match_{name}.npy", getattr(index, name))


def load(folder: Path, lengths: tuple[int, ...]) -> MatchIndex:
    """Map what `save` wrote, read only."""
    columns = (np.load(folder / f"match_{name}.npy", mmap_mode="r", allow_pickle=False) for name in _COLUMNS)
    return MatchIndex(lengths, *columns)


class Follower:
    """The expert one token after another; memory grows with every token and length."""

    def __init__(self, lengths: tuple[int, ...], vocab_size: int) -> None:
        check_lengths(lengths)
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
