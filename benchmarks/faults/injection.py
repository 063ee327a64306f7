"""Faults for a command, a test's or the soak's: real processes killed, and real writes failed, at a chosen file event.

    plan = injection.Plan(tmp_path / "faults", injection.kill("*/checkpoint*.pt", at=2), injection.fail("*/weights.pt",
    "ENOSPC")) tiny_record.run(options, tmp_path, plan.environment())
    plan.check()

`armed/sitecustomize.py` carries them out. A match is counted over all processes of the command, so what fires once
does not fire again in the process that is started anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HOOKS = Path(__file__).resolve().parent / "armed"


@dataclass(frozen=True)
class Fault:
    path: str
    """fnmatch pattern of the whole path; a temporary file counts as the file it is to become."""
    event: str
    """"write": opened for writing; "rename": put in its place; "read": opened for reading. The fault comes first."""
    at: int = 1
    """The match that fires, from 1."""
    times: int = 1
    """How many matches from there on fire."""
    error: str = ""
    """Name of the errno to raise, such as ENOSPC; empty: kill."""
    rank: int | None = None
    """Only matches in the process of this rank of a process group."""
    kill_rank: int | None = None
    """Kill this rank's process, of a command with one group at a time; None: the process of the match."""
    machine: bool = False
    """Kill every process of the session: a node of `cluster`, or the command with the Ray of its own."""
    during: str = ""
    """Only while this file is there."""
    after: str = ""
    """Whoever comes to the event waits there until this file is."""
    name: str = ""


def kill(
    path: str,
    at: int = 1,
    event: str = "rename",
    rank: int | None = None,
    kill_rank: int | None = None,
    machine: bool = False,
    after: str = "",
) -> Fault:
    """SIGKILL just before the file is put in its place (or, `event`, opened); with `after`, once that file is there."""
    return Fault(path, event, at, rank=rank, kill_rank=kill_rank, machine=machine, after=after)


def fail(path: str, error: str, at: int = 1, times: int = 1, event: str = "write", during: str = "") -> Fault:
    """The event raises OSError."""
    return Fault(path, event, at, times, error, during=during)


class Plan:
    """The faults of one command, and what became of them."""

    def __init__(self, folder: Path, *faults: Fault) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.faults = [replace(fault, name=f"fault-{number}") for number, fault in enumerate(faults)]
        (folder / "plan.json").write_text(json.dumps([asdict(fault) for fault in self.faults]))

    def environment(self) -> dict[str, str]:
        """What the command, and the Ray it works on, need in their environment."""
        return {"FAULTS": str(self.folder), "PYTHONPATH": python_path()}

    def fired(self, number: int = 0) -> int:
        """How often this fault fired."""
        fault = self.faults[number]
        matches = len(list(self.folder.glob(f"{fault.name}.*")))
        return min(fault.times, max(0, matches - fault.at + 1))

    def check(self) -> None:
        """Every fault fired: a test whose fault never came has tested nothing."""
        for number, fault in enumerate(self.faults):
            assert self.fired(number), f"never fired: {fault}"


def python_path() -> str:
    before = os.environ.get("PYTHONPATH")
    return f"{HOOKS}{os.pathsep}{before}" if before else str(HOOKS)


def pretend_gpus() -> dict[str, str]:
    """The environment in which work that asks Ray for GPUs runs on the CPU."""
    return {"PRETEND_GPUS": "1", "PYTHONPATH": python_path()}
