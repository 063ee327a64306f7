"""What of a record fits the machines that are there: ranks, their CPUs and GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray
from rich.console import Console

from hedgemix.config import Recipe, RecipeError
from pipeline.execution.ray_address import cluster_address


def fits(node: dict[str, Any], count: int, cpus: float, gpus: float) -> int:
    """Count how often `count` ranks of `cpus` and `gpus` each fit the node at once."""
    if not node["Alive"]:
        return 0
    here = node["Resources"]
    times = [here.get(name, 0) // (count * each) for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    return int(min(times, default=1))


def training_slots(recipe: Recipe) -> int:
    """Count the training jobs that fit the cluster's machines at once; each has one machine's share for itself."""
    compute = recipe.compute
    return sum(fits(node, compute.workers, compute.cpus_per_worker, compute.gpus_per_worker) for node in ray.nodes())


def check_capacity(recipe: Recipe, evaluate_cpus: float, console: Console) -> None:
    """Refuse with a RecipeError what a machine of our own could only wait for without end; on a cluster, which may
    still get its nodes, print what it waits for."""
    compute = recipe.compute
    for purpose, ranks, cpus in (
        ("trains a seed", compute.workers, compute.cpus_per_worker),
        ("evaluates a seed", compute.evaluate_workers, evaluate_cpus),
    ):
        if any(fits(node, ranks, cpus, compute.gpus_per_worker) for node in ray.nodes()):
            continue
        largest = [max(node["Resources"].get(name, 0) for node in ray.nodes()) for name in ("GPU", "CPU")]
        needs = (
            f"recipe {recipe.recipe} {purpose} on one machine with {ranks} ranks of {compute.gpus_per_worker:g} GPU "
            f"and {cpus:g} CPU; the largest here has {largest[0]:g} GPU and {largest[1]:g} CPU"
        )
        if not on_cluster():
            raise RecipeError(
                f"{needs}. Lower compute.workers, compute.evaluate_workers, compute.gpus_per_worker or "
                "compute.cpus_per_worker, or run on a cluster"
            )
        console.print(f"{needs}: waiting for such a machine", soft_wrap=True)


def on_cluster() -> bool:
    """Say whether RAY_ADDRESS names a cluster."""
    return bool(cluster_address())


def resolve_cpus(recipe: Recipe) -> tuple[Recipe, float]:
    """Replace cpus_per_worker 0 of the recipe by a worker's share of the largest machine's CPUs; returns the recipe,
    and the CPUs of an evaluating rank by the same rule. Raises RecipeError when no machine with its GPUs is there."""
    compute = recipe.compute
    if compute.cpus_per_worker:
        return recipe, compute.cpus_per_worker
    able = [node["Resources"] for node in ray.nodes() if fits(node, compute.workers, 0, compute.gpus_per_worker)]
    largest = max((resources.get("CPU", 0) for resources in able), default=0)
    if not largest:
        raise RecipeError(
            f"no node with {compute.workers * compute.gpus_per_worker:g} GPU is there to tell its CPUs; set "
            "compute.cpus_per_worker"
        )
    resolved = replace(compute, cpus_per_worker=max(1.0, largest // compute.workers))
    return replace(recipe, compute=resolved), max(1.0, largest // compute.evaluate_workers)
