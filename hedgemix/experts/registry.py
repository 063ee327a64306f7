"""Further experts, one token at a time. The evaluation and the decoder call the very same object, so that whatever it
computes can be decoded; docs/experts.md adds one.

An expert is put into `EXPERTS` here, in the library: what a score rests on is counted in its bytes, and an audit or a
decoder is a process of its own that imports nothing else. `evaluate.mixer.experts` names the ones to mix.

Shapes: B positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SUM_TOLERANCE = 1e-4
"""How far a float32 row may be from 1, in sum."""


class Expert(Protocol):
    """What is mixed. It is copied with `copy.deepcopy`, and told a text's tokens in order from the first, each after
    its row was taken. An evaluation that goes on after a stop tells the earlier ones anew, without asking for rows."""

    def row(self) -> Tensor:
        """Probabilities (V,), float32, on the CPU, of the next token: each above 0, their sum 1. Asked again, the same;
        whoever asks copies it before the next `update`."""
        ...

    def update(self, token: int) -> None:
        """Tell the token that `row` was about, or would have been."""
        ...


class Recency:
    """Counts of tokens, and of what followed the last token, that fade with every later token: what this stretch of
    text is about (a cache language model; Kuhn and De Mori 1990). Followers are backed off to recent tokens, and these
    to the counts of the whole text so far."""

    def __init__(
        self, vocab_size: int, memory_tokens: float = 200.0, prior_tokens: float = 100.0, prior_followers: float = 1.0
    ) -> None:
        """memory_tokens: after how many tokens a count has faded to 1/e; the others are weights of what is backed off
        to, in tokens."""
        self.kept = math.exp(-1 / memory_tokens)
        self.prior_tokens, self.prior_followers = prior_tokens, prior_followers
        self.count_V, self.recent_V = torch.ones(vocab_size), torch.zeros(vocab_size)
        self.followers: dict[int, tuple[int, Tensor]] = {}
        """For each token, what followed it, (V,), as it was after so many tokens: it fades when it is looked at."""
        self.told, self.last = 0, -1

    def row(self) -> Tensor:
        p_V = backed_off(self.recent_V, self.count_V / self.count_V.sum(), self.prior_tokens)
        if self.last in self.followers:
            p_V = backed_off(self._after(self.last), p_V, self.prior_followers)
        return p_V

    def update(self, token: int) -> None:
        self.told += 1
        self.count_V[token] += 1
        self.recent_V *= self.kept
        self.recent_V[token] += 1
        if self.last >= 0:
            after_V = self._after(self.last) if self.last in self.followers else torch.zeros_like(self.recent_V)
            after_V[token] += 1
            self.followers[self.last] = self.told, after_V
        self.last = token

    def _after(self, token: int) -> Tensor:
        at, after_V = self.followers[token]
        return after_V * self.kept ** (self.told - at)


def backed_off(count_V: Tensor, p_V: Tensor, prior: float) -> Tensor:
    """The distribution (V,) of counts to which `prior` more are added as p_V says."""
    return (count_V + prior * p_V) / (count_V.sum() + prior)


EXPERTS: dict[str, Callable[[int], Expert]] = {"recency": Recency}
"""How each begins, given the vocabulary's size."""


def start(names: Sequence[str], vocab_size: int) -> dict[str, Expert]:
    """The experts of these names, told nothing yet."""
    return {name: EXPERTS[name](vocab_size) for name in names}


def tell(experts: dict[str, Expert], tokens: Sequence[int]) -> None:
    """Tell every expert these tokens."""
    for expert in experts.values():
        for token in tokens:
            expert.update(token)


def row(name: str, expert: Expert) -> Tensor:
    """A copy of the expert's next row (V,); raises ValueError as `rows` does."""
    return _distribution(name, expert.row().clone())


def rows(experts: dict[str, Expert], tokens_B: np.ndarray, vocab_size: int) -> list[Tensor]:
    """Each expert's rows (B, V) of the next B tokens, which it is told one after another.

    Raises ValueError when a row is no distribution: what is mixed from it would be no code."""
    found = []
    for name, expert in experts.items():
        rows_BV = torch.empty(len(tokens_B), vocab_size)
        for at, token in enumerate(tokens_B.tolist()):
            rows_BV[at] = expert.row()
            expert.update(token)
        found.append(_distribution(name, rows_BV))
    return found


def _distribution(name: str, rows_V: Tensor) -> Tensor:
    off = (rows_V.sum(-1) - 1).abs().max()
    if not (rows_V.min() > 0 and off <= SUM_TOLERANCE):
        raise ValueError(
            f"expert {name!r} gave a row that is no distribution: smallest {rows_V.min():.3g}, sum off by {off:.3g}"
        )
    return rows_V
