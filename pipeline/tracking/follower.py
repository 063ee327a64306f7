"""Trackers at work: TensorBoard, MLflow or Weights & Biases are told of a record while it runs.

A tracker (`services.py`) gets every number a stage tells, by column of the results table, and a finished seed's row.
Each works on a thread of its own: the record neither waits for one nor fails with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from hedgemix.config import RecipeError
from pipeline.monitor.board import ProgressRecord
from pipeline.monitor.metrics import POSITION, progress_numbers, row_numbers
from pipeline.results.schema import Row
from pipeline.storage.store import Storage
from pipeline.tracking.services import SERVICES, USABLE
from pipeline.tracking.tracked_record import TrackedRecord
from pipeline.tracking.tracker import Tracker

WAITING = 10_000
"""Points a tracker may be behind; what comes while it is further is lost to it."""
BATCH_SECONDS = 2.0
"""How often a tracker passes on what it got."""
CLOSE_SECONDS = 20.0
"""How long the end of a record waits for its trackers."""


class Follower:
    """Runs a tracker on a thread of its own; what fails there is told once, and the tracker is left alone from then
    on."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self.name, self.make, self.warn = name, make, warn
        self.waiting: Queue[Callable[[Tracker], None] | None] = Queue(WAITING)
        self.lost = False
        self.thread = Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def give(self, action: Callable[[Tracker], None] | None) -> None:
        """Queue a call of the tracker (None: the last), without waiting; a full queue drops it and warns once."""
        try:
            self.waiting.put_nowait(action)
        except Full:
            if not self.lost:
                self.warn(f"{self.name} is too slow; it does not get everything")
            self.lost = True

    def _run(self) -> None:
        going = True
        try:
            tracker = self.make()
            while going:
                going = self._batch(tracker)
                tracker.flush()
            tracker.close()
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            self.warn(f"{self.name} stopped tracking ({type(error).__name__}: {text}); the record goes on without it")
            while going:
                going = self.waiting.get() is not None

    def _batch(self, tracker: Tracker) -> bool:
        """Hand over what comes within a moment; False after the last."""
        until = time.monotonic() + BATCH_SECONDS
        while (left := until - time.monotonic()) > 0:
            try:
                action = self.waiting.get(timeout=left)
            except Empty:
                break
            if action is None:
                return False
            action(tracker)
        return True

    def close(self, seconds: float) -> None:
        """Wait so many seconds for the tracker to take everything, and warn when it does not."""
        self.give(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.warn(f"{self.name} did not take everything in time")


class Trackers:
    """Holds all trackers of a record; none of them holds it up, or raises here."""

    def __init__(self, followers: Iterable[Follower]) -> None:
        self.followers = tuple(followers)
        self.finished: set[int] = set()

    def close(self) -> None:
        """Wait for all trackers to end, CLOSE_SECONDS in all: the one call that waits."""
        until = time.monotonic() + CLOSE_SECONDS
        for follower in self.followers:
            follower.close(max(0.1, until - time.monotonic()))

    def tell(self, records: Iterable[ProgressRecord]) -> None:
        """Pass on progress records, each once, in the order they came."""
        for progress in records:
            if progress.seed in self.finished:
                continue
            values = progress_numbers(progress.stage, progress.record)
            position = values.get(POSITION.get(progress.stage, ""))
            if position is not None:
                self.give("point", progress.seed, progress.stage, int(position), values, progress.at_ns / 1e9)

    def rows(self, rows: Iterable[Row]) -> None:
        """Take rows as they stand; a finished seed's is passed on, once."""
        for row in rows:
            if row.status in ("done", "failed") and row.seed not in self.finished:
                self.finished.add(row.seed)
                self.give("row", row.seed, row.status == "done", row_numbers(row))

    def give(self, method: str, *arguments: Any) -> None:
        """Queue a call of this method for every tracker."""
        for follower in self.followers:
            follower.give(lambda tracker: getattr(tracker, method)(*arguments))


def follow(names: tuple[str, ...], subject: TrackedRecord, warn: Callable[[str], None]) -> Trackers:
    """Start the trackers of these names, of which `check_trackers` said that they can work."""
    made = {name: partial(SERVICES[name], subject) for name in names if name != "none"}
    return Trackers(Follower(name, make, warn) for name, make in made.items())


def check_trackers(names: tuple[str, ...], storage: Storage) -> None:
    """Raise RecipeError for a tracker that is not installed or cannot work here, before anything starts."""
    if "none" in names and len(set(names)) > 1:
        raise RecipeError(f"--track {' '.join(names)}: none goes alone")
    for name in names:
        try:
            USABLE.get(name, lambda _: None)(storage)
        except ImportError as error:
            raise RecipeError(
                f"--track {name} needs a package that is not installed ({error}): pip install 'hedgemix[{name}]'"
            ) from None
