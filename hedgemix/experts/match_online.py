"""The expert of `match`, one token after another: what a decoder, which knows only earlier tokens, can keep."""

from __future__ import annotations

from array import array

import numpy as np

from hedgemix.experts import ngram_index
from hedgemix.experts.match import confidence
from hedgemix.experts.memory_lookup import MemoryLookup
from hedgemix.validate import check_match_lengths


class OnlineMatch:
    """Finds the longest match of the tokens so far; memory grows with every token and length."""

    def __init__(self, lengths: tuple[int, ...], vocab_size: int, memory: MemoryLookup | None = None) -> None:
        """Begin before the first token, or behind those of a memory, which is as deep as the lengths ask. Raises
        RecipeError as `check_match_lengths` does."""
        check_match_lengths(lengths)
        self.lengths, self.vocab_size = lengths, vocab_size
        self.memory = memory or MemoryLookup(np.zeros(0, np.uint16), vocab_size, 0)
        before = ngram_index.build(self.memory.tokens_M, (1,), vocab_size, lengths).match
        classes = (before.class_N, before.class_N[before.predicted_N == self.memory.tokens_M])
        self.tries, self.hits = (np.bincount(each, minlength=1 + len(lengths))[1:].tolist() for each in classes)
        self._history = array("i", self.memory.tokens_M.tolist())
        self._next: list[dict[bytes, int]] = [{} for _ in lengths]
        """For each length, behind which position of the text, or its beginning, the last tokens were seen last."""
        self._follow()

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
        self._follow()

    def _follow(self) -> None:
        """Find the longest match of the tokens so far, and note where they stand."""
        history, now = self._history, len(self._history)
        self._predicted, self._class = -1, 0
        found = self.memory.ranges(history[-self.memory.depth :].tolist()) if self.memory.depth else []
        for at, m in enumerate(self.lengths):
            if m > now:
                break
            key = history[-m:].tobytes()
            source = self._next[at].get(key)
            if source is None and m <= len(found):
                source = self.memory.latest(found[m - 1])
            if source is not None:
                self._predicted, self._class = history[source], at + 1
            self._next[at][key] = now
