"""The recency expert: what this stretch of text is about. Shapes: V vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Recency:
    """Keeps counts of tokens, and of what followed the last token, that fade with every later token (a cache
    language model; Kuhn and De Mori 1990). Followers are backed off to recent tokens, and these
    to the counts of the whole text so far."""

    def __init__(
        self, vocab_size: int, memory_tokens: float = 200.0, prior_tokens: float = 100.0, prior_followers: float = 1.0
    ) -> None:
        """Begin with no token told. memory_tokens: after how many a count has faded to 1/e; the others are weights of
        what is backed off to, in tokens."""
        self.kept = math.exp(-1 / memory_tokens)
        self.prior_tokens, self.prior_followers = prior_tokens, prior_followers
        self.count_V, self.recent_V = torch.ones(vocab_size), torch.zeros(vocab_size)
        self.followers: dict[int, tuple[int, Tensor]] = {}
        """For each token, what followed it, (V,), as it was after so many tokens: it fades when it is looked at."""
        self.told, self.last = 0, -1

    def row(self) -> Tensor:
        """Make the row of the next token."""
        p_V = backed_off(self.recent_V, self.count_V / self.count_V.sum(), self.prior_tokens)
        if self.last in self.followers:
            p_V = backed_off(self._after(self.last), p_V, self.prior_followers)
        return p_V

    def update(self, token: int) -> None:
        """Count the token that occurred; every count fades."""
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
    """Make the distribution (V,), float32, of counts to which `prior` more are added as p_V says."""
    return (count_V + prior * p_V) / (count_V.sum() + prior)
