"""What a run leaves behind on a machine: processes, ports, memory, files. Linux only: all is read from /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from hedgemix.runtime.files import read_json
from hedgemix.runtime.layout import RESULT
from pipeline.steps.step import ASIDE

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SETTLED_SECONDS = 30.0
"""A process takes its memory when it starts: its samples count from this age on."""
MOST_MIB, MOST_DESCRIPTORS = 10.0, 10.0
"""A minute."""
OWN = (RESULT, ASIDE, "clock.json", "*.lock", "error.txt", "checkpoint.json", "log.jsonl", "trace.jsonl", "audit*")
"""Files in a step's folder that are neither made by it nor checkpoints."""


def members(sessions: Collection[int]) -> list[int]:
    """Ids of the living processes of these sessions, named by their leaders."""
    return [pid for pid, session in living() if session in sessions]


def living() -> Iterator[tuple[int, int]]:
    """Id and session of every process that has not ended."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state not in "ZX":
                    yield int(entry.name), int(session)


def processes(marker: str, sessions: Collection[int] = ()) -> dict[int, str]:
    """Id and command line of every living process but this one with `marker` (NAME=value) in its environment, or of one
    of these sessions: Ray's workers write their titles over their environment."""
    found = {}
    for pid, session in living():
        with contextlib.suppress(OSError):
            if pid != os.getpid() and (session in sessions or marker.encode() in environment(pid)):
                found[pid] = title(pid)
    return found


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def title(pid: int) -> str:
    """The command line; empty when the process has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def listening(pids: Iterable[int]) -> set[int]:
    """TCP ports that these processes listen on."""
    sockets: dict[str, int] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    sockets[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    ports = set()
    for pid in pids:
        for name in descriptors(pid):
            if name.startswith("socket:[") and name[8:-1] in sockets:
                ports.add(sockets[name[8:-1]])
    return ports


def descriptors(pid: int) -> list[str]:
    """What each open file descriptor of a process leads to; none when it has gone."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(entry.path))
    return found


def resident_bytes(pid: int) -> int:
    """Memory of a process; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return 0


def files(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                found[str(path)] = path.stat().st_size
    return found


def used(paths: Iterable[str]) -> set[str]:
    """Those that a living process has open or mapped; others' processes tell only what they may."""
    wanted, found = set(paths), set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and wanted:
            found |= wanted & set(descriptors(int(entry.name)))
            with contextlib.suppress(OSError):
                maps = (entry / "maps").read_text()
                found |= {path for path in wanted if path in maps}
    return found


def unclaimed(runs: Path) -> dict[str, int]:
    """Bytes of the files in a runs folder that no finished step made and no later start needs: temporary files, old
    checkpoints, whole folders of steps that were never finished."""
    found = {}
    for name, size in files(runs / "_steps").items():
        path = Path(name)
        folder = runs / "_steps" / path.relative_to(runs / "_steps").parts[0]
        try:
            made = set(read_json(folder / RESULT)["files"])
        except (OSError, ValueError, KeyError):
            found[name] = size
            continue
        if path.relative_to(folder).as_posix() not in made | listed(folder) and not any(
            path.parent == folder and fnmatch(path.name, pattern) for pattern in OWN
        ):
            found[name] = size
    for path in (*runs.glob("_records/*/*"), *runs.glob("*"), *runs.glob(".*")):
        known = path.suffix == ".parquet" or path.name in ("recipe.json", "steps.json", "record.lock")
        if path.is_file() and not known:
            found[str(path)] = path.stat().st_size
    return found


def listed(folder: Path) -> set[str]:
    """The checkpoints that another start would take up."""
    try:
        return {f"checkpoint-{entry['number']}.pt" for entry in read_json(folder / "checkpoint.json")["checkpoints"]}
    except (OSError, ValueError, KeyError):
        return set()


@dataclass
class Samples:
    """Memory and descriptors of processes over time: (seconds, bytes, descriptors) by role and process."""

    taken: dict[tuple[str, int], list[tuple[float, int, int]]] = field(default_factory=dict)

    def add(self, seconds: float, role: str, pid: int) -> None:
        size = resident_bytes(pid)
        if size:
            self.taken.setdefault((role, pid), []).append((seconds, size, len(descriptors(pid))))

    def trend(self, role: str, until_seconds: float) -> Trend | None:
        """Of the role's process with the longest life in the second half of a run of so many seconds; None where none
        was there for a minute after it had settled."""
        best: list[tuple[float, int, int]] = []
        for (of, _), samples in self.taken.items():
            late = [at for at in samples if at[0] >= max(until_seconds / 2, samples[0][0] + SETTLED_SECONDS)]
            if of == role and late and (not best or late[-1][0] - late[0][0] > best[-1][0] - best[0][0]):
                best = late
        if not best or best[-1][0] - best[0][0] < 60:
            return None
        minutes = [at[0] / 60 for at in best]
        return Trend(
            minutes[-1] - minutes[0],
            best[-1][1] / 2**20,
            slope(minutes, [at[1] / 2**20 for at in best]),
            best[-1][2],
            slope(minutes, [at[2] for at in best]),
        )


@dataclass(frozen=True)
class Trend:
    minutes: float
    mib: float
    """At the end."""
    mib_a_minute: float
    descriptors: int
    descriptors_a_minute: float

    def grows(self) -> bool:
        """More than can be kept up for a day's record. Of less than three minutes a line tells nothing."""
        return self.minutes >= 3 and (self.mib_a_minute > MOST_MIB or self.descriptors_a_minute > MOST_DESCRIPTORS)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line with the least squares."""
    return float(np.polyfit(x, y, 1)[0])
