"""Scorers for `hedgemix audit --scorer examples.scorers:NAME --tokens FILE`: one that is valid, two that are not."""

from __future__ import annotations

import math

import numpy as np


class Bigram:
    """Valid: counts of what followed the last token so far, behind a little of everything."""

    def __init__(self, tokens: np.ndarray, vocab_size: int = 1024) -> None:
        self.last = int(tokens[0])
        self.counts = np.full((vocab_size, vocab_size), 0.01)
        self.total = 0.0

    def predict(self) -> np.ndarray:
        row = self.counts[self.last]
        return row / row.sum()

    def update(self, token: int) -> None:
        self.total -= math.log(self.predict()[token])
        self.counts[self.last, token] += 1
        self.last = token

    def nats(self) -> float:
        return self.total


class EntropyExpert(Bigram):
    """Invalid: mixes in an "expert" that gives whatever occurs the probability exp(-H), H the entropy of the row.

    Over the vocabulary that adds up to V * exp(-H). The surer the row, the lower the reported loss, right or wrong.
    """

    def predict(self) -> np.ndarray:
        row = super().predict()
        entropy = -(row * np.log(row)).sum()
        return 0.5 * row + 0.5 * math.exp(-entropy)


class TwoPass(Bigram):
    """Invalid where it is given the whole text (--whole-text): counts it first, then scores it. Its rows are
    distributions that know the future."""

    def __init__(self, tokens: np.ndarray, vocab_size: int = 1024) -> None:
        super().__init__(tokens, vocab_size)
        np.add.at(self.counts, (tokens[:-1], tokens[1:]), 1)
