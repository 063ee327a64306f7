"""One step of a record: a folder, done when its result.json is there, which is written last and holds the sums of what
the step made and of what it read. Files that storage changed since are noticed before anything reads them.

Work is done on files of a local folder. Where the runs folder is an object store, `fetch` and `save_outputs` copy what
has to outlive the machine; where it is a folder that all nodes share they copy nothing. `recovery` is about unfinished
steps.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hedgemix.runtime import clock
from hedgemix.runtime.files import sha256_of, write_json
from hedgemix.runtime.layout import CLOCK, ERROR, RESULT, STEPS
from pipeline.storage.lease import Held, LostLockError
from pipeline.storage.lock import hold
from pipeline.storage.object_store import is_safe_relative_path
from pipeline.storage.store import Storage

ASIDE = "result.damaged.json"
NOT_MADE = (RESULT, ASIDE, "checkpoint*", CLOCK, "*.lock", ERROR, "audit*", ".*")
"""Files in a step's folder that are not what it makes."""


class DamagedStepError(RuntimeError):
    """Tells that a file of a finished step is not what the step wrote: (step's name, what is wrong)."""

    @property
    def step(self) -> str:
        """Return the step's name."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@dataclass(frozen=True)
class Step:
    """Names a piece of work by its kind and the hash of all it reads."""

    kind: str
    key: str
    storage: Storage

    @property
    def name(self) -> str:
        """Return the name of its folder: kind-key."""
        return f"{self.kind}-{self.key}"

    @property
    def folder(self) -> Path:
        """Return where its files lie."""
        return self.storage.root / STEPS / self.name

    def record(self) -> dict[str, Any] | None:
        """Read all that result.json holds; None when the step is not done. A damaged result.json counts as not done."""
        return self.parse(self.storage.read_bytes(self.folder / RESULT))

    def parse(self, content: bytes | None) -> dict[str, Any] | None:
        """Read the content of result.json as `record` does."""
        try:
            found = json.loads(content or b"")
        except ValueError:
            return None
        return found if is_valid_record(found) and found["key"] == self.key else None


def is_valid_record(record: Any) -> bool:
    """Say whether it has the shape of a result.json, and every file it names lies in the step's folder: others may
    write there too."""
    kinds: dict[str, Any] = {
        "key": str,
        "result": dict,
        "seconds": (int, float),
        "attempts": int,
        "lost_seconds": (int, float),
    }
    kinds |= {"started_at": str, "finished_at": str, "origin": dict, "reads": dict, "files": dict, "kind": str}
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(sums, dict) for sums in record["reads"].values())
        and all(is_safe_relative_path(name) and isinstance(entry, dict) for name, entry in record["files"].items())
        and all({"bytes", "sha256"} <= entry.keys() for entry in record["files"].values())
    )


@dataclass(frozen=True)
class Made:
    """Holds what the process that did a step's work tells about it."""

    result: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """bytes and sha256 of each file, by its name in the step's folder."""
    clock: dict[str, float]
    reads: dict[str, dict[str, str]] = field(default_factory=dict)
    """SHA-256 of the files it read, by the kind of the step that made them and their names."""


def perform(
    step: Step, work: Callable[[], Made], origin: dict[str, Any], on_lost: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Do the step unless it is done; its result.json is written last, whole or not at all.

    `origin`: the versions and the tree that do it, kept beside the result. Two records that share a step do not do it
    at the same time: the second waits, and then finds it done. In an object store one that stood still, and was taken
    for dead, publishes no result; `on_lost` is called then, on another thread, and the other's is waited for. Where a
    store writes on no condition both may do it; sums tell if files of two attempts ever mix.
    """
    while True:
        if (record := step.record()) is not None:
            return record["result"]
        step.storage.ready()
        step.folder.mkdir(parents=True, exist_ok=True)
        refuse_links(step.folder)
        lock = step.folder / "step.lock"
        with suppress(LostLockError), hold(step.storage, lock, patient=True, on_lost=on_lost) as held:
            if (record := step.record()) is not None:
                return record["result"]
            return work_and_publish(step, work, origin, held)


def work_and_publish(step: Step, work: Callable[[], Made], origin: dict[str, Any], held: Held) -> dict[str, Any]:
    """Do the step whose lock is `held`, and write its result.json. Raises LostLockError when another holds the lock by
    then."""
    for rest in step.folder.glob(".*.tmp"):  # of a writer that was killed
        rest.unlink(missing_ok=True)
    started, began = now(), time.monotonic()
    made = work()
    record = {
        "kind": step.kind,
        "key": step.key,
        "origin": origin,
        "started_at": started,
        "finished_at": now(),
        "seconds": time.monotonic() - began,
        "attempts": int(made.clock["starts"]),
        "lost_seconds": made.clock["lost_seconds"],
        "reads": made.reads,
        "files": made.files,
        "result": made.result,
    }
    write_json(step.folder / RESULT, record)
    held.publish(step.folder / RESULT)
    step.storage.remove(step.folder / ERROR)
    return made.result


def refuse_links(folder: Path) -> None:
    """Raise ValueError for a link in a step's folder: logs are written on at their place, and a link there would lead
    the writing to a file outside. The runs folder itself may be a link, or lie behind one."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and a step's files must lie in its folder; remove it")


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def save_outputs(step: Step, result: dict[str, Any], reads: Mapping[str, dict[str, str]] | None = None) -> Made:
    """Hash every file of the step's folder, and push copies where a runs folder needs them. For the process that did
    the work, when it is done."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(step.folder.rglob("*")):
        name = path.relative_to(step.folder).as_posix()
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in NOT_MADE):
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            step.storage.push(path)
    return Made(result, files, clock.read(step.folder / CLOCK), dict(reads or {}))


def fetch(step: Step, *names: str) -> dict[str, dict[str, str]]:
    """Bring these files of a finished step to this machine (all without a name) and compare their sums; returns them as
    `Made.reads`. Raises DamagedStepError when one is not what the step wrote."""
    record = step.record()
    if record is None:
        raise DamagedStepError(step.name, f"its {RESULT} is gone")
    files = record["files"]
    for name in names or files:
        check(step, name, files.get(name))
    return {step.kind: {name: files[name]["sha256"] for name in names or files}}


def is_intact(path: Path, entry: dict[str, Any]) -> bool:
    """Say whether the file is there with the bytes and SHA-256 of `entry`, its entry in result.json."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]


def check(step: Step, name: str, entry: dict[str, Any] | None) -> None:
    """Check that the file is what `entry`, its entry in result.json, says; from an object store a fresh copy is tried
    once. Raises DamagedStepError."""
    path = step.folder / name
    if entry is None:
        raise DamagedStepError(step.name, f"it made no {name}")
    if not is_safe_relative_path(name) or not path.resolve().is_relative_to(step.folder.resolve()):
        raise DamagedStepError(step.name, f"{name!r} leads out of {step.folder}")
    if is_intact(path, entry) or (step.storage.remote and step.storage.pull(path) and is_intact(path, entry)):
        return
    state = f"{path.stat().st_size:,} bytes, not the {entry['bytes']:,} written" if path.is_file() else "gone"
    raise DamagedStepError(step.name, f"{path} is damaged ({state}, or with another sum)")


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Wait for, and hold, a lock that ends with this process."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
