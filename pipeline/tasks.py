"""Each step as a Ray job: Ray Train for training, tasks for the rest, a gang of ranks for a parallel evaluation.

Every task is idempotent: it does its step unless the step's result.json is there, and writes that last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from hedgemix import ranks, stages
from hedgemix.checkpoint import Kept, nothing
from hedgemix.config import Recipe, config_hash
from hedgemix.dataset import Dataset
from hedgemix.files import Log
from hedgemix.ranks import backend
from hedgemix.train import DivergedError
from pipeline.gang import Gang, run_gang
from pipeline.notice import Notice
from pipeline.runs import SeedSteps
from pipeline.steps import Made, Step, clocked, fetch, forget, keep, perform, resuming

HEAD = {"node:__internal_head__": 0.001}
"""Keeps a task that only waits on the node of the driver, off machines that may be taken away."""


@dataclass(frozen=True)
class Job:
    """What every task of one record is given; small, so it travels by value."""

    recipe: Recipe
    """With compute.cpus_per_worker resolved."""
    dataset: Dataset
    evaluate_cpus: float
    """CPUs of one evaluating rank."""
    code_bytes: int
    """What the recipe's train_gpt.py takes."""
    origin: dict[str, Any]
    """Versions and git state of the driver's tree."""
    data: Step
    """What made the dataset."""
    profile: bool
    """Write profiles of training and evaluation into their steps' folders."""
    board: Any
    """The progress board's actor handle."""

    def log(self, seed: int, stage: str) -> Log:
        """Progress of one stage, from rank 0 to the board; fire and forget."""
        if ranks.rank() != 0:
            return lambda record: None
        return lambda record: self.board.put.remote(seed, stage, record)


def use_cpus(cpus: float) -> None:
    torch.set_num_threads(max(1, int(cpus)))


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker: a rank of the seed's training. A user's mistake is returned, not raised: Ray Train would
    take it for a lost worker and try again."""
    job, seed, step = config["job"], config["seed"], config["step"]
    recipe = job.recipe
    if torch.cuda.is_available() and recipe.compute.gpus_per_worker > 0:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    use_cpus(recipe.compute.cpus_per_worker)
    if not job.data.folder.is_dir() and not step.storage.remote:
        return {"error": f"--out is not on storage that this node shares: {job.data.folder} is not there"}
    try:
        with one_writer(job, step) as kept, Notice() as notice:
            profile = step.folder if job.profile else None
            log = job.log(seed, "train")
            result = stages.train_stage(recipe, job.dataset, seed, step.folder, log, profile, kept, notice)
        return {"made": keep(step, result) if ranks.rank() == 0 else Made(result, {}, {})}
    except (DivergedError, ValueError) as error:
        if isinstance(error, DivergedError) and ranks.rank() == 0:
            forget(step)  # the same command tries again from the beginning, also on another machine
        return {"error": f"{type(error).__name__}: {error}"}


@contextmanager
def one_writer(job: Job, step: Step) -> Iterator[Kept]:
    """Every rank goes on once rank 0 alone writes the step's files and what it reads is on this machine."""
    with ExitStack() as stack:
        kept: Kept = nothing
        if ranks.rank() == 0:
            kept = stack.enter_context(resuming(step))
            fetch(job.data)
        ranks.barrier()
        yield kept


@contextmanager
def scratch(step: Step) -> Iterator[Path]:
    """A folder of this machine for Ray Train's own notes; all that must last is the step's. It is named by the step,
    which one process at a time does: what a killed one left goes with the next."""
    path = Path(tempfile.gettempdir()) / f"hedgemix-train-{os.getuid()}-{config_hash(str(step.folder))}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@ray.remote(num_cpus=0, max_retries=0, resources=HEAD)
def train_seed(job: Job, step: Step, seed: int) -> dict[str, Any]:
    """Ray Train's job for one seed: all workers on one node, restarted up to `max_restarts` times; each start goes on
    from the checkpoint in the step's folder with the budget that is left."""
    # Half a second to import, which the other tasks' processes do not have to spend.
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    compute = job.recipe.compute

    def fit() -> Made:
        per_worker = {"CPU": compute.cpus_per_worker}
        if compute.gpus_per_worker:
            per_worker["GPU"] = compute.gpus_per_worker
        with scratch(step) as notes:
            trainer = TorchTrainer(
                train_worker,
                train_loop_config={"job": job, "seed": seed, "step": step},
                torch_config=TorchConfig(backend=backend(compute.gpus_per_worker), timeout_s=600),
                scaling_config=ScalingConfig(
                    num_workers=compute.workers,
                    use_gpu=bool(compute.gpus_per_worker),
                    resources_per_worker=per_worker,
                    placement_strategy="STRICT_PACK",
                ),
                run_config=RunConfig(
                    name=f"seed{seed}-{uuid.uuid4().hex[:8]}",
                    storage_path=str(notes),
                    failure_config=FailureConfig(
                        max_failures=compute.max_restarts, max_preemption_failures=compute.max_restarts
                    ),
                ),
            )
            told = trainer.fit().return_value
        if "error" in told:
            raise RuntimeError(told["error"])
        return told["made"]

    return perform(step, fit, job.origin)


def score_full(job: Job, step: Step, train: Step, seed: int) -> dict[str, Any]:
    use_cpus(job.recipe.compute.cpus_per_worker)
    log = job.log(seed, "score")

    def work() -> Made:
        with clocked(step):
            reads = fetch(train, "weights.pt") | fetch(job.data)
            return keep(step, stages.score_stage(job.recipe, job.dataset, train.folder, log), reads)

    return perform(step, work, job.origin)


def quantize(job: Job, step: Step, train: Step, seed: int) -> dict[str, Any]:
    use_cpus(job.recipe.compute.cpus_per_worker)
    job.log(seed, "quantize")({})

    def work() -> Made:
        with clocked(step):
            reads = fetch(train, "weights.pt", "moments.pt") | fetch(job.data)
            room = stages.artifact_room(job.recipe, job.code_bytes)
            result = stages.quantize_stage(job.recipe, job.dataset, seed, train.folder, step.folder, room)
            return keep(step, result, reads)

    return perform(step, work, job.origin)


def count(job: Job, step: Step) -> dict[str, Any]:
    """The n-gram index of the validation text, shared by every seed."""

    def work() -> Made:
        with clocked(step):
            reads = fetch(job.data)
            return keep(step, stages.counts_stage(job.recipe, job.dataset, step.folder), reads)

    return perform(step, work, job.origin)


def evaluate_rank(job: Job, steps: SeedSteps, counts: Step) -> Made:
    """One rank of the evaluation; what rank 0 returns tells the files too."""
    use_cpus(job.evaluate_cpus)
    step, log = steps.evaluate, job.log(steps.seed, "evaluate")
    with one_writer(job, step) as kept, Notice() as notice:
        reads = fetch(steps.quantize, stages.ARTIFACT) | fetch(counts) if ranks.rank() == 0 else {}
        ranks.barrier()
        artifact, index = steps.quantize.folder / stages.ARTIFACT, counts.folder / stages.INDEX
        result = stages.evaluate_stage(
            job.recipe, job.dataset, artifact, index, step.folder, log, job.profile, kept, notice
        )
        result["code_bytes"] = job.code_bytes
        return keep(step, result, reads) if ranks.rank() == 0 else Made(result, {}, {})


def evaluate(job: Job, steps: SeedSteps, counts: Step) -> dict[str, Any]:
    """The score, by one rank in this process or by a gang this task waits for."""
    compute, step = job.recipe.compute, steps.evaluate

    def work() -> Made:
        if compute.evaluate_workers == 1:
            return evaluate_rank(job, steps, counts)
        gpus = compute.gpus_per_worker
        gang = Gang(step.name, compute.evaluate_workers, job.evaluate_cpus, gpus, backend(gpus))
        return run_gang(gang, evaluate_rank, (job, steps, counts))

    result = perform(step, work, job.origin)
    forget(step)
    return result


def task(job: Job, function: Callable[..., Any]) -> Any:
    """As a Ray task. On a GPU in a process of its own: a worker that Ray used again would keep the memory, and the
    choice, of its first GPU. On a CPU in one that is there already, with its imports, a few seconds sooner. The driver
    starts lost tasks again, so that one place counts."""
    return ray.remote(max_calls=1 if job.recipe.compute.gpus_per_worker else 0, max_retries=0)(function)


def one_worker(job: Job) -> dict[str, Any]:
    """The resources of a task that uses one worker's share of a node."""
    compute = job.recipe.compute
    return {"num_cpus": compute.cpus_per_worker, "num_gpus": compute.gpus_per_worker}


def start_quantize(job: Job, steps: SeedSteps) -> Any:
    return task(job, quantize).options(**one_worker(job)).remote(job, steps.quantize, steps.train, steps.seed)


def start_score(job: Job, steps: SeedSteps) -> Any:
    return task(job, score_full).options(**one_worker(job)).remote(job, steps.score, steps.train, steps.seed)


def start_evaluation(job: Job, steps: SeedSteps, counts: Step) -> Any:
    compute = job.recipe.compute
    alone = {"num_cpus": job.evaluate_cpus, "num_gpus": compute.gpus_per_worker}
    options = alone if compute.evaluate_workers == 1 else {"num_cpus": 0, "resources": HEAD}
    return task(job, evaluate).options(**options).remote(job, steps, counts)


def start_counts(job: Job, counts: Step) -> Any:
    return task(job, count).options(num_cpus=1, resources=HEAD).remote(job, counts)
