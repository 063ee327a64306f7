"""A gang of ranks for one evaluation: Ray actors on one node, joined in one process group, all or none."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class Rank:
    """One member; its process ends with the gang."""

    def address(self) -> str:
        """Where rank 0 will listen."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, rank: int, world: int, address: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        os.environ["LOCAL_RANK"] = str(rank)
        backend = "nccl" if ray.get_gpu_ids() else "gloo"
        dist.init_process_group(
            backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
        )
        try:
            return work(*arguments)
        finally:
            dist.destroy_process_group()


RankActor = ray.remote(max_restarts=0)(Rank)


def run_gang(ranks: int, cpus: float, gpus: float, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """`work(*arguments)` on every rank of a gang with `cpus` and `gpus` each; returns rank 0's value.

    Waits until one node has room for all. The first rank to fail ends the gang and its error is raised.
    """
    group = placement_group([{"CPU": cpus, "GPU": gpus}] * ranks, strategy="STRICT_PACK")
    members: list[Any] = []
    try:
        ray.get(group.ready())
        for index in range(ranks):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            members.append(RankActor.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=place).remote())
        address = ray.get(members[0].address.remote())
        running = [member.run.remote(i, ranks, address, work, arguments) for i, member in enumerate(members)]
        pending = list(running)
        while pending:
            done, pending = ray.wait(pending)
            ray.get(done)
        return ray.get(running[0])
    finally:
        for member in members:
            ray.kill(member)
        remove_placement_group(group)
