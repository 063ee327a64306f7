"""The driver of one record: every seed through train, quantize and evaluate, as resources allow, to one table.

It holds no state of its own: what is done stands on disk, so the same command again does only what is missing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.autoscaler.sdk
from ray.exceptions import RayTaskError
from rich.console import Console

from hedgemix.config import Recipe, RecipeError
from hedgemix.dataset import Dataset
from pipeline import results, runs, tasks
from pipeline.progress import BoardActor, View
from pipeline.results import Row
from pipeline.rows import build_row
from pipeline.runs import SeedSteps, Step
from pipeline.tasks import Job

POLL_SECONDS = 0.5


@dataclass
class Drive:
    """One record being driven; `running` maps a Ray task to its seed (None: shared) and stage."""

    record: str
    recipe: Recipe
    dataset: Dataset
    runs: Path
    seeds: dict[int, SeedSteps]
    counts: Step
    job: Job
    errors: dict[int, str] = field(default_factory=dict)
    running: dict[Any, tuple[int | None, str]] = field(default_factory=dict)

    def busy(self, seed: int | None, stage: str) -> bool:
        return (seed, stage) in self.running.values()

    def launch(self) -> None:
        """Start everything whose inputs are done; training last and only into free slots, in the order of seeds."""
        if not self.counts.done() and not self.busy(None, "count"):
            self.running[tasks.start_counts(self.job)] = (None, "count")
        slots = training_slots(self.job.recipe)
        slots -= sum(stage == "train" for _, stage in self.running.values())
        for seed, steps in self.seeds.items():
            if seed in self.errors:
                continue
            if not steps.train.done():
                if slots > 0 and not self.busy(seed, "train"):
                    self.running[tasks.train_seed.remote(self.job, steps.train, seed)] = (seed, "train")
                    slots -= 1
                continue
            for stage, step in (("quantize", steps.quantize), ("score", steps.score)):
                if not step.done() and not self.busy(seed, stage):
                    start = tasks.start_quantize if stage == "quantize" else tasks.start_score
                    self.running[start(self.job, steps)] = (seed, stage)
            ready = steps.quantize.done() and self.counts.done() and not steps.evaluate.done()
            if ready and not self.busy(seed, "evaluate"):
                self.running[tasks.start_evaluation(self.job, steps, self.counts)] = (seed, "evaluate")

    def collect(self) -> bool:
        """Wait a moment for a task to end; True when one did."""
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            seed, stage = self.running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:
                message = f"{stage}: {explain(error)}"
                for lost in [seed] if seed is not None else self.seeds:
                    self.errors.setdefault(lost, message)
        return bool(done)

    def rows(self) -> list[Row]:
        return [
            build_row(self.record, self.recipe, self.dataset, steps, self.errors.get(seed))
            for seed, steps in self.seeds.items()
        ]

    def states(self, board: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """What the view shows: the board's records, overruled by what the driver knows."""
        shown: dict[int, dict[str, Any]] = {}
        active = {seed: stage for seed, stage in self.running.values() if seed is not None}
        for seed, steps in self.seeds.items():
            if seed in self.errors:
                shown[seed] = {"stage": "failed", "detail": self.errors[seed]}
            elif steps.done():
                shown[seed] = {"stage": "done", "fraction": 1.0, "bpb": steps.evaluate.result()["bpb_final"]}
            elif seed in active:
                shown[seed] = board.get(seed, {"stage": f"starting {active[seed]}"})
            else:
                shown[seed] = {"stage": "waiting"}
        return shown


def drive(
    record: str, recipe: Recipe, dataset: Dataset, out: Path, seeds: tuple[int, ...], console: Console
) -> list[Row]:
    """Run what is missing of every seed; returns all rows, also written to the record's parquet file as seeds end.

    Ray must be initialised. Raises RecipeError when no machine of this cluster can hold the training job.
    """
    resolved = resolve_cpus(recipe)
    check_capacity(resolved)
    job = Job(resolved, dataset, str(out), BoardActor.remote())
    steps = {seed: runs.seed_steps(out, recipe, dataset, seed) for seed in seeds}
    work = Drive(record, recipe, dataset, out, steps, runs.counts_step(out, recipe, dataset), job)
    ask_for_nodes(resolved, sum(not each.train.done() for each in steps.values()))
    results.write(out, work.rows())
    try:
        with View(seeds, console) as view:
            work.launch()
            while work.running:
                if work.collect():
                    results.write(out, work.rows())
                    work.launch()
                view.update(work.states(ray.get(job.board.read.remote())))
            view.update(work.states({}))
    finally:
        for reference in work.running:
            ray.cancel(reference)
        ask_for_nodes(resolved, 0)
        rows = work.rows()
        results.write(out, rows)
    return rows


def resolve_cpus(recipe: Recipe) -> Recipe:
    """The recipe with cpus_per_worker 0 replaced by a worker's share of the largest machine's CPUs."""
    compute = recipe.compute
    if compute.cpus_per_worker:
        return recipe
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    ranks = max(compute.workers, compute.evaluate_workers)
    return replace(recipe, compute=replace(compute, cpus_per_worker=max(1.0, largest // ranks)))


def training_slots(recipe: Recipe) -> int:
    """Training jobs that fit the cluster's machines at once; each has one machine's share for itself."""
    compute = recipe.compute
    slots = 0
    for node in ray.nodes():
        if node["Alive"]:
            cpus, gpus = node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)
            fits = [cpus // (compute.workers * compute.cpus_per_worker)] if compute.cpus_per_worker else []
            if compute.gpus_per_worker:
                fits.append(gpus // (compute.workers * compute.gpus_per_worker))
            slots += int(min(fits, default=1))
    return slots


def check_capacity(recipe: Recipe) -> None:
    """On a machine of our own, refuse at once what could only wait for ever; a cluster may still get its nodes."""
    if training_slots(recipe) == 0 and not on_cluster():
        compute, here = recipe.compute, ray.cluster_resources()
        raise RecipeError(
            f"recipe {recipe.recipe} trains a seed on one machine with {compute.workers} workers of "
            f"{compute.gpus_per_worker:g} GPU and {compute.cpus_per_worker:g} CPU; this machine has "
            f"{here.get('GPU', 0):g} GPU and {here.get('CPU', 0):g} CPU. Lower compute.workers, "
            "compute.gpus_per_worker or compute.cpus_per_worker, or run on a cluster"
        )


def on_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def ask_for_nodes(recipe: Recipe, jobs: int) -> None:
    """Tell an autoscaling cluster what the waiting seeds will need (0: nothing any more)."""
    if on_cluster():
        compute = recipe.compute
        bundle = {"CPU": int(compute.cpus_per_worker), "GPU": int(compute.gpus_per_worker)}
        ray.autoscaler.sdk.request_resources(bundles=[bundle] * (jobs * compute.workers))


def explain(error: Exception) -> str:
    """The cause in one line: what a person can act on, without Ray's frames."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    failures = getattr(cause, "worker_failures", None)
    if failures:
        rank, first = sorted(failures.items())[0]
        return f"worker {rank}: {explain(first)}"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    name = type(cause).__name__
    return text if text.startswith(name) or name == "RuntimeError" else f"{name}: {text}"
