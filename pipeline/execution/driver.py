"""The driver of a command's records: every seed through train, quantize and evaluate, as resources allow, to a table
each.

It holds no state of its own: what is done stands on disk, so the same command again does only what is missing. Several
records are driven by one loop, on one Ray; a step that more of them have is done once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ray
from ray.exceptions import RayError
from rich.console import Console

from hedgemix.config import RecipeError, config_hash
from hedgemix.runtime.layout import ERROR
from hedgemix.standalone import script
from pipeline.execution.failures import COLOURS, Fail, Repair, Restarts, classify, explain
from pipeline.execution.job import Job
from pipeline.execution.ledger import Ledger, Task
from pipeline.execution.placement import remove_group
from pipeline.execution.record_drive import Drive
from pipeline.execution.resources import check_capacity, on_cluster, resolve_cpus, training_slots
from pipeline.monitor import metrics
from pipeline.monitor.board import BoardActor
from pipeline.monitor.live_view import StudyView, View
from pipeline.results.provenance import origin
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.steps.graph import RecordPlan
from pipeline.steps.recovery import set_aside
from pipeline.steps.step import Step
from pipeline.storage.lease import Held, LostLockError
from pipeline.tracking.follower import follow
from pipeline.tracking.tracked_record import TrackedRecord

POLL_SECONDS = 1.0
"""Between looks at who reports; a task that ends is noticed at once."""


@dataclass
class Driver:
    """Drives records side by side; earlier ones come first where there is not room for all."""

    drives: list[Drive]
    ledger: Ledger
    board: Any
    console: Console
    heard_ns: int = 0
    """The time of the last progress record that was passed on."""

    def unfinished(self) -> bool:
        """Say whether a seed of any record that has not failed still has steps to do."""
        return any(drive.unfinished() for drive in self.drives)

    def launch(self) -> None:
        """Start everything whose inputs are done. On a machine of our own, training only starts where it fits now, in
        the order of records and seeds, and once those trained before are evaluated: its processes would share the cores
        of a timed evaluation. A cluster is told of all seeds, so that it can grow, and places them as nodes come
        free."""
        evaluating = any(drive.evaluating() for drive in self.drives)
        for drive in self.drives:
            drive.launch(len(drive.seeds) if on_cluster() else 0 if evaluating else self.free_slots(drive))

    def free_slots(self, drive: Drive) -> int:
        """Count the training jobs of a record that fit this machine beside those that are at work. Jobs of other sizes
        do not share it."""
        mine, training = drive.job.recipe.compute, self.ledger.training()
        sizes = {other.plan.name: other.job.recipe.compute for other in self.drives}
        if any(sizes[task.record] != mine for task in training):
            return 0
        return training_slots(drive.job.recipe) - len(training)

    def collect(self) -> bool:
        """Wait a moment for a task to end; True when one did."""
        running = self.ledger.running
        if not running:
            time.sleep(POLL_SECONDS)
            return False
        done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            task = running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:
                self.failed(task, error)
            sharing = [drive for drive in self.drives if drive.reads(task.step)]
            for drive in sharing:
                with contextlib.suppress(OSError):  # storage fails for a moment: a step that is done answers at once
                    drive.look()
            self.listen()  # a seed's last words come before its row
            for drive in sharing:
                drive.write_rows()
        return bool(done)

    def failed(self, task: Task, error: Exception) -> None:
        """Start the step again if that is worth it (`failures`), or let the seeds that have it fail."""
        with contextlib.suppress(RayError):
            remove_group(task.step.name)  # whose ranks it started, and could not end
        verdict = classify(error)
        if not isinstance(verdict, Fail) and self.ledger.restarts.grant(task.step.name):
            if isinstance(verdict, Repair):
                self.console.print(f"damaged, made again: {verdict.damaged}", markup=False, soft_wrap=True)
                self.repair(verdict.damaged.step)
            else:
                seed = "counts" if task.seed is None else f"seed {task.seed}: {task.stage}"
                who = f"{task.record}, {seed}" if len(self.drives) > 1 else seed
                self.console.print(f"{who} was lost, starts again: {explain(error)}", markup=False, soft_wrap=True)
            return
        why = self.ledger.failed[task.step.name] = f"{task.stage}: {explain(error)}"
        for drive in self.drives:
            drive.fail(task.step, why)
        if task.seed is not None:
            keep_error(task.step, error)

    def repair(self, name: str) -> None:
        """Set aside the damaged step of this name, so that `launch` starts it again."""
        for drive in self.drives:
            every = [step for steps in drive.seeds.values() for step in steps.all()]
            for step in (*every, drive.plan.counts):
                if step.name == name:
                    set_aside(step)
                    drive.drop(step)

    def listen(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Ask the board for the last progress of every record's seeds (none when it is lost); all that came since the
        last time goes to the trackers."""
        try:
            board, told = ray.get(self.board.read.remote(self.heard_ns), timeout=5)
        except RayError:  # without its board the record still goes on
            return {}
        for drive in self.drives:
            drive.trackers.tell(progress for progress in told if progress.name == drive.plan.name)
        self.heard_ns = max((progress.at_ns for progress in told), default=self.heard_ns)
        return board

    def show(self, view: View) -> None:
        """Bring the view up to date."""
        board = self.listen()
        if isinstance(view, StudyView):
            view.update_seeds({drive.plan.variant: drive.states(board) for drive in self.drives})
        else:
            view.update(self.drives[0].states(board))


def keep_error(step: Step, error: Exception) -> None:
    """Write the row's line and the whole error beside the step's files."""
    with contextlib.suppress(OSError):
        text = f"{explain(error)}\n\n{COLOURS.sub('', str(error))}\n"
        step.storage.write_bytes(step.folder / ERROR, text.encode())


def drive(
    plans: Sequence[RecordPlan],
    console: Console,
    *,
    profile: bool = False,
    locks: Mapping[str, Held] = MappingProxyType({}),
    track: tuple[str, ...] = (),
) -> dict[str, list[Row]]:
    """Run what is missing of every seed of these records; returns all rows by the record's name, also written to its
    parquet file as seeds end.

    Ray must be initialised. locks: the records' locks by their names, if they are held, and a study's. Raises
    RecipeError when no machine of this cluster can hold a training job, or when another driver has taken one of the
    locks over. track: the names of each record's trackers.
    """
    resolved = [resolve_cpus(plan.recipe) for plan in plans]
    for recipe, evaluate_cpus in {config_hash(recipe.compute): (recipe, cpus) for recipe, cpus in resolved}.values():
        check_capacity(recipe, evaluate_cpus, console)
    board = BoardActor.remote(metrics.meanings())
    ledger = Ledger(Restarts(max(plan.recipe.compute.max_restarts for plan in plans)))
    drives = []
    for plan, (recipe, evaluate_cpus) in zip(plans, resolved, strict=True):
        made_by = origin() | {"requirements": script.requirements(plan.recipe)}
        tracked = TrackedRecord(plan.storage, plan.name, plan.recipe)
        trackers = follow(track, tracked, lambda text: console.print(text, markup=False))
        job = Job(plan, recipe, evaluate_cpus, made_by, profile, board)
        drives.append(Drive(plan, job, console, trackers, ledger, locks.get(plan.name)))
    work = Driver(drives, ledger, board, console)
    for each in drives:
        each.look()
        each.check_artifacts()
        write_rows(each.plan.storage, each.rows(), each.held)
    try:
        with StudyView(console) if plans[0].study else View(console) as view:
            while True:
                work.launch()
                if not ledger.running and not work.unfinished():
                    break
                work.show(view)
                if any(held.lost() for held in locks.values()):
                    names = ", ".join(plan.name for plan in plans)
                    raise RecipeError(f"another driver has taken over record {names}; this one stops")
                work.collect()
            work.show(view)
    finally:
        for reference in ledger.running:
            with contextlib.suppress(RayError):
                ray.cancel(reference)
        told = {each.plan.name: each.rows() for each in drives}
        for each in drives:
            with contextlib.suppress(LostLockError):  # that is told above
                write_rows(each.plan.storage, told[each.plan.name], each.held)
            each.trackers.rows(told[each.plan.name])
        for each in drives:
            each.trackers.close()
    return told
