"""What a CUDA graph does, on a CPU: array operations recorded once and repeated on the very same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def memory(values: Any) -> set[int]:
    return {each.untyped_storage().data_ptr() for each in tree_leaves(values) if isinstance(each, Tensor)}


class Tape(TorchDispatchMode):
    """Records; `play` repeats without running any of the Python code that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, Any, Any, Any]] = []
        self.played = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if not operation.is_view and operation.name() != "aten::_unsafe_view":
            self.lines.append((operation, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        self.played += 1
        for operation, args, kwargs, out in self.lines:
            known, again = memory([args, kwargs]), operation(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not memory(old) & known:
                    old.copy_(new)


class Recorder:
    """In place of `cuda_graph.record_graph`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def __call__(self, work: Callable[[], object], device: torch.device) -> Callable[[], object]:
        self.tapes.append(Tape())
        work()
        with self.tapes[-1] as tape:
            work()
        return tape.play
