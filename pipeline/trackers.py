"""What a record tells to TensorBoard, MLflow or Weights & Biases while it runs.

A tracker gets every number a stage tells, by column of the results table, and a finished seed's row. Each works on a
thread of its own: the record neither waits for one nor fails with it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any, Protocol

from hedgemix.config import Recipe, RecipeError, to_dict
from pipeline import runs
from pipeline.measures import POSITION, ROW, measured, row_numbers
from pipeline.progress import Told
from pipeline.results import Row
from pipeline.storage import Storage

WAITING = 10_000
"""Points a tracker may be behind; what comes while it is further is lost to it."""
BATCH_SECONDS = 2.0
"""How often a tracker passes on what it got."""
CLOSE_SECONDS = 20.0
"""How long the end of a record waits for its trackers."""
PUSH_SECONDS = 60.0
"""How often event files go to an object store."""
EXTRAS = {"mlflow": "mlflow", "wandb": "wandb"}
"""What `pip install 'hedgemix[...]'` needs in its brackets, by tracker."""


@dataclass(frozen=True)
class Subject:
    """What is tracked: one record."""

    storage: Storage
    record: str
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return runs.record_folder(self.storage, self.record)

    def settings(self) -> dict[str, str]:
        """The recipe, flat: {"train.steps": "0", ...}."""
        return dict(flat("", to_dict(self.recipe)))

    def identity(self) -> str:
        """Random, and the record's for good: names and paths may be the same elsewhere."""
        path = self.folder / "tracked.json"
        try:
            return str(json.loads(self.storage.read_bytes(path) or b"")["id"])
        except (ValueError, KeyError, TypeError):  # new, or damaged
            made = secrets.token_hex(8)
            self.storage.write_bytes(path, (json.dumps({"id": made}) + "\n").encode())
            return made


class Tracker(Protocol):
    """One service. `position` rises while a stage runs, and falls when lost work is done again: what then was told from
    there on must not stand twice. Called by one thread."""

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None: ...

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        """The seed is finished, well or not."""

    def flush(self) -> None:
        """Pass on what came since."""

    def close(self) -> None:
        """The driver ends; seeds without a row are not finished."""


class TensorBoard:
    """Event files under the record's folder, by seed and stage; `tensorboard --logdir` of the runs folder shows all."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.folder = subject, subject.folder / "tensorboard"
        self.writers: dict[tuple[int, str], Any] = {}
        self.last: dict[tuple[int, str], int] = {}
        self.pushed = time.monotonic()

    def writer(self, seed: int, stage: str, position: int) -> Any:
        """The stage's writer. Readers drop what stands at this position and after when it does not go on from there."""
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        place = (seed, stage)
        if place not in self.writers:
            folder = self.folder / f"seed{seed}" / stage
            root = self.subject.storage.root.resolve()
            if not folder.resolve().is_relative_to(root):
                raise ValueError(f"{folder} leads out of {root} by a link")
            # Two writers of one second would have one file, the other's gone; files are read in the order of names.
            suffix = f".{time.time_ns()}"
            self.writers[place] = SummaryWriter(str(folder), purge_step=position, filename_suffix=suffix)
        elif position <= self.last[place]:
            restart = Event(step=position, session_log=SessionLog(status=SessionLog.START))
            self.writers[place].file_writer.add_event(restart)
        self.last[place] = position
        return self.writers[place]

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        writer = self.writer(seed, stage, position)
        for name, value in values.items():
            writer.add_scalar(f"{stage}/{name}", value, position, walltime=at_seconds)

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        recipe = json.dumps(to_dict(self.subject.recipe), indent=1)
        self.point(seed, ROW, 0, values, time.time())
        self.writers[seed, ROW].add_text("recipe", f"```json\n{recipe}\n```", 0)

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()
        if self.subject.storage.remote and time.monotonic() - self.pushed > PUSH_SECONDS:
            self.push()

    def push(self) -> None:
        self.pushed = time.monotonic()
        for writer in self.writers.values():
            for file in Path(writer.logdir).glob("events.*"):
                self.subject.storage.push(file)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.push()


class Follower:
    """A tracker on a thread of its own; what fails there is told once, and the tracker is left alone from then on."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self.name, self.make, self.warn = name, make, warn
        self.waiting: Queue[Callable[[Tracker], None] | None] = Queue(WAITING)
        self.lost = False
        self.thread = Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def give(self, action: Callable[[Tracker], None] | None) -> None:
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
        self.give(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.warn(f"{self.name} did not take everything in time")


class Trackers:
    """All trackers of a record; none of them holds it up, or raises here."""

    def __init__(self, followers: Iterable[Follower]) -> None:
        self.followers = tuple(followers)
        self.finished: set[int] = set()

    def close(self) -> None:
        """The one that waits, for a while."""
        until = time.monotonic() + CLOSE_SECONDS
        for follower in self.followers:
            follower.close(max(0.1, until - time.monotonic()))

    def tell(self, told: Iterable[Told]) -> None:
        """Progress records, each once, in the order they came."""
        for one in told:
            if one.seed in self.finished:
                continue
            values = measured(one.stage, one.record)
            position = values.get(POSITION.get(one.stage, ""))
            if position is not None:
                self.give("point", one.seed, one.stage, int(position), values, one.at_ns / 1e9)

    def rows(self, rows: Iterable[Row]) -> None:
        """Rows as they stand; a finished seed's is passed on, once."""
        for row in rows:
            if row.status in ("done", "failed") and row.seed not in self.finished:
                self.finished.add(row.seed)
                self.give("row", row.seed, row.status == "done", row_numbers(row))

    def give(self, method: str, *arguments: Any) -> None:
        for follower in self.followers:
            follower.give(lambda tracker: getattr(tracker, method)(*arguments))


def follow(names: tuple[str, ...], subject: Subject, warn: Callable[[str], None]) -> Trackers:
    """The trackers of these names, of which `check` said that they can work."""
    return Trackers(Follower(name, maker(name, subject), warn) for name in names if name != "none")


def maker(name: str, subject: Subject) -> Callable[[], Tracker]:
    if name == "tensorboard":
        return lambda: TensorBoard(subject)
    from pipeline import services

    return lambda: services.SERVICES[name](subject)


def check(names: tuple[str, ...], storage: Storage) -> None:
    """Raises RecipeError for a tracker that is not installed or cannot work here, before anything starts."""
    if "none" in names and len(set(names)) > 1:
        raise RecipeError(f"--track {' '.join(names)}: none goes alone")
    for name in names:
        if name in EXTRAS:
            check_service(name, storage)


def check_service(name: str, storage: Storage) -> None:
    from pipeline import services

    try:
        services.USABLE[name](storage)
    except ImportError as error:
        raise RecipeError(
            f"--track {name} needs a package that is not installed ({error}): pip install 'hedgemix[{EXTRAS[name]}]'"
        ) from None


def flat(prefix: str, values: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, (list, tuple)) else str(value)


def variable(name: str, otherwise: str) -> str:
    return os.environ.get(name) or otherwise
