"""The ranks of one job: the few collectives hedgemix needs, which do nothing when there is one rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def backend(gpus_per_worker: float) -> str:
    """Choose what ranks speak over: their GPUs (nccl), or their host (gloo)."""
    return "nccl" if gpus_per_worker else "gloo"


def device_index(rank: int, gpus: float, visible: int) -> int | None:
    """Choose which of the GPUs that a rank's process sees is its own; None for a rank without.

    Ray shows each process its own GPUs only, unless it is told to leave CUDA_VISIBLE_DEVICES alone: then all of a node.
    """
    return rank % visible if gpus and visible else None


def active() -> bool:
    """Say whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return this process's rank; 0 when it is alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Return the number of ranks; 1 when this process is alone."""
    return dist.get_world_size() if active() else 1


def sum_over(tensor: Tensor) -> Tensor:
    """Add `tensor` over all ranks, in place."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` with rank 0's, in place."""
    if active():
        dist.broadcast(tensor, src=0)
    return tensor


def gather(tensor: Tensor) -> list[Tensor]:
    """Gather every rank's `tensor` (same shape everywhere), in rank order, on every rank."""
    return start_gather(tensor)()


def start_gather(tensor: Tensor) -> Callable[[], list[Tensor]]:
    """Begin a `gather`: what comes next runs beside it until its result is asked for. Ranks begin in the same order."""
    if not active():
        return lambda: [tensor]
    tensor = tensor.contiguous()  # before empty_like, which would keep its strides
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    work = dist.all_gather(parts, tensor, async_op=True)

    def finish() -> list[Tensor]:
        work.wait()  # on a GPU the stream waits, not the host
        return parts

    return finish


def barrier() -> None:
    """Wait until every rank is here."""
    if active():
        # Without its GPU's number NCCL takes a guess, and says so.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


class Agreement:
    """Tells every rank the numbers that rank 0 decides (its clock, above all) over gloo, float64: no wait for the GPU's
    queue."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if active() else None

    def __call__(self, *values: float) -> list[float]:
        if self.group is None:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(told, src=0, group=self.group)
        return told.tolist()
