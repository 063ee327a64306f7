"""The steps but training as Ray tasks, and a gang of ranks for a parallel evaluation.

Every task is idempotent: it does its step unless the step's result.json is there, and writes that last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray

from hedgemix import stages
from hedgemix.runtime import collectives
from hedgemix.runtime.collectives import backend
from hedgemix.runtime.layout import MOMENTS, WEIGHTS
from hedgemix.stages import RunOptions
from pipeline.execution.failures import RAY_RETRIES
from pipeline.execution.job import HEAD, Job, one_writer, perform_step, use_cpus
from pipeline.execution.preemption import Notice
from pipeline.execution.rank_group import Gang, run_gang
from pipeline.steps.graph import SeedSteps
from pipeline.steps.recovery import clocked, forget
from pipeline.steps.step import Made, Step, fetch, save_outputs


def score_full(job: Job, step: Step, train: Step, seed: int) -> dict[str, Any]:
    """Score the full-precision weights; returns the step's result."""
    use_cpus(job.recipe.compute.cpus_per_worker)

    def work() -> Made:
        with clocked(step):
            reads = fetch(train, WEIGHTS) | fetch(job.plan.data)
            result = stages.score_stage(
                recipe=job.recipe, dataset=job.plan.dataset, train_folder=train.folder, log=job.log(seed, "score")
            )
            return save_outputs(step, asdict(result), reads)

    return perform_step(job, step, work)


def quantize(job: Job, step: Step, train: Step, seed: int) -> dict[str, Any]:
    """Quantize the trained weights into an artifact; returns the step's result."""
    use_cpus(job.recipe.compute.cpus_per_worker)
    job.log(seed, "quantize")({})

    def work() -> Made:
        with clocked(step):
            reads = fetch(train, WEIGHTS, MOMENTS) | fetch(job.plan.data)
            result = stages.quantize_stage(
                recipe=job.recipe,
                dataset=job.plan.dataset,
                seed=seed,
                train_folder=train.folder,
                folder=step.folder,
                room_bytes=job.plan.room_bytes,
            )
            return save_outputs(step, asdict(result), reads)

    return perform_step(job, step, work)


def count(job: Job, step: Step) -> dict[str, Any]:
    """Build the n-gram index of the validation text, shared by every seed; returns the step's result."""

    def work() -> Made:
        with clocked(step):
            reads = fetch(job.plan.data)
            result = stages.counts_stage(recipe=job.recipe, dataset=job.plan.dataset, folder=step.folder)
            return save_outputs(step, asdict(result), reads)

    return perform_step(job, step, work)


def evaluate_rank(job: Job, steps: SeedSteps, counts: Step) -> Made:
    """Run one rank of the evaluation; what rank 0 returns tells the files too."""
    use_cpus(job.evaluate_cpus)
    step = steps.evaluate
    with one_writer(job, step) as kept, Notice() as notice:
        reads = fetch(steps.quantize, stages.ARTIFACT) | fetch(counts) if collectives.rank() == 0 else {}
        collectives.barrier()
        result = stages.evaluate_stage(
            recipe=job.recipe,
            dataset=job.plan.dataset,
            artifact_path=steps.quantize.folder / stages.ARTIFACT,
            index_folder=counts.folder / stages.INDEX,
            folder=step.folder,
            options=RunOptions(
                log=job.log(steps.seed, "evaluate"), profile=job.profile, on_file_written=kept, preempted=notice
            ),
        )
        told = asdict(result) | {"code_bytes": job.plan.code_bytes, "evaluate_workers": collectives.world_size()}
        return save_outputs(step, told, reads) if collectives.rank() == 0 else Made(told, {}, {})


def evaluate(job: Job, steps: SeedSteps, counts: Step) -> dict[str, Any]:
    """Evaluate the artifact, by one rank in this process or by a gang this task waits for; returns the step's
    result."""
    compute, step = job.recipe.compute, steps.evaluate

    def work() -> Made:
        if compute.evaluate_workers == 1:
            return evaluate_rank(job, steps, counts)
        gpus = compute.gpus_per_worker
        gang = Gang(step.name, compute.evaluate_workers, job.evaluate_cpus, gpus, backend(gpus))
        return run_gang(gang, evaluate_rank, (job, steps, counts))

    result = perform_step(job, step, work)
    forget(step)
    return result


def task(job: Job, function: Callable[..., Any]) -> Any:
    """Make a function a Ray task. On a GPU in a process of its own: a worker that Ray used again would keep the memory,
    and the choice, of its first GPU. On a CPU in one that is there already, with its imports, a few seconds sooner. The
    driver starts lost tasks again, so that one place counts."""
    return ray.remote(max_calls=1 if job.recipe.compute.gpus_per_worker else 0, max_retries=RAY_RETRIES)(function)


def one_worker(job: Job) -> dict[str, Any]:
    """Return the resources of a task that uses one worker's share of a node."""
    compute = job.recipe.compute
    return {"num_cpus": compute.cpus_per_worker, "num_gpus": compute.gpus_per_worker}


def start_quantize(job: Job, steps: SeedSteps) -> Any:
    """Start `quantize` for a seed; returns Ray's reference to its result."""
    return task(job, quantize).options(**one_worker(job)).remote(job, steps.quantize, steps.train, steps.seed)


def start_score(job: Job, steps: SeedSteps) -> Any:
    """Start `score_full` for a seed; returns Ray's reference to its result."""
    return task(job, score_full).options(**one_worker(job)).remote(job, steps.score, steps.train, steps.seed)


def start_evaluation(job: Job, steps: SeedSteps, counts: Step) -> Any:
    """Start `evaluate` for a seed; returns Ray's reference to its result. A task that waits for a gang takes no CPUs
    itself."""
    compute = job.recipe.compute
    alone = {"num_cpus": job.evaluate_cpus, "num_gpus": compute.gpus_per_worker}
    options = alone if compute.evaluate_workers == 1 else {"num_cpus": 0, "resources": HEAD}
    return task(job, evaluate).options(**options).remote(job, steps, counts)


def start_counts(job: Job, counts: Step) -> Any:
    """Start `count`; returns Ray's reference to its result."""
    return task(job, count).options(num_cpus=1, resources=HEAD).remote(job, counts)
