"""What the soak does to a record at work: whom it kills, what it damages, and when the work goes on after it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.leaks import title
from hedgemix.runtime import clock
from hedgemix.runtime.layout import RESULT

TITLES = {
    "worker": ("ray::RayTrainWorker", "ray::_RayTrainWorker"),
    "rank": ("ray::Rank",),
    "task": ("ray::quantize", "ray::score_full", "ray::count"),
    "job": ("ray::train_seed", "ray::TrainController", "ray::evaluate"),
}
"""What Ray calls the processes of a kind: a training's worker, a member of an evaluation's gang, a task that works, and
what only waits for others: a training's job and its controller, a gang's task."""
WEIGHTS = {"worker": 4, "rank": 3, "task": 4, "job": 2, "node": 2, "driver": 3, "cluster": 1, "storage": 2, "byte": 2}
"""How often each kind is drawn beside the others."""
PATIENCE_SECONDS = 20.0
"""So long a kill waits for somebody to kill."""
FULL_SECONDS = 3.0
"""The storage takes nothing for so long."""


@dataclass
class Kill:
    """One disturbance. Its steps were being worked on by what it hit; none when it hit no step's work."""

    kind: str
    at_seconds: float
    """Of the run."""
    began: float
    """Wall clock of the kill."""
    what: str
    steps: list[str]
    holders: set[int] = field(default_factory=set)
    """Processes that may write its steps' files on, until they are gone: what they write is no sign of recovery."""
    since: float = 0.0
    """Wall clock of the end of the last of `holders`."""
    recovered_seconds: float | None = None

    def lost(self) -> bool:
        """Whether the work never went on. A flipped byte that nobody reads again stops nothing."""
        return self.recovered_seconds is None and self.kind != "byte"


@dataclass
class Bounds:
    """What a step's result must at least tell, from the clocks that were read when it was hit."""

    attempts: int = 1
    lost_seconds: float = 0.0


def draw_kind(draw: random.Random, kinds: Iterable[str]) -> str:
    names = [name for name in WEIGHTS if name in set(kinds)]
    return draw.choices(names, [WEIGHTS[name] for name in names])[0]


def victims(kind: str, pids: Iterable[int], working: Iterable[int] | None = None) -> list[int]:
    """Processes of a kind of `TITLES`; with `working`, only those that are in it."""
    return [
        pid
        for pid in sorted(pids)
        if title(pid).startswith(TITLES[kind]) and (working is None or kind in ("rank", "job") or pid in working)
    ]


def holders(runs: Path) -> dict[int, str]:
    """The process that writes the files of a step, and the step's name, of all steps worked on now."""
    inodes = {}
    for path in runs.glob("_steps/*/writer.lock"):
        with contextlib.suppress(OSError):
            inodes[path.stat().st_ino] = path.parent.name
    found = {}
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK":
            name = inodes.get(int(fields[5].rpartition(":")[2]))
            if name:
                found[int(fields[4])] = name
    return found


def kill(pids: Iterable[int]) -> None:
    """SIGKILL, and wait until they are gone or another's zombies."""
    left = set(pids)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(lives(pid) for pid in left):
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def note(bounds: dict[str, Bounds], runs: Path, steps: Iterable[str]) -> None:
    """After a kill: a step that has no result will be started once more than its clock says, and what it had used is
    lost if it has no checkpoints to go on from."""
    for name in steps:
        folder = runs / "_steps" / name
        told = clock.read(folder / "clock.json")
        if (folder / RESULT).exists():
            continue
        bound = bounds.setdefault(name, Bounds())
        bound.attempts = max(bound.attempts, int(told["starts"]) + 1)
        if name.startswith(("score-", "quantize-", "counts-")):
            bound.lost_seconds = max(bound.lost_seconds, told["discarded_seconds"] + told["elapsed_seconds"])


def flip(path: Path, draw: random.Random) -> None:
    """One bit of a file, in place, as storage would: no new file, no new time."""
    before = path.stat()
    with open(path, "r+b") as file:
        position = draw.randrange(before.st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def damageable(runs: Path) -> list[Path]:
    """Checkpoints of steps that are not done, and the artifacts of those that are."""
    found = [path for path in runs.glob("_steps/*/checkpoint-*.pt") if not (path.parent / RESULT).exists()]
    return sorted(found + list(runs.glob("_steps/quantize-*/artifact.hmx")))


def look(pending: Iterable[Kill], runs: Path, wall: Callable[[], float] = time.time) -> None:
    """Note which kills the work has gone on after: a step of theirs (any, where they hit none) has beaten its clock or
    is done; after a flipped byte, which does not stop a clock, only a result counts."""
    for each in pending:
        if any(lives(pid) for pid in each.holders):
            each.since = wall()
            continue
        signs = [RESULT] if each.kind == "byte" else [RESULT, "clock.json"]
        for name in each.steps or ["*"]:
            for path in (path for sign in signs for path in runs.glob(f"_steps/{name}/{sign}")):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime > max(each.began, each.since) and each.recovered_seconds is None:
                        each.recovered_seconds = path.stat().st_mtime - each.began
