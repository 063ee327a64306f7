"""Each step as a Ray job: Ray Train for training, tasks for the rest, a gang of ranks for a parallel evaluation.

Every task is idempotent: it does its step unless the step's result.json is there, and writes that last.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from hedgemix import ranks
from hedgemix.config import Recipe
from hedgemix.dataset import Dataset
from hedgemix.files import Log
from hedgemix.train import DivergedError
from pipeline import stages
from pipeline.gang import Gang, run_gang
from pipeline.runs import SeedSteps, Step, perform

HEAD = {"node:__internal_head__": 0.001}
"""Keeps a task that only waits on the node of the driver, off machines that may be taken away."""

RETRIED: dict[str, Any] = {"max_retries": 2, "retry_exceptions": [OSError]}


@dataclass(frozen=True)
class Job:
    """What every task of one record is given; small, so it travels by value."""

    recipe: Recipe
    """With compute.cpus_per_worker resolved."""
    dataset: Dataset
    evaluate_cpus: float
    """CPUs of one evaluating rank."""
    origin: dict[str, Any]
    """Versions and git state of the driver's tree."""
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
    job, seed, folder = config["job"], config["seed"], Path(config["folder"])
    recipe = job.recipe
    if torch.cuda.is_available() and recipe.compute.gpus_per_worker > 0:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    use_cpus(recipe.compute.cpus_per_worker)
    if not folder.is_dir():  # the driver's machine made it
        return {"error": f"--out is not on storage that this node shares: {folder} is not there"}
    try:
        return stages.train_stage(recipe, job.dataset, seed, folder, job.log(seed, "train"), job.profile)
    except (DivergedError, ValueError) as error:
        if isinstance(error, DivergedError) and ranks.rank() == 0:
            (folder / "checkpoint.pt").unlink(missing_ok=True)  # the same command tries again from the beginning
        return {"error": f"{type(error).__name__}: {error}"}


@ray.remote(num_cpus=0, max_retries=0, resources=HEAD)
def train_seed(job: Job, step: Step, seed: int) -> dict[str, Any]:
    """Ray Train's job for one seed: all workers on one node, restarted up to `max_restarts` times; each start goes on
    from the checkpoint in the step's folder with the budget that is left."""
    # Half a second to import, which the other tasks' processes do not have to spend.
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    compute = job.recipe.compute

    def fit() -> dict[str, Any]:
        scratch = step.folder / "ray"
        shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was killed
        per_worker = {"CPU": compute.cpus_per_worker}
        if compute.gpus_per_worker:
            per_worker["GPU"] = compute.gpus_per_worker
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job, "seed": seed, "folder": str(step.folder)},
            torch_config=TorchConfig(backend="nccl" if compute.gpus_per_worker else "gloo", timeout_s=600),
            scaling_config=ScalingConfig(
                num_workers=compute.workers,
                use_gpu=bool(compute.gpus_per_worker),
                resources_per_worker=per_worker,
                placement_strategy="STRICT_PACK",
            ),
            run_config=RunConfig(
                name=f"seed{seed}-{uuid.uuid4().hex[:8]}",
                storage_path=str(scratch),
                failure_config=FailureConfig(
                    max_failures=compute.max_restarts, max_preemption_failures=compute.max_restarts
                ),
            ),
        )
        result = trainer.fit().return_value
        if "error" in result:
            raise RuntimeError(result["error"])
        shutil.rmtree(scratch, ignore_errors=True)  # Ray's bookkeeping; our checkpoints are beside it
        return result

    return perform(step, fit, job.origin)


def score_full(job: Job, step: Step, train: Step, seed: int) -> dict[str, Any]:
    use_cpus(job.recipe.compute.cpus_per_worker)
    log = job.log(seed, "score")
    return perform(step, lambda: stages.score_stage(job.recipe, job.dataset, train.folder, log), job.origin)


def quantize(job: Job, step: Step, train: Step, seed: int) -> dict[str, Any]:
    use_cpus(job.recipe.compute.cpus_per_worker)
    job.log(seed, "quantize")({})
    work = partial(stages.quantize_stage, job.recipe, job.dataset, seed, train.folder, step.folder)
    return perform(step, work, job.origin)


def count(job: Job, step: Step) -> dict[str, Any]:
    """The n-gram index of the validation text, shared by every seed."""
    return perform(step, lambda: stages.counts_stage(job.recipe, job.dataset, step.folder), job.origin)


def evaluate_rank(job: Job, artifact: str, counts: str, folder: str, seed: int) -> dict[str, Any]:
    use_cpus(job.evaluate_cpus)
    log = job.log(seed, "evaluate")
    return stages.evaluate_stage(job.recipe, job.dataset, Path(artifact), Path(counts), Path(folder), log, job.profile)


def evaluate(job: Job, step: Step, artifact: str, counts: str, seed: int) -> dict[str, Any]:
    """The score, by one rank in this process or by a gang this task waits for."""
    compute = job.recipe.compute
    arguments = (job, artifact, counts, str(step.folder), seed)
    if compute.evaluate_workers == 1:
        return perform(step, lambda: evaluate_rank(*arguments), job.origin)
    gang = Gang(step.name, compute.evaluate_workers, job.evaluate_cpus, compute.gpus_per_worker)
    return perform(step, lambda: run_gang(gang, evaluate_rank, arguments), job.origin)


def task(job: Job, function: Callable[..., Any]) -> Any:
    """As a Ray task. On a GPU in a process of its own: a worker that Ray used again would keep the memory, and the
    choice, of its first GPU. On a CPU in one that is there already, with its imports, a few seconds sooner."""
    return ray.remote(max_calls=1 if job.recipe.compute.gpus_per_worker else 0, **RETRIED)(function)


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
    artifact, index = steps.quantize.folder / stages.ARTIFACT, counts.folder / stages.INDEX
    return task(job, evaluate).options(**options).remote(job, steps.evaluate, str(artifact), str(index), steps.seed)


def start_counts(job: Job, counts: Step) -> Any:
    return task(job, count).options(num_cpus=1, resources=HEAD).remote(job, counts)
