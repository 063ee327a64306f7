"""What a fault costs a record, seen from outside: the seconds until work goes on, and the steps and chunks done again.

    with measured.Watch(out, "train", plan.moment()) as watch: ...the command...
    faults(1, "training worker killed", "at a checkpoint", watch, row)

With FAULTS_TABLE in the environment every measurement is a line of JSON in that file, which `benchmarks.faults.table`
makes docs/faults.md's table of.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import pytest

from benchmarks.faults import injection
from hedgemix.runtime import clock
from hedgemix.runtime.files import read_json

POLL_SECONDS = 0.05

Moment = Callable[[], float | None]
"""Seconds since the epoch at which the fault came, None before."""


def fired(plan: injection.Plan, number: int = 0) -> Moment:
    """The moment at which a fault of a plan fired, for the last time if it fires often."""
    made = plan.faults[number]
    first = plan.folder / f"{made.name}.{made.at}"
    markers = [first.with_suffix(f".{made.at + more}") for more in range(min(made.times, 50))]

    def moment() -> float | None:
        times = [marker.stat().st_mtime for marker in markers if marker.exists()]
        return max(times, default=None)

    return moment


class Now:
    """The moment at which a test says it."""

    def __init__(self) -> None:
        self.time: float | None = None

    def say(self) -> None:
        self.time = time.time()

    def __call__(self) -> float | None:
        return self.time


@dataclass(frozen=True)
class State:
    starts: int
    done: int
    """Steps or chunks that the log tells of."""
    kept: int
    """Steps or chunks behind the newest checkpoint."""


class Watch:
    """Follows the one step of a kind below a runs folder: `seconds` from the fault to its next start, or, with
    `checkpoint`, to its next checkpoint; `again` is how many steps or chunks were done a second time."""

    def __init__(self, out: Path, kind: str, moment: Moment, checkpoint: bool = False) -> None:
        self.out, self.kind, self.moment, self.checkpoint = out, kind, moment, checkpoint
        self.seconds: float | None = None
        self.again: int | None = None
        self.starts: list[float] = []
        """When each start of the step was first seen."""
        self._folder: Path | None = None
        self._ended = Event()
        self._thread = Thread(target=self._follow, daemon=True)

    def folder(self) -> Path | None:
        if self._folder is None:
            self._folder = next(self.out.rglob(f"_steps/{self.kind}-*"), None)
        return self._folder

    def state(self) -> State:
        folder = self.folder()
        if folder is None:
            return State(0, 0, 0)
        try:
            kept = int(read_json(folder / "checkpoint.json")["checkpoints"][0]["number"])
        except (OSError, ValueError, LookupError):
            kept = 0
        return State(int(clock.read(folder / "clock.json")["starts"]), done(folder), kept)

    def _follow(self) -> None:
        before, came = self.state(), None
        while not self._ended.wait(POLL_SECONDS):
            seen = self.state()
            self.starts += [time.time()] * (seen.starts - len(self.starts))
            if self.seconds is not None:
                continue
            if came is None and self.moment() is None:
                before = seen
                continue
            came = self.moment()
            if seen.kept > before.kept if self.checkpoint else seen.starts > before.starts:
                self.seconds = time.time() - (came or 0)
                continue
            before = State(before.starts, max(before.done, seen.done), max(before.kept, seen.kept))
            self.again = max(0, before.done - before.kept)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def done(folder: Path) -> int:
    """Steps or chunks that the log tells of; a line that is being written does not count."""
    for name in ("log.jsonl", "trace.jsonl"):
        if (folder / name).exists():
            lines = [line for line in (folder / name).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            found = json.loads(lines[-1]) if lines else {"step": 0}
            return int(found["step"] if "step" in found else found["chunk"] + 1)
    return 0


class Faults:
    """Notes the measurements of one test; `note` after everything it claims was asserted."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.test = f"{Path(request.node.path).name}::{request.node.originalname}"
        self.kind = "soak" if request.node.get_closest_marker("soak") else "fast"

    def note(
        self, order: int, what: str, where: str, seconds: Watch | float | None, repeated: str, equal: bool = True
    ) -> None:
        """repeated: the work that was done again, in words."""
        recovered = seconds.seconds if isinstance(seconds, Watch) else seconds
        if isinstance(seconds, Watch):
            assert recovered is not None, f"{what}: nobody saw the work go on"
        line: dict[str, Any] = {"order": order, "fault": what, "where": where, "repeated": repeated, "equal": equal}
        line |= {"seconds": recovered, "test": self.test, "kind": self.kind}
        line |= {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], "cores": os.cpu_count()}
        if path := os.environ.get("FAULTS_TABLE"):
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")


def work(watch: Watch, lost_seconds: float) -> str:
    """What was done again, as the table says it: whole steps or chunks, the one that the fault fell into, and the
    seconds that the row tells."""
    unit = {"train": "step", "evaluate": "chunk"}.get(watch.kind)
    if unit is None:
        return "all of it"
    more = f" and {watch.again} before it" if watch.again else ""
    return f"the {unit} it fell into{more}, {lost_seconds:.1f} s"
