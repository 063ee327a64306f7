"""One record as the driver moves it: what stands of its seeds, what may start, and its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from rich.console import Console

from hedgemix import stages
from pipeline.execution import tasks
from pipeline.execution.job import Job
from pipeline.execution.ledger import Ledger, Task
from pipeline.execution.resources import on_cluster
from pipeline.execution.train_job import train_seed
from pipeline.monitor import metrics
from pipeline.results.row import build_row
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.steps.graph import RecordPlan, SeedSteps
from pipeline.steps.recovery import set_aside
from pipeline.steps.step import DamagedStepError, Step, check
from pipeline.storage.lease import Held
from pipeline.tracking.follower import Trackers

STAGES = ("train", "quantize", "score", "evaluate")


@dataclass
class Drive:
    """Drives one record; what is at work is in the ledger, which other records of the command share."""

    plan: RecordPlan
    job: Job
    console: Console
    trackers: Trackers
    ledger: Ledger
    held: Held | None = None
    """The record's lock, if it is held."""
    errors: dict[int, str] = field(default_factory=dict)
    records: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """What stands of each seed, by the kind of step; read when a task ends, not every moment."""
    counted: dict[str, Any] | None = None

    @property
    def seeds(self) -> dict[int, SeedSteps]:
        """Return the steps of every seed."""
        return self.plan.seeds

    def reads(self, step: Step) -> bool:
        """Say whether the step is one of this record's."""
        return step.name == self.plan.counts.name or any(self.sharing(step))

    def sharing(self, step: Step) -> Iterable[int]:
        """Yield the seeds that have this step."""
        return (seed for seed, steps in self.seeds.items() if step.name in {each.name for each in steps.all()})

    def look(self) -> None:
        """Read what stands. What was made from files that since had to be made again does not, and is set aside."""
        self.counted = self.plan.counts.record()
        for seed, steps in self.seeds.items():
            if seed in self.records and self.done(seed):
                continue
            self.records[seed], fallen = steps.judge()
            for step in steps.all():
                if step.kind in fallen and self.ledger.task(step) is None:
                    set_aside(step, fallen[step.kind])

    def check_artifacts(self) -> None:
        """Set aside a finished artifact that storage damaged, so that it is made again: it is what a record is
        about."""
        for seed, steps in self.seeds.items():
            if quantized := self.records[seed].get("quantize"):
                try:
                    check(steps.quantize, stages.ARTIFACT, quantized["files"].get(stages.ARTIFACT))
                except DamagedStepError as damaged:
                    self.console.print(f"damaged, made again: {damaged}", markup=False, soft_wrap=True)
                    set_aside(steps.quantize)
                    self.drop(steps.quantize)

    def drop(self, step: Step) -> None:
        """Forget that the step stood: it was set aside."""
        for seed in self.sharing(step):
            self.records[seed].pop(step.kind, None)

    def fail(self, step: Step, why: str) -> None:
        """Let the seeds fail that need this step, which failed for good."""
        for seed in self.sharing(step):
            if not self.stands(seed, step.kind):
                self.errors.setdefault(seed, why)

    def done(self, seed: int) -> bool:
        """Say whether every step of the seed stands."""
        return len(self.records[seed]) == len(STAGES)

    def stands(self, seed: int, stage: str) -> bool:
        """Say whether the seed's step of this stage is done."""
        return stage in self.records[seed]

    def unfinished(self) -> list[int]:
        """List the seeds that have not failed and still have steps to do."""
        return [seed for seed in self.seeds if seed not in self.errors and not self.done(seed)]

    def evaluating(self) -> bool:
        """Say whether a trained seed still has steps to do."""
        return any(self.stands(seed, "train") for seed in self.unfinished())

    def start(self, stage: str, step: Step, seed: int | None, begin: Callable[..., Any], *arguments: Any) -> bool:
        """Start the step by calling `begin(*arguments)`, which returns Ray's reference, if it may start; says whether
        it did."""
        if not self.ledger.ready(step):
            return False
        self.ledger.running[begin(*arguments)] = Task(step, self.plan.name, seed, stage)
        return True

    def launch(self, training_slots: int) -> None:
        """Start every step whose inputs are done, of the training jobs as many as there are slots, in the order of
        seeds."""
        job, counts = self.job, self.plan.counts
        if not self.counted:
            self.start("count", counts, None, tasks.start_counts, job, counts)
        for seed in self.unfinished():
            steps = self.seeds[seed]
            if self.stands(seed, "train"):
                self.launch_after_training(steps)
            elif training_slots > 0:
                given = job, steps.train, seed, not on_cluster()
                training_slots -= self.start("train", steps.train, seed, train_seed.remote, *given)

    def launch_after_training(self, steps: SeedSteps) -> None:
        """Start the steps of a trained seed whose inputs are done."""
        job, counts, seed = self.job, self.plan.counts, steps.seed
        if not self.stands(seed, "quantize"):
            self.start("quantize", steps.quantize, seed, tasks.start_quantize, job, steps)
        if not self.stands(seed, "score"):
            self.start("score", steps.score, seed, tasks.start_score, job, steps)
        if not self.stands(seed, "quantize") or self.stands(seed, "evaluate"):
            return
        if self.counted:
            self.start("evaluate", steps.evaluate, seed, tasks.start_evaluation, job, steps, counts)
        elif why := self.ledger.failed.get(counts.name):
            self.errors[seed] = why

    def rows(self) -> list[Row]:
        """Build the table's row of every seed as it stands."""
        return [
            build_row(self.plan, seed, self.records[seed], self.counted, self.errors.get(seed)) for seed in self.seeds
        ]

    def write_rows(self) -> None:
        """Write the table as it stands, and tell the board and the trackers; a write that storage refuses now is made
        up for by the next."""
        rows = self.rows()
        with contextlib.suppress(OSError):
            write_rows(self.plan.storage, rows, self.held)
        with contextlib.suppress(RayError):
            for row in rows:
                self.job.board.row.remote(row.record, row.seed, metrics.row_numbers(row))
        self.trackers.rows(rows)

    def states(self, board: dict[tuple[str, int], dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Collect what the view shows of each seed: the board's records, overruled by what the driver knows. A step
        that another record's task does is told as that task tells it."""
        return {seed: self.state(seed, board) for seed in self.seeds}

    def state(self, seed: int, board: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
        """Tell one seed's stage, and its progress where it tells any."""
        if self.done(seed):
            bpb = self.records[seed]["evaluate"]["result"]["bpb_final"]
            return {"stage": "done", "fraction": 1.0, "bpb": bpb}
        if seed in self.errors:
            return {"stage": "failed", "detail": self.errors[seed]}
        working = [task for step in self.seeds[seed].all() if (task := self.ledger.task(step))]
        for task in working:
            told = board.get((task.record, seed), {})
            if told.get("stage") == task.stage:
                return told
        return {"stage": f"starting {working[0].stage}" if working else "waiting"}
