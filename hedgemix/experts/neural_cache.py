"""The neural cache: what followed the positions whose features are most like this one's (Grave et al. 2017).

A softmax over the cosines of whitened features, `theta` times, less the age in units of `decay_tokens`; each of the
last `memory_tokens` positions gives its weight to the token that followed it. The position at work has no weight, and
its row is made before its token is told.

Shapes: B positions, K of them with those that they look back on, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_TOKENS = {"cpu": 128, "cuda": 1024}
"""Positions whose rows are made at once: cache size on a CPU, launches on a GPU. Rounding aside it changes no row."""
STEP_TOKENS = 4096
"""What is remembered moves to the front of its memory at multiples of this: where it lies depends on the position
alone."""


class NeuralCache:
    """Holds what the last positions looked like, and the tokens that followed them."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        memory_tokens: int = 3000,
        theta: float = 15.0,
        decay_tokens: float = 500.0,
        floor: float = 0.005,
        device: torch.device | str = "cpu",
    ) -> None:
        """floor: share of a row that is spread evenly. `refresh` comes before the first position."""
        self.vocab_size, self.memory, self.theta, self.floor = vocab_size, memory_tokens, theta, floor
        self.device = torch.device(device)
        self.block = BLOCK_TOKENS[self.device.type]
        self.position = 1
        """The next position; a text's first scored one is 1."""
        self.first = 0
        """The position at the front of the memory."""
        size = memory_tokens + STEP_TOKENS
        self.features_KD = torch.zeros(size, width, device=self.device)
        self.keys_KD = torch.zeros(size, width, device=self.device)
        """The features whitened, of length 1."""
        self.tokens_K = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.whitener_DD = torch.eye(width, device=self.device)
        key_K1 = torch.arange(memory_tokens + self.block, device=self.device)[:, None]
        age_KB = torch.arange(self.block, device=self.device) + memory_tokens - key_K1
        self.fade_KB = torch.exp(-age_KB / decay_tokens - theta) * ((age_KB > 0) & (age_KB <= memory_tokens))
        """What a weight is multiplied by, for the positions of a block and of `memory_tokens` before it: 0 from the
        position itself on. With exp(-theta) no sum of weights leaves the range of float32."""
        self.fade_K = self.fade_KB[:memory_tokens, 0].clone()
        """The same for one position, side by side."""

    def refresh(self, whitener_DD: Tensor) -> None:
        """Compare by this whitener from here on."""
        self.whitener_DD = whitener_DD
        here = slice(self.position - self.first)
        self.keys_KD[here] = self._keys(self.features_KD[here])

    def rows(self, features_BD: Tensor, tokens_B: Tensor) -> Tensor:
        """Give the probabilities (B, V), float32, of the next B positions, and learn the tokens that were there."""
        parts, done = [], 0
        while done < len(features_BD):
            count = min(self.block - self.position % self.block, len(features_BD) - done)
            self._place(features_BD[done : done + count])
            at = self.position - self.first
            self.tokens_K[at : at + count] = tokens_B[done : done + count]
            parts.append(self._rows(count))
            self._advance(count)
            done += count
        return torch.cat(parts)

    def predict(self, feature_D: Tensor) -> Tensor:
        """Give the probabilities (V,), float32, of the next position's token, on a CPU: the row that `rows` makes for a
        single position, to the bit. NumPy does what PyTorch takes longer to begin than to do."""
        features_KD, keys_KD, tokens_K = (each.numpy() for each in (self.features_KD, self.keys_KD, self.tokens_K))
        here = self.position - self.first
        key = feature_D[None] @ self.whitener_DD
        key_D = key[0].numpy()
        key_D /= max(float(torch.linalg.vector_norm(key, dim=1)), 1e-12)
        features_KD[here], keys_KD[here] = feature_D.numpy(), key_D
        if self.position == 1:
            return torch.full((self.vocab_size,), 1 / self.vocab_size)  # nothing to look back on
        oldest = max(self.position - self.memory, 1) - self.first
        # The position itself, which gets no weight, is among the rows: as many as in `_rows` are rounded alike.
        cosines = torch.mv(self.keys_KD[oldest : here + 1], torch.from_numpy(key_D * np.float32(self.theta)))
        weights_K = cosines.exp_().numpy()[:-1]
        weights_K *= self.fade_K.numpy()[self.memory - (here - oldest) :]
        sums_V = np.zeros(self.vocab_size, np.float32)
        np.add.at(sums_V, tokens_K[oldest:here], weights_K)
        sums_V *= np.float32(1 - self.floor) * (1 / torch.from_numpy(sums_V).sum().numpy())
        sums_V += np.float32(self.floor / self.vocab_size)
        return torch.from_numpy(sums_V)

    def update(self, token: int) -> None:
        """Learn the token that `predict` was about."""
        self.tokens_K.numpy()[self.position - self.first] = token
        self._advance(1)

    def _keys(self, features_BD: Tensor) -> Tensor:
        keys_BD = features_BD @ self.whitener_DD
        return keys_BD / keys_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def _place(self, features_BD: Tensor) -> None:
        here = slice(self.position - self.first, self.position - self.first + len(features_BD))
        self.features_KD[here] = features_BD
        self.keys_KD[here] = self._keys(self.features_KD[here])

    def _rows(self, count: int) -> Tensor:
        """Rows of the next positions, whose features are in place. So are the tokens of all but the last one, which
        has weight 0 everywhere, as each has for its own position and for earlier ones."""
        here = self.position - self.first
        oldest = max(self.position - self.memory, 1) - self.first
        keys_KD, tokens_K = self.keys_KD[oldest : here + count], self.tokens_K[oldest : here + count]
        weights_KB = (keys_KD @ (self.theta * self.keys_KD[here : here + count]).T).exp_()
        weights_KB *= self.fade_KB[self.memory - (here - oldest) : self.memory + count, :count]
        sums_VB = self._by_token(weights_KB, tokens_K)
        rows_BV = ((1 - self.floor) / sums_VB.sum(0) * sums_VB + self.floor / self.vocab_size).T.contiguous()
        if self.position == 1:
            rows_BV[0] = 1 / self.vocab_size  # nothing to look back on
        return rows_BV

    def _by_token(self, weights_KB: Tensor, tokens_K: Tensor) -> Tensor:
        """Sums (V, B) of the weights of each token."""
        if self.device.type == "cpu":
            return torch.zeros(self.vocab_size, weights_KB.shape[1]).index_add_(0, tokens_K, weights_KB)
        # A GPU adds by index in no fixed order; a product has one.
        member_VK = torch.zeros(self.vocab_size, len(tokens_K), device=self.device)
        return member_VK.scatter_(0, tokens_K[None], 1.0) @ weights_KB

    def _advance(self, count: int) -> None:
        self.position += count
        first = max(self.position // STEP_TOKENS * STEP_TOKENS - self.memory, 0)
        if first > self.first:
            kept = slice(first - self.first, self.position - self.first)
            for memory in (self.features_KD, self.keys_KD, self.tokens_K):
                memory[: self.position - first] = memory[kept].clone()
            self.first = first

    def state_dict(self) -> dict[str, Any]:
        """Copy what is remembered."""
        kept = slice(max(self.position - self.memory, 0) - self.first, self.position - self.first)
        return {
            "position": self.position,
            "features": self.features_KD[kept].clone(),
            "keys": self.keys_KD[kept].clone(),
            "tokens": self.tokens_K[kept].clone(),
            "whitener": self.whitener_DD,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.position = state["position"]
        self.first = max(self.position // STEP_TOKENS * STEP_TOKENS - self.memory, 0)
        kept = slice(max(self.position - self.memory, 0) - self.first, self.position - self.first)
        self.features_KD[kept], self.keys_KD[kept] = state["features"], state["keys"]
        self.tokens_K[kept] = state["tokens"]
        self.whitener_DD = state["whitener"].to(self.device)
