"""Joins the ranks of one node in a torch.distributed process group: an evaluation's gang, Ray Train's workers on CPUs.

Torch is imported as a rank joins: Ray Train's controller, which names these functions, has no need of it.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import ray

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def free_address() -> str:
    """Find where rank 0 will listen: host:port, free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def join(address: str, backend: str, rank: int, ranks: int, device: int | None = None) -> None:
    """Join the process group at `address` as this rank of so many; device: the number of its GPU, if it has one."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=ranks,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=None if device is None else torch.device("cuda", device),
    )
