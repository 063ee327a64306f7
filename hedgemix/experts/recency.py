"""The recency expert: what this stretch of text is about. Shapes: V vocabulary."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

OLDEST = 80.0
"""After how many memories nothing is left of a count: exp(-80) of it, next to the priors, is 0 in float32."""
GROWTH = 40.0
"""After how many memories a count's unit is the present again. Sooner than numbers leave float32's range, where a CPU
would also take a hundred times as long for each."""


class Fading:
    """Holds counts that fade with every later token: by `exp(-tokens / memory)`. They stand still, and what is added
    later weighs more."""

    def __init__(self, vocab_size: int, memory_tokens: float, now: int) -> None:
        self.grown_V, self.memory_tokens, self.base = np.zeros(vocab_size, np.float32), memory_tokens, now

    def age(self, now: int) -> float:
        """Tell how many memories ago the counts' unit was the present; now: tokens told."""
        return (now - self.base) / self.memory_tokens

    def add(self, token: int, now: int) -> None:
        """Count a token."""
        age = self.age(now)
        if age > GROWTH:
            self.grown_V *= np.float32(math.exp(-age)) if age < OLDEST else 0
            self.grown_V[self.grown_V < math.exp(-GROWTH)] = 0
            self.base, age = now, 0.0
        self.grown_V[token] += math.exp(age)

    def back_off(self, p_V: np.ndarray, prior: float, now: int) -> np.ndarray:
        """Make the distribution (V,), float32, of the counts to which `prior` more are added as p_V says, in p_V."""
        age = self.age(now)
        if age > OLDEST:
            return p_V
        faded = math.exp(-age)
        scale = 1 / (faded * float(self.grown_V.sum()) + prior)
        p_V *= np.float32(prior * scale)
        p_V += self.grown_V * np.float32(faded * scale)
        return p_V


class Recency:
    """Keeps counts of tokens, and of what followed the last token, that fade with every later token (a cache
    language model; Kuhn and De Mori 1990). Followers are backed off to recent tokens, and these
    to the counts of the whole text so far."""

    def __init__(
        self, vocab_size: int, memory_tokens: float = 200.0, prior_tokens: float = 100.0, prior_followers: float = 1.0
    ) -> None:
        """Begin with no token told. memory_tokens: after how many a count has faded to 1/e; the others are weights of
        what is backed off to, in tokens."""
        self.memory_tokens, self.prior_tokens, self.prior_followers = memory_tokens, prior_tokens, prior_followers
        self.count_V, self.recent = np.ones(vocab_size, np.float32), Fading(vocab_size, memory_tokens, 0)
        self.followers: dict[int, Fading] = {}
        self.told, self.last = 0, -1

    def row(self) -> Tensor:
        """Make the row of the next token."""
        p_V = self.count_V * np.float32(1 / (len(self.count_V) + self.told))
        p_V = self.recent.back_off(p_V, self.prior_tokens, self.told)
        if self.last in self.followers:
            p_V = self.followers[self.last].back_off(p_V, self.prior_followers, self.told)
        return torch.from_numpy(p_V)

    def update(self, token: int) -> None:
        """Count the token that occurred; every count fades."""
        self.told += 1
        self.count_V[token] += 1
        self.recent.add(token, self.told)
        if self.last >= 0:
            if self.last not in self.followers:
                self.followers[self.last] = Fading(len(self.count_V), self.memory_tokens, self.told)
            self.followers[self.last].add(token, self.told)
        self.last = token
