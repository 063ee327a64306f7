"""What every task of one record is given, and how the ranks of a task begin its work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hedgemix.config import Recipe
from hedgemix.runtime import collectives
from hedgemix.runtime.files import Log, OnFileWritten, no_copy
from pipeline.steps.graph import RecordPlan
from pipeline.steps.recovery import resuming
from pipeline.steps.step import Made, Step, fetch, perform

HEAD = {"node:__internal_head__": 0.001}
"""Keeps a task that only waits on the node of the driver, off machines that may be taken away."""


@dataclass(frozen=True)
class Job:
    """Holds what every task of one record is given; small, so it travels by value."""

    plan: RecordPlan
    recipe: Recipe
    """The plan's, with compute.cpus_per_worker resolved."""
    evaluate_cpus: float
    """CPUs of one evaluating rank."""
    origin: dict[str, Any]
    """Versions and git state of the driver's tree."""
    profile: bool
    """Write profiles of training and evaluation into their steps' folders."""
    board: Any
    """The progress board's actor handle."""

    def log(self, seed: int, stage: str) -> Log:
        """Make the function that tells one stage's progress, from rank 0 to the board; fire and forget."""
        if collectives.rank() != 0:
            return lambda record: None
        return lambda record: self.board.put.remote(self.plan.name, seed, stage, record)


def perform_step(job: Job, step: Step, work: Callable[[], Made]) -> dict[str, Any]:
    """Do the step as `perform` does, in a process that ends, with all that it started, when another has taken the step
    over: it must not write on where the other writes. The driver tries a lost step again, and finds it done."""
    return perform(step, work, job.origin, on_lost=end_process)


def end_process() -> None:
    """End this process at once."""
    os.write(2, b"another process has taken this step over; this one ends\n")
    os._exit(1)


def use_cpus(cpus: float) -> None:
    """Let torch use so many threads, at least one, in this process."""
    torch.set_num_threads(max(1, int(cpus)))


@contextmanager
def one_writer(job: Job, step: Step) -> Iterator[OnFileWritten]:
    """Let every rank go on once rank 0 alone writes the step's files and what it reads is on this machine; yields what
    keeps copies of files (`resuming`), on other ranks a function that does nothing."""
    with ExitStack() as stack:
        kept: OnFileWritten = no_copy
        if collectives.rank() == 0:
            kept = stack.enter_context(resuming(step))
            fetch(job.plan.data)
        collectives.barrier()
        yield kept
