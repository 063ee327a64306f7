"""The driver of one record: every seed through train, quantize and evaluate, as resources allow, to one table.

It holds no state of its own: what is done stands on disk, so the same command again does only what is missing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from rich.console import Console

from hedgemix import stages
from hedgemix.config import RecipeError
from hedgemix.runtime.layout import ERROR
from hedgemix.standalone import script
from pipeline.execution import tasks
from pipeline.execution.failures import COLOURS, Fail, Place, Repair, Restarts, classify, explain
from pipeline.execution.job import Job
from pipeline.execution.resources import check_capacity, on_cluster, resolve_cpus, training_slots
from pipeline.execution.train_job import train_seed
from pipeline.monitor import metrics
from pipeline.monitor.board import BoardActor
from pipeline.monitor.live_view import View
from pipeline.results.provenance import origin
from pipeline.results.row import build_row
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.steps.graph import RecordPlan, SeedSteps
from pipeline.steps.recovery import set_aside
from pipeline.steps.step import DamagedStepError, Step, check
from pipeline.tracking.follower import Trackers, follow
from pipeline.tracking.tracked_record import TrackedRecord

POLL_SECONDS = 0.5
STAGES = ("train", "quantize", "score", "evaluate")


@dataclass
class Drive:
    """Drives one record; `running` maps a Ray task to its seed (None: shared) and stage."""

    plan: RecordPlan
    job: Job
    console: Console
    trackers: Trackers
    restarts: Restarts
    errors: dict[int, str] = field(default_factory=dict)
    count_error: str = ""
    running: dict[Any, Place] = field(default_factory=dict)
    records: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """What stands of each seed, by the kind of step; read when a task ends, not every moment."""
    counted: dict[str, Any] | None = None
    heard_ns: int = 0
    """The time of the last progress record that was passed on."""

    @property
    def seeds(self) -> dict[int, SeedSteps]:
        """Return the steps of every seed."""
        return self.plan.seeds

    def look(self) -> None:
        """Read what stands. What was made from files that since had to be made again does not, and is set aside."""
        self.counted = self.plan.counts.record()
        for seed, steps in self.seeds.items():
            if seed in self.records and self.done(seed):
                continue
            self.records[seed] = steps.records()
            for step in steps.all():
                if step.kind not in self.records[seed] and not self.busy(seed, step.kind):
                    set_aside(step)

    def check_artifacts(self) -> None:
        """Set aside a finished artifact that storage damaged, so that it is made again: it is what a record is
        about."""
        for seed, steps in self.seeds.items():
            if quantized := self.records[seed].get("quantize"):
                try:
                    check(steps.quantize, stages.ARTIFACT, quantized["files"].get(stages.ARTIFACT))
                except DamagedStepError as damaged:
                    self.repair(seed, steps.quantize, damaged)

    def repair(self, seed: int | None, step: Step, damaged: DamagedStepError) -> None:
        """Set aside a damaged step, so that `launch` starts it again. seed: None for the shared counts."""
        self.console.print(f"damaged, made again: {damaged}", markup=False, soft_wrap=True)
        set_aside(step)
        if seed is not None:
            self.records[seed].pop(step.kind, None)

    def done(self, seed: int) -> bool:
        """Say whether every step of the seed stands."""
        return len(self.records[seed]) == len(STAGES)

    def stands(self, seed: int, stage: str) -> bool:
        """Say whether the seed's step of this stage is done."""
        return stage in self.records[seed]

    def busy(self, seed: int | None, stage: str) -> bool:
        """Say whether the stage is running, or about to."""
        return (seed, stage) in self.running.values()

    def ready(self, seed: int | None, stage: str) -> bool:
        """Say whether the stage may start: it is not running, and has rested since it was lost."""
        return not self.busy(seed, stage) and self.restarts.rested((seed, stage))

    def unfinished(self) -> bool:
        """Say whether a seed that has not failed still has steps to do."""
        return any(not self.done(seed) for seed in self.seeds if seed not in self.errors)

    def evaluating(self) -> bool:
        """Say whether a trained seed still has steps to do."""
        return any(self.stands(seed, "train") and not self.done(seed) for seed in self.seeds if seed not in self.errors)

    def launch(self) -> None:
        """Start everything whose inputs are done. On a machine of our own, training only starts where it fits now, in
        the order of seeds, and once those trained before are evaluated: its processes would share the cores of a timed
        evaluation. A cluster is told of all seeds, so that it can grow, and places them as nodes come free."""
        if not self.counted and not self.count_error and self.ready(None, "count"):
            self.running[tasks.start_counts(self.job, self.plan.counts)] = (None, "count")
        slots = len(self.seeds) if on_cluster() else 0 if self.evaluating() else training_slots(self.job.recipe)
        slots -= sum(stage == "train" for _, stage in self.running.values())
        for seed, steps in self.seeds.items():
            if seed in self.errors or self.done(seed):
                continue
            if not self.stands(seed, "train"):
                if slots > 0 and self.ready(seed, "train"):
                    self.running[train_seed.remote(self.job, steps.train, seed, not on_cluster())] = (seed, "train")
                    slots -= 1
                continue
            for stage, start in (("quantize", tasks.start_quantize), ("score", tasks.start_score)):
                if not self.stands(seed, stage) and self.ready(seed, stage):
                    self.running[start(self.job, steps)] = (seed, stage)
            if not self.stands(seed, "quantize") or self.stands(seed, "evaluate") or not self.ready(seed, "evaluate"):
                continue
            if self.counted:
                self.running[tasks.start_evaluation(self.job, steps, self.plan.counts)] = (seed, "evaluate")
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
                self.failed(seed, stage, error)
        if done:
            with contextlib.suppress(OSError):  # storage fails for a moment: a step that is done answers at once
                self.look()
        return bool(done)

    def failed(self, seed: int | None, stage: str, error: Exception) -> None:
        """Start the stage again if that is worth it (`failures`), or let the seed fail."""
        verdict = classify(error)
        if not isinstance(verdict, Fail) and self.restarts.grant((seed, stage)):
            if isinstance(verdict, Repair):
                steps = (*(self.seeds[seed].all() if seed is not None else ()), self.plan.counts)
                for step in steps:
                    if step.name == verdict.damaged.step:
                        self.repair(seed, step, verdict.damaged)
            else:
                who = "counts" if seed is None else f"seed {seed}: {stage}"
                self.console.print(f"{who} was lost, starts again: {explain(error)}", markup=False, soft_wrap=True)
            return
        message = f"{stage}: {explain(error)}"
        if seed is None:
            self.count_error = message
        else:
            self.errors.setdefault(seed, message)
            self.keep_error(seed, stage, error)

    def keep_error(self, seed: int, stage: str, error: Exception) -> None:
        """Write the row's line and the whole error beside the step's files."""
        step = getattr(self.seeds[seed], stage)
        with contextlib.suppress(OSError):
            text = f"{explain(error)}\n\n{COLOURS.sub('', str(error))}\n"
            step.storage.write_bytes(step.folder / ERROR, text.encode())

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
            write_rows(self.plan.storage, rows)
        with contextlib.suppress(RayError):
            for row in rows:
                self.job.board.row.remote(row.seed, metrics.row_numbers(row))
        self.listen()  # a seed's last words come before its row
        self.trackers.rows(rows)

    def listen(self) -> dict[int, dict[str, Any]]:
        """Ask the board for the last record of every seed (none when it is lost); all that came since the last time go
        to the trackers."""
        try:
            board, told = ray.get(self.job.board.read.remote(self.heard_ns), timeout=5)
        except RayError:  # without its board the record still goes on
            return {}
        self.trackers.tell(told)
        self.heard_ns = max((one.at_ns for one in told), default=self.heard_ns)
        return board

    def states(self) -> dict[int, dict[str, Any]]:
        """Collect what the view shows: the board's records, overruled by what the driver knows."""
        board = self.listen()
        shown: dict[int, dict[str, Any]] = {}
        for seed in self.seeds:
            told = board.get(seed, {})
            if self.done(seed):
                bpb = self.records[seed]["evaluate"]["result"]["bpb_final"]
                shown[seed] = {"stage": "done", "fraction": 1.0, "bpb": bpb}
            elif seed in self.errors:
                shown[seed] = {"stage": "failed", "detail": self.errors[seed]}
            elif self.busy(seed, told.get("stage", "")):
                shown[seed] = told
            else:
                due = next((stage for stage in STAGES if self.busy(seed, stage)), "")
                shown[seed] = {"stage": f"starting {due}" if due else "waiting"}
        return shown


def drive(
    plan: RecordPlan,
    console: Console,
    *,
    profile: bool = False,
    lost_record: Callable[[], bool] = lambda: False,
    track: tuple[str, ...] = (),
) -> list[Row]:
    """Run what is missing of every seed; returns all rows, also written to the record's parquet file as seeds end.

    Ray must be initialised. Raises RecipeError when no machine of this cluster can hold the training job, or when
    `lost_record` says that another driver has taken the record over. track: the names of its trackers.
    """
    recipe, evaluate_cpus = resolve_cpus(plan.recipe)
    check_capacity(recipe, evaluate_cpus, console)
    made_by = origin() | {"requirements": script.requirements(plan.recipe)}
    board = BoardActor.remote(plan.name, metrics.meanings())
    job = Job(plan, recipe, evaluate_cpus, made_by, profile, board)
    tracked = TrackedRecord(plan.storage, plan.name, plan.recipe)
    trackers = follow(track, tracked, lambda text: console.print(text, markup=False))
    work = Drive(plan, job, console, trackers, Restarts(recipe.compute.max_restarts))
    work.look()
    work.check_artifacts()
    write_rows(plan.storage, work.rows())
    try:
        with View(tuple(plan.seeds), console) as view:
            while True:
                work.launch()
                if not work.running and not work.unfinished():
                    break
                view.update(work.states())
                if lost_record():
                    raise RecipeError(f"another driver has taken over record {plan.name}; this one stops")
                if work.collect():
                    work.write_rows()
            view.update(work.states())
    finally:
        for reference in work.running:
            with contextlib.suppress(RayError):
                ray.cancel(reference)
        rows = work.rows()
        write_rows(plan.storage, rows)
        trackers.rows(rows)
        trackers.close()
    return rows
