"""Work on memory that stays where it is, recorded once as a CUDA graph and then replayed.

A span of the mixture is some 700 small array operations, each of which costs more to ask for than to do. A graph asks
for all of them at once: the same kernels on the same memory, so it gives the same bits, which the first replays prove.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHECKED = 16
"""Replays that are compared with the work itself, bitwise, before replays are trusted."""
Record = Callable[[Callable[[], object], torch.device], Callable[[], object]]
"""From work on a device's memory to the replay of it. May run the work."""


class Replay:
    """Call it in place of `work`. Where recording fails, or a replay differs from the work, it warns and goes on with
    the work itself, which is slower and right: an evaluation on the clock has to finish, with the bits of `work`."""

    def __init__(self, work: Callable[[], object], state: Sequence[Tensor], result: Tensor, record: Record) -> None:
        """work: reads and writes the same memory each time and never waits for the device. state: what it moves in
        place; result: what it overwrites."""
        self.work, self.state, self.result, self.record = work, state, result, record
        self.replay: Callable[[], object] | None = None
        self.unchecked = CHECKED

    def __call__(self) -> None:
        replay = self.replay or self._recorded()
        if self.unchecked and replay is not self.work:
            self._check(replay)
        else:
            replay()

    def _recorded(self) -> Callable[[], object]:
        before = copies(self.state)
        try:
            self.replay = self.record(self.work, self.result.device)
        except RuntimeError as error:
            self._give_up(f"cannot be recorded as a CUDA graph ({error})")
        restore(self.state, before)
        return self.replay or self.work

    def _check(self, replay: Callable[[], object]) -> None:
        before = copies(self.state)
        self.work()
        expected = copies([*self.state, self.result])
        restore(self.state, before)
        replay()
        self.unchecked -= 1
        if not all(map(torch.equal, expected, [*self.state, self.result])):
            restore([*self.state, self.result], expected)
            self._give_up("differs from its CUDA graph")

    def _give_up(self, why: str) -> None:
        warnings.warn(f"the mixture {why}: it goes on without one, more slowly", RuntimeWarning, stacklevel=4)
        self.replay = self.work


def record_graph(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Record `work` as a CUDA graph, and return its replay; runs the work. Raises RuntimeError, as torch does, for work
    that cannot be recorded."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Handles and workspaces of cuBLAS, and what the mixers cache, must not be made while it is recorded.
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, NCCL's among them, may ask the device something meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    return graph.replay


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy each tensor."""
    return [tensor.clone() for tensor in tensors]


def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy the values into the tensors' memory."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
