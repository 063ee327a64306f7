"""A device left to itself: refuses whatever makes a host wait for its device, or sends a device what the host has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_consecutive", "_unique2",
    "lift_fresh",
}  # fmt: skip
"""Operations whose result's shape or value the host asks for, and the one that torch.tensor leaves behind."""
READS = [(torch, name) for name in ("from_numpy", "as_tensor")]
READS += [(Tensor, name) for name in ("tolist", "numpy", "cpu", "to", "cuda", "__array__")]


class Unattended(TorchDispatchMode):
    """Counts the other operations that are not views."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.name().removeprefix("aten::").split(".")[0]
        kwargs = kwargs or {}
        waits = name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits |= any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
        if waits:
            raise AssertionError(f"{operation.name()} makes the host wait for its device")
        self.count += not operation.is_view
        return operation(*args, **kwargs)


@contextmanager
def unattended() -> Iterator[Unattended]:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host reads or writes the device's memory")

    with ExitStack() as stack:
        for owner, name in READS:
            stack.enter_context(patch.object(owner, name, refused))
        yield stack.enter_context(Unattended())
