"""Training as Ray Train's job: every worker is a rank, and all of them are on one node."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from hedgemix import stages
from hedgemix.config import config_hash
from hedgemix.runtime import collectives
from hedgemix.runtime.collectives import backend
from hedgemix.stages import RunOptions
from hedgemix.train.step_log import DivergedError
from pipeline.execution.failures import MISTAKES, RAY_RETRIES, ray_train_restarts
from pipeline.execution.job import HEAD, Job, one_writer, perform_step, use_cpus
from pipeline.execution.preemption import Notice
from pipeline.execution.process_group import COLLECTIVE_TIMEOUT
from pipeline.steps.recovery import forget
from pipeline.steps.step import Made, Step, save_outputs


def train_worker(job: Job, step: Step, seed: int) -> dict[str, Any]:
    """Train as one Ray Train worker: a rank of the seed's training. A user's mistake is returned, not raised: Ray Train
    would take it for a lost worker and try again."""
    recipe = job.recipe
    if torch.cuda.is_available() and recipe.compute.gpus_per_worker > 0:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    use_cpus(recipe.compute.cpus_per_worker)
    if not job.plan.data.folder.is_dir() and not step.storage.remote:
        return {"error": f"--out is not on storage that this node shares: {job.plan.data.folder} is not there"}
    try:
        with one_writer(job, step) as kept, Notice() as notice:
            result = stages.train_stage(
                recipe=recipe,
                dataset=job.plan.dataset,
                seed=seed,
                folder=step.folder,
                options=RunOptions(
                    log=job.log(seed, "train"), profile=job.profile, on_file_written=kept, preempted=notice
                ),
            )
        told = asdict(result)
        return {"made": save_outputs(step, told) if collectives.rank() == 0 else Made(told, {}, {})}
    except MISTAKES as error:
        if isinstance(error, DivergedError) and collectives.rank() == 0:
            forget(step)  # the same command tries again from the beginning, also on another machine
        return {"error": f"{type(error).__name__}: {error}"}


@contextmanager
def scratch(step: Step) -> Iterator[Path]:
    """Make a folder of this machine for Ray Train's own notes; all that must last is the step's. It is named by the
    step, which one process at a time does: what a killed one left goes with the next."""
    path = Path(tempfile.gettempdir()) / f"hedgemix-train-{os.getuid()}-{config_hash(str(step.folder))}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@ray.remote(num_cpus=0, max_retries=RAY_RETRIES, resources=HEAD)
def train_seed(job: Job, step: Step, seed: int, alone: bool) -> dict[str, Any]:
    """Run Ray Train's job for one seed: all workers on one node, restarted up to `max_restarts` times; each start goes
    on from the checkpoint in the step's folder with the budget that is left. alone: this Ray is of this machine alone.
    Raises RuntimeError with the mistake that a worker returned."""
    # Half a second to import, which the other tasks' processes do not have to spend.
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from pipeline.execution.trainer import Gloo, Trainer

    compute = job.recipe.compute

    def fit() -> Made:
        per_worker = {"CPU": compute.cpus_per_worker}
        if compute.gpus_per_worker:
            per_worker["GPU"] = compute.gpus_per_worker
            from ray.train.torch import TorchConfig

            ranks = TorchConfig(
                backend=backend(compute.gpus_per_worker), timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())
            )
        else:
            ranks = Gloo()
        with scratch(step) as notes:
            trainer = Trainer(
                partial(
                    train_worker, job, step, seed
                ),  # as a configuration the controller would read it, and import torch
                alone=alone,
                backend_config=ranks,
                scaling_config=ScalingConfig(
                    num_workers=compute.workers,
                    use_gpu=bool(compute.gpus_per_worker),
                    resources_per_worker=per_worker,
                    placement_strategy="STRICT_PACK",
                ),
                run_config=RunConfig(
                    name=step.name,
                    storage_path=str(notes),
                    failure_config=FailureConfig(**ray_train_restarts(compute)),
                ),
            )
            told = trainer.fit().return_value
        if "error" in told:
            raise RuntimeError(told["error"])
        return told["made"]

    return perform_step(job, step, fit)
