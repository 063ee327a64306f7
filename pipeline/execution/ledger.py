"""What one command has at work over all of its records: steps by their names, so that records that share one do it
once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.execution.failures import Restarts
from pipeline.steps.step import Step


@dataclass(frozen=True)
class Task:
    """Names what a Ray task does: a step, and for which record, seed (None: all of them) and stage it was started."""

    step: Step
    record: str
    seed: int | None
    stage: str


@dataclass
class Ledger:
    """Keeps which steps are at work and which failed for good in this command; a step that is at work for one record is
    so for all."""

    restarts: Restarts
    running: dict[Any, Task] = field(default_factory=dict)
    """By Ray's reference to the task."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why, by the step's name."""

    def task(self, step: Step) -> Task | None:
        """Return the task that does this step now."""
        return next((task for task in self.running.values() if task.step.name == step.name), None)

    def ready(self, step: Step) -> bool:
        """Say whether the step may start: it has not failed, is not at work, and has rested since it was lost."""
        return step.name not in self.failed and self.task(step) is None and self.restarts.rested(step.name)

    def training(self) -> list[Task]:
        """List the training jobs that are at work, or wait for their machine."""
        return [task for task in self.running.values() if task.stage == "train"]
