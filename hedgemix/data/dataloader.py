"""Which training tokens each step reads: a seeded shuffle of fixed sequences, the same for any number of ranks."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hedgemix.data.shards import TokenStream


class Batches:
    """Step s reads sequences s*n .. (s+1)*n - 1 of an endless series of seeded permutations of the stream's
    sequences, where n = sequences a step; there is no state but the step."""

    def __init__(self, stream: TokenStream, sequence_tokens: int, sequences_per_step: int, seed: int) -> None:
        self.stream, self.sequence_tokens, self.per_step, self.seed = stream, sequence_tokens, sequences_per_step, seed
        self.total = (len(stream) - 1) // sequence_tokens
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Draw the sequence numbers of one step over all ranks, int64 (sequences_per_step,)."""
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
        """Read the given sequences: inputs and targets, int64 (len(indices), sequence_tokens), on the device."""
        tokens = self.rows(indices, device).to(device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def rows(self, indices: np.ndarray, device: torch.device) -> Tensor:
        """Read inputs and the last target, int64 (len(indices), sequence_tokens + 1), into memory that `device` copies
        from without waiting."""
        T = self.sequence_tokens
        rows = np.empty((len(indices), T + 1), np.int64)
        for row, i in zip(rows, indices, strict=True):
            row[:] = self.stream.read(int(i) * T, T + 1)
        tokens = torch.from_numpy(rows)
        return tokens.pin_memory() if device.type == "cuda" else tokens

    def microbatches(self, step: int, rank: int, world: int, largest: int) -> list[np.ndarray]:
        """Split this rank's sequences of the step into pieces of at most `largest`."""
        mine = np.array_split(self.indices(step), world)[rank]
        return [mine[start : start + largest] for start in range(0, len(mine), largest)]


class Ahead:
    """Gives one rank's microbatches of a step, those of the next step read by a thread while this one is computed.

    An error in the thread is raised by the call that wanted its tokens. `close` ends the thread.
    """

    def __init__(self, batches: Batches, rank: int, world: int, largest: int, device: torch.device) -> None:
        self.batches, self.rank, self.world, self.largest, self.device = batches, rank, world, largest, device
        # A thread starts on GPU 0, and pinning memory there would take up memory of that GPU for every rank.
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, "batches", begin)
        self.step = -1
        self.rows: list[Tensor] = []
        """Of the microbatches given last, inputs and the last target, int64 (sequences, sequence_tokens + 1), on the
        host."""
        self.waiting: Future[list[Tensor]] | None = None

    def __call__(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of each microbatch, int64 (sequences, sequence_tokens), on the device."""
        if self.waiting is None or self.step != step:
            self.waiting = self.pool.submit(self.read, step)
        self.rows = self.waiting.result()
        self.step, self.waiting = step + 1, self.pool.submit(self.read, step + 1)
        moved = [tokens.to(self.device, non_blocking=True) for tokens in self.rows]
        return [(tokens[:, :-1], tokens[:, 1:]) for tokens in moved]

    def read(self, step: int) -> list[Tensor]:
        """Read the step's microbatches as `Batches.rows` does."""
        pieces = self.batches.microbatches(step, self.rank, self.world, self.largest)
        return [self.batches.rows(indices, self.device) for indices in pieces]

    def close(self) -> None:
        """End the thread once it has read what it is reading."""
        self.pool.shutdown(cancel_futures=True)
