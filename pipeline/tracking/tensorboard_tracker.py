"""TensorBoard's event files, in the record's folder and from there in an object store."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from hedgemix.config import to_dict
from pipeline.monitor.metrics import ROW
from pipeline.tracking.tracked_record import TrackedRecord

PUSH_SECONDS = 60.0
"""How often event files go to an object store."""


class TensorBoard:
    """Writes event files under the record's folder, by seed and stage; `tensorboard --logdir` of the runs folder shows
    all.

    tensorboardX's SummaryWriter would write the mark of `purge_step` too, but through a queue: its flush returns before
    the points are in the file, and a disk that is full ends its thread without a word.
    """

    def __init__(self, subject: TrackedRecord) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.summary, self.EventsWriter, self.Event = summary, EventsWriter, Event
        self.start = SessionLog(status=SessionLog.START)
        self.subject, self.folder = subject, subject.folder / "tensorboard"
        self.writers: dict[tuple[int, str], Any] = {}
        self.last_position: dict[tuple[int, str], int] = {}
        self.unflushed: set[tuple[int, str]] = set()
        self.pushed_seconds = time.monotonic()
        """When files last went to the object store, by the monotonic clock."""

    def stage_folder(self, seed: int, stage: str) -> Path:
        """Return where the event files of a seed's stage lie."""
        return self.folder / f"seed{seed}" / stage

    def writer(self, seed: int, stage: str, position: int) -> Any:
        """Return the stage's writer. When the position does not go on from the last, readers are told to drop what
        stands at it and after."""
        key = (seed, stage)
        if key not in self.writers:
            folder, root = self.stage_folder(seed, stage), self.subject.storage.root.resolve()
            if not folder.resolve().is_relative_to(root):
                raise ValueError(f"{folder} leads out of {root} by a link")
            folder.mkdir(parents=True, exist_ok=True)
            # Two files of one second would have one name; they are read in the order of names.
            self.writers[key] = self.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if position <= self.last_position.get(key, position):
            self.writers[key].write_event(self.Event(step=position, wall_time=time.time(), session_log=self.start))
        self.last_position[key] = position
        self.unflushed.add(key)
        return self.writers[key]

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        """Write the values at this position."""
        writer = self.writer(seed, stage, position)
        for name, value in values.items():
            scalar = self.summary.scalar(f"{stage}/{name}", value)
            writer.write_event(self.Event(step=position, wall_time=at_seconds, summary=scalar))

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        """Write the row's values and the recipe."""
        self.point(seed, ROW, 0, values, time.time())
        recipe = self.summary.text("recipe", f"```json\n{json.dumps(to_dict(self.subject.recipe), indent=1)}\n```")
        self.writers[seed, ROW].write_event(self.Event(step=0, wall_time=time.time(), summary=recipe))
        for key in [key for key in self.writers if key[0] == seed]:  # a study's hundreds of seeds would end the numbers
            self.writers.pop(key).close()
            self.unflushed.discard(key)

    def flush(self) -> None:
        """Flush to the files, and push them to an object store every PUSH_SECONDS."""
        for key in self.unflushed:
            self.writers[key].flush()
        self.unflushed = set()
        if time.monotonic() - self.pushed_seconds > PUSH_SECONDS:
            with contextlib.suppress(OSError):  # the next time takes them too
                self.push()

    def push(self) -> None:
        """Push the files to the object store, if that is where the runs folder lies."""
        self.pushed_seconds = time.monotonic()
        if self.subject.storage.remote:
            for key in self.last_position:
                for file in self.stage_folder(*key).glob("events.*"):
                    self.subject.storage.push(file)

    def close(self) -> None:
        """Close the files and push them a last time. Raises OSError when the store fails."""
        for writer in self.writers.values():
            writer.close()
        self.push()
