"""A gang of ranks for one evaluation: Ray actors on one node, joined in one process group, all or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hedgemix.runtime.collectives import device_index
from pipeline.execution.failures import RAY_RETRIES
from pipeline.execution.placement import remove_group
from pipeline.execution.process_group import free_address, join


class Rank:
    """Runs one member; its process ends with the gang."""

    def address(self) -> str:
        """Find where rank 0 will listen: host:port, free now."""
        return free_address()

    def run(self, rank: int, gang: Gang, address: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Join the process group at `address`, do the work and return its value."""
        index = device_index(rank, gang.gpus, torch.cuda.device_count())
        if index is not None:
            torch.cuda.set_device(index)
        join(address, gang.backend, rank, gang.ranks, index)
        value = work(*arguments)
        # Only after success: leaving the group would wait for ranks that wait for this one. The process ends anyway.
        dist.destroy_process_group()
        return value


RankActor = ray.remote(max_restarts=RAY_RETRIES)(Rank)


@dataclass(frozen=True)
class Gang:
    """Describes `ranks` members with `cpus` and `gpus` each, which speak over `backend`. The name is one step's: a gang
    of that name that is still there belongs to an attempt that died, and is removed."""

    name: str
    ranks: int
    cpus: float
    gpus: float
    backend: str


def run_gang(gang: Gang, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call `work(*arguments)` on every rank; returns rank 0's value.

    Waits until one node has room for all. The first rank to fail ends the gang: its error is raised, or
    ConnectionError when a rank's process was lost, which is worth another try.
    """
    remove_group(gang.name)
    group = placement_group([{"CPU": gang.cpus, "GPU": gang.gpus}] * gang.ranks, "STRICT_PACK", name=gang.name)
    members: list[Any] = []
    try:
        ray.get(group.ready())
        for index in range(gang.ranks):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            members.append(
                RankActor.options(num_cpus=gang.cpus, num_gpus=gang.gpus, scheduling_strategy=place).remote()
            )
        address = ray.get(members[0].address.remote())
        running = [member.run.remote(i, gang, address, work, arguments) for i, member in enumerate(members)]
        return finish(running)
    finally:
        for member in members:
            ray.kill(member)
        remove_placement_group(group)


def finish(running: list[Any]) -> Any:
    """Rank 0's value once every rank has ended well."""
    pending = list(running)
    try:
        while pending:
            done, pending = ray.wait(pending)
            ray.get(done)
        return ray.get(running[0])
    except RayError:
        # The others notice a lost rank before Ray does; give it a moment to tell which it was.
        ray.wait(running, num_returns=len(running), timeout=10)
        for reference in running:
            try:
                ray.get(reference, timeout=0)
            except (RayActorError, GetTimeoutError) as error:
                if isinstance(error, RayActorError):
                    raise ConnectionError(f"a rank was lost: {error}") from None
            except RayError:
                continue
        raise
