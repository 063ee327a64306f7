"""The driver of one record: every seed through train, quantize and evaluate, as resources allow, to one table.

It holds no state of its own: what is done stands on disk, so the same command again does only what is missing.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from hedgemix.config import Recipe, RecipeError
from hedgemix.dataset import Dataset
from pipeline import results, runs, tasks
from pipeline.progress import BoardActor, View
from pipeline.results import Row
from pipeline.rows import build_row, origin
from pipeline.runs import SeedSteps, Step
from pipeline.tasks import Job

POLL_SECONDS = 0.5
STAGES = ("train", "quantize", "score", "evaluate")
ERRORS_OF_THE_OTHERS = ("Connection closed", "Connection reset", "NCCL", "gloo", "HealthCheck")
"""What ranks say that only noticed another one fail."""


@dataclass
class Drive:
    """One record being driven; `running` maps a Ray task to its seed (None: shared) and stage."""

    record: str
    recipe: Recipe
    dataset: Dataset
    seeds: dict[int, SeedSteps]
    counts: Step
    job: Job
    errors: dict[int, str] = field(default_factory=dict)
    count_error: str = ""
    running: dict[Any, tuple[int | None, str]] = field(default_factory=dict)

    def busy(self, seed: int | None, stage: str) -> bool:
        return (seed, stage) in self.running.values()

    def unfinished(self) -> bool:
        return any(not steps.done() for seed, steps in self.seeds.items() if seed not in self.errors)

    def launch(self) -> None:
        """Start everything whose inputs are done. On a machine of our own, training only starts where it fits now, in
        the order of seeds; a cluster is told of all seeds, so that it can grow, and places them as nodes come free."""
        if not self.counts.done() and not self.count_error and not self.busy(None, "count"):
            self.running[tasks.start_counts(self.job, self.counts)] = (None, "count")
        slots = len(self.seeds) if on_cluster() else training_slots(self.job.recipe)
        slots -= sum(stage == "train" for _, stage in self.running.values())
        for seed, steps in self.seeds.items():
            if seed in self.errors or steps.done():
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
            if not steps.quantize.done() or steps.evaluate.done() or self.busy(seed, "evaluate"):
                continue
            if self.counts.done():
                self.running[tasks.start_evaluation(self.job, steps, self.counts)] = (seed, "evaluate")
            elif self.count_error:
                self.errors[seed] = self.count_error

    def collect(self) -> bool:
        """Wait a moment for a task to end; True when one did."""
        if not self.running:
            time.sleep(POLL_SECONDS)
            return False
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            seed, stage = self.running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:
                message = f"{stage}: {explain(error)}"
                if seed is None:
                    self.count_error = message
                else:
                    self.errors.setdefault(seed, message)
                    self.keep_error(seed, stage, error)
        return bool(done)

    def keep_error(self, seed: int, stage: str, error: Exception) -> None:
        """The whole error beside the step's files; the row has room for a line of it."""
        with contextlib.suppress(OSError):
            (getattr(self.seeds[seed], stage).folder / "error.txt").write_text(str(error))

    def rows(self) -> list[Row]:
        return [
            build_row(self.record, self.recipe, self.dataset, steps, self.counts, self.errors.get(seed))
            for seed, steps in self.seeds.items()
        ]

    def states(self) -> dict[int, dict[str, Any]]:
        """What the view shows: the board's records, overruled by what the driver knows."""
        board: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(RayError):  # without its board the record still goes on
            board = ray.get(self.job.board.read.remote(), timeout=5)
        shown: dict[int, dict[str, Any]] = {}
        for seed, steps in self.seeds.items():
            told = board.get(seed, {})
            if steps.done():
                shown[seed] = {"stage": "done", "fraction": 1.0, "bpb": steps.evaluate.result()["bpb_final"]}
            elif seed in self.errors:
                shown[seed] = {"stage": "failed", "detail": self.errors[seed]}
            elif self.busy(seed, told.get("stage", "")):
                shown[seed] = told
            else:
                due = next((stage for stage in STAGES if self.busy(seed, stage)), "")
                shown[seed] = {"stage": f"starting {due}" if due else "waiting"}
        return shown


def drive(
    record: str,
    recipe: Recipe,
    dataset: Dataset,
    out: Path,
    seeds: tuple[int, ...],
    console: Console,
    profile: bool = False,
) -> list[Row]:
    """Run what is missing of every seed; returns all rows, also written to the record's parquet file as seeds end.

    Ray must be initialised. Raises RecipeError when no machine of this cluster can hold the training job.
    """
    resolved, evaluate_cpus = resolve_cpus(recipe)
    check_capacity(resolved, evaluate_cpus, console)
    job = Job(resolved, dataset, evaluate_cpus, origin(), profile, BoardActor.remote())
    steps = {seed: runs.seed_steps(out, recipe, dataset, seed) for seed in seeds}
    work = Drive(record, recipe, dataset, steps, runs.counts_step(out, recipe, dataset), job)
    results.write(out, work.rows())
    try:
        with View(seeds, console) as view:
            while True:
                work.launch()
                if not work.running and not work.unfinished():
                    break
                view.update(work.states())
                if work.collect():
                    results.write(out, work.rows())
            view.update(work.states())
    finally:
        rows = work.rows()
        results.write(out, rows)
        for reference in work.running:
            with contextlib.suppress(RayError):
                ray.cancel(reference)
    return rows


def fits(node: dict[str, Any], count: int, cpus: float, gpus: float) -> int:
    """How often `count` ranks of `cpus` and `gpus` each fit the node at once."""
    if not node["Alive"]:
        return 0
    here = node["Resources"]
    times = [here.get(name, 0) // (count * each) for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    return int(min(times, default=1))


def training_slots(recipe: Recipe) -> int:
    """Training jobs that fit the cluster's machines at once; each has one machine's share for itself."""
    compute = recipe.compute
    return sum(fits(node, compute.workers, compute.cpus_per_worker, compute.gpus_per_worker) for node in ray.nodes())


def check_capacity(recipe: Recipe, evaluate_cpus: float, console: Console) -> None:
    """On a machine of our own, refuse at once what could only wait for ever; a cluster may still get its nodes."""
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
    return bool(os.environ.get("RAY_ADDRESS"))


def resolve_cpus(recipe: Recipe) -> tuple[Recipe, float]:
    """The recipe with cpus_per_worker 0 replaced by a worker's share of the largest machine's CPUs, and the CPUs of an
    evaluating rank, by the same rule."""
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


def explain(error: BaseException) -> str:
    """The cause in one line: what a person can act on, without Ray's frames."""
    cause = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    failures = getattr(cause, "worker_failures", None)
    if failures:
        ranks = sorted(failures, key=lambda rank: (blames_another(failures[rank]), rank))
        return f"worker {ranks[0]}: {explain(failures[ranks[0]])}"
    name = type(cause).__name__
    text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
    return text if text.startswith(name) or name == "RuntimeError" else f"{name}: {text}"


def blames_another(error: BaseException) -> bool:
    return any(sign in f"{type(error).__name__} {error}" for sign in ERRORS_OF_THE_OTHERS)
