"""The expert of `match`, one token after another: what a decoder, which knows only earlier tokens, can keep."""

from __future__ import annotations

from array import array

import numpy as np

from hedgemix.experts.match import confidence
from hedgemix.validate import check_match_lengths


class OnlineMatch:
    """Finds the longest match of the tokens so far; memory grows with every token and length."""

    def __init__(self, lengths: tuple[int, ...], vocab_size: int) -> None:
        """Raises RecipeError as `check_match_lengths` does."""
        check_match_lengths(lengths)
        self.lengths, self.vocab_size = lengths, vocab_size
        self.tries, self.hits = [0] * len(lengths), [0] * len(lengths)
        self._history = array("i")
        self._next: list[dict[bytes, int]] = [{} for _ in lengths]
        self._predicted, self._class = -1, 0

    def predict(self) -> tuple[int, int, float]:
        """Predict the next token (-1: none), by which length class (0: none), with which confidence, a float32 value
        (0: none)."""
        if not self._class:
            return -1, 0, 0.0
        at = self._class - 1
        return self._predicted, self._class, float(np.float32(confidence(self.hits[at], self.tries[at])))

    def update(self, token: int) -> None:
        """Take the token that occurred; raises ValueError outside the vocabulary."""
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
