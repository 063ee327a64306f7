"""Which training tokens each step reads: a seeded shuffle of fixed sequences, the same for any number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hedgemix.shards import TokenStream


class Batches:
    """Step s reads sequences s*n .. (s+1)*n - 1 of an endless series of seeded permutations of the stream's
    sequences, where n = sequences a step; there is no state but the step."""

    def __init__(self, stream: TokenStream, sequence_tokens: int, sequences_per_step: int, seed: int) -> None:
        self.stream, self.sequence_tokens, self.per_step, self.seed = stream, sequence_tokens, sequences_per_step, seed
        self.total = (len(stream) - 1) // sequence_tokens
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Sequence numbers of one step over all ranks, shape (sequences_per_step,)."""
        places = np.arange(step * self.per_step, (step + 1) * self.per_step)
        epochs, offsets = places // self.total, places % self.total
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            if epoch != self.epoch:
                self.epoch = int(epoch)
                self.order = np.random.default_rng([self.seed, self.epoch]).permutation(self.total)
            found[epochs == epoch] = self.order[offsets[epochs == epoch]]
        return found

    def read(self, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (len(indices), sequence_tokens), of the given sequences."""
        T = self.sequence_tokens
        rows = np.stack([self.stream.read(int(i) * T, T + 1) for i in indices]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def microbatches(self, step: int, rank: int, world: int, largest: int) -> list[np.ndarray]:
        """This rank's sequences of the step in pieces of at most `largest`."""
        mine = np.array_split(self.indices(step), world)[rank]
        return [mine[start : start + largest] for start in range(0, len(mine), largest)]
