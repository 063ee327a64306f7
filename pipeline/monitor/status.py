"""What stands of the records of a runs folder, told from the files that drivers and workers leave there.

Nothing is started or written, so any machine that sees the folder or the store may ask, while a driver runs or not.
Ages are by this machine's clock; what others wrote is told, never trusted.
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hedgemix.config import RecipeError
from hedgemix.runtime.layout import CLOCK, ERROR, LOG, RECORDS, RESULT, STEPS, TRACE
from pipeline.storage.lease import is_free
from pipeline.storage.store import Storage

QUIET_SECONDS = 60.0
"""Work notes its clock every second, and a store gets it every five; one without a note for longer is not at work."""
STALE_SECONDS = 30.0
"""A lease is renewed every 5 s and taken over after 20."""
UNITS = {"train": "step", "evaluate": "chunk"}
"""What the numbers of a step's checkpoints count."""


class DamagedError(ValueError):
    """Tells of a file that is there and cannot be what was written."""


@dataclass(frozen=True)
class State:
    """Tells of one step whether it is done, failed, damaged, at work, stopped or waiting."""

    step: str
    state: str
    note: str = ""
    seconds: float | None = None
    starts: float | None = None


def names(storage: Storage, wanted: str | None = None) -> list[str]:
    """List the records of the folder. Raises RecipeError when there is none, or not the one that is wanted."""
    found = sorted({name.partition("/")[0] for name in storage.names(storage.root / RECORDS) if "/" in name})
    where = storage.where(storage.root)
    if not found:
        raise RecipeError(f"{where} holds no record; name the runs folder that --out named")
    if wanted is not None and wanted not in found:
        raise RecipeError(f"{where} holds no record {wanted!r}; there are {', '.join(found)}")
    return found if wanted is None else [wanted]


def states(storage: Storage, steps_json: dict[str, Any], recipe: dict[str, Any]) -> Iterator[tuple[str, State]]:
    """Look at every step that steps.json names; yields the seed, on its first line, and the step's state.
    Raises DamagedError when steps.json cannot be what was written."""
    try:
        seeds = {
            str(seed): [(str(kind), str(name)) for kind, name in kinds.items()]
            for seed, kinds in steps_json["seeds"].items()
        }
        shared, chunks = str(steps_json["counts"]), int(steps_json["chunks"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise DamagedError("steps.json is damaged") from None
    yield "all", step_state(storage, "counts", shared, recipe, chunks)
    for seed, kinds in seeds.items():
        for number, (kind, name) in enumerate(kinds):
            yield seed if number == 0 else "", step_state(storage, kind, name, recipe, chunks)


def step_state(storage: Storage, kind: str, name: str, recipe: dict[str, Any], chunks: int) -> State:
    """Tell what stands of one step. Damage is a state, not an error."""
    if not re.fullmatch(r"[a-z]+-[0-9a-f]+", name):
        return State(kind, "damaged", "steps.json names no step")
    folder = storage.root / STEPS / name
    if not storage.remote and folder.is_file():
        return State(kind, "damaged", f"a file is in the place of the folder {name}")
    try:
        if (result := read(storage, folder / RESULT)) is not None:
            score = number(nested_object(result, "result").get("bpb_final"))
            note = "" if score is None else f"{score:.4f} bits/byte"
            return State(kind, "done", note, number(result.get("seconds")), number(result.get("attempts")))
        failed, noted = storage.modified(folder / ERROR), storage.modified(folder / CLOCK)
        clock = read(storage, folder / CLOCK) or {}
        used, starts = number(clock.get("elapsed_seconds")), number(clock.get("starts"))
        notes = [checkpoint(storage, folder, kind)]
        if failed is not None and failed >= (noted or 0.0):
            error = (storage.read_bytes(folder / ERROR) or b"").decode(errors="replace").strip()
            return State(kind, "failed", join_notes(*error.splitlines()[:1], *notes), used, starts)
        if noted is None:
            return State(kind, "waiting", join_notes(*notes))
        age = max(0.0, time.time() - noted)
        done = fraction(storage, folder, kind, recipe, chunks, used)
        notes = [f"{100 * done:.0f} %" if done is not None else "", f"sign of life {duration(age)} ago", *notes]
        return State(kind, "at work" if age < QUIET_SECONDS else "stopped", join_notes(*notes), used, starts)
    except DamagedError as error:
        return State(kind, "damaged", str(error))


def fraction(
    storage: Storage, folder: Path, kind: str, recipe: dict[str, Any], chunks: int, used: float | None
) -> float | None:
    """Compute how much of a step is done, 0 to 1, where it tells: of a training its budget's seconds, or its steps, of
    an evaluation its chunks."""
    train = nested_object(recipe, "train")
    if kind == "train" and not train.get("steps"):
        budget = number(train.get("budget_seconds"))
        return min(1.0, used / budget) if budget and used is not None else None
    if kind not in UNITS:
        return None
    lines = (storage.read_bytes(folder / (LOG if kind == "train" else TRACE)) or b"").splitlines()
    if kind == "evaluate":
        return min(1.0, len(lines) / chunks) if chunks else None
    for line in reversed(lines[-2:]):  # the last may be half written
        try:
            return number(json.loads(line)["fraction"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def checkpoint(storage: Storage, folder: Path, kind: str) -> str:
    """Tell how far the step's newest checkpoint is; empty where it has none."""
    if kind not in UNITS:
        return ""
    try:
        found = (read(storage, folder / "checkpoint.json") or {"checkpoints": []})["checkpoints"]
        return f"checkpoint at {UNITS[kind]} {int(found[0]['number'])}" if found else ""
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return "checkpoint.json is damaged"


def driver(storage: Storage, lock: Path) -> str:
    """Tell whether a driver holds the record. A folder's lock is tried, shared and for an instant; `lock.hold` allows
    for that. Only the lock of a store tells whose it is."""
    if storage.remote:
        try:
            held, written = read(storage, lock), storage.modified(lock)
        except DamagedError:
            return "its lease is damaged"
        if held is None or written is None or is_free(held):
            return "no driver"
        age = max(0.0, time.time() - written)
        state = "a driver is at work" if age < STALE_SECONDS else "its driver is gone"
        return f"{state} on {held.get('host')}, which renewed its lease {duration(age)} ago"
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "a driver is at work"
    except FileNotFoundError:
        return "no driver"
    except OSError as error:
        return f"its lock cannot be tried ({error.strerror})"
    return "no driver"


def rows(storage: Storage, path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table, none when it is not there; of a damaged one, a row that says so."""
    content = storage.read_bytes(path)
    try:
        return [] if content is None else pq.read_table(pa.BufferReader(content)).to_pylist()
    except (OSError, pa.ArrowException):
        return [
            {"seed": "?", "status": "failed", "error": "the table is damaged; the record's command writes it again"}
        ]


def read(storage: Storage, path: Path) -> dict[str, Any] | None:
    """Read a JSON object, or None when the file is not there. Raises DamagedError, and OSError when a store fails."""
    try:
        content = storage.read_bytes(path)
        found = None if content is None else json.loads(content)
    except (ValueError, RecursionError, IsADirectoryError, PermissionError) as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise DamagedError(f"{path.name} is damaged{why}") from None
    if found is not None and not isinstance(found, dict):
        raise DamagedError(f"{path.name} is damaged")
    return found


def nested_object(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the object of this name inside another; an empty one where there is none."""
    value = parent.get(name)
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """Return a number as a float; None for what is none, True and False too."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def join_notes(*notes: str) -> str:
    """Join the notes that are not empty."""
    return ", ".join(note for note in notes if note)


def duration(seconds: float) -> str:
    """Write seconds in the largest unit of which there are two or more."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
