"""A run's sections, one after the other: each has a process and a time limit of its own, and each figure is a line of
JSON in results.jsonl the moment it is known.

Notable: a process is forked for each section, before anything has touched the device. So one that raises, hangs in a
kernel, breaks the device's context or turns a global switch on costs itself and nothing else, and memory peaks are its
own. In the section an alarm raises at the limit; where that is not heard (in C code, say), the process is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch's optimizers import it when they are first used: two seconds, in every section's process

from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.text import Text

GRACE_SECONDS = 5.0
"""From the alarm to the kill."""
CLOSING_SECONDS = 10.0
"""Of the whole run's time, for the table at the end."""
RECORDED = 0, 1
"""Exit codes of a section that wrote its own last line: it ended, it failed."""


class TimeLimit(BaseException):
    """The section's time is over. No `Exception`: what is left alone by those who catch every one of these."""


class Results:
    """Lines of JSON, each written and flushed at once: {call, card, section, name, value, unit, most, note} for a
    figure, {call, card, section, status, seconds, error} for a section's end."""

    def __init__(self, path: Path, call: str, card: str = "") -> None:
        """card: the device's name, for every line."""
        self.path, self.call, self.card = path, call, card
        path.parent.mkdir(parents=True, exist_ok=True)
        self.begins = path.stat().st_size if path.exists() else 0

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"call": self.call, "card": self.card, **record}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def end(self, section: str, status: str, seconds: float, error: str = "") -> None:
        """status: ended, failed, stopped (at its limit), killed or skipped."""
        self.write({"section": section, "status": status, "seconds": round(seconds, 2), "error": error})

    def lines(self) -> list[dict[str, Any]]:
        """This run's."""
        if not self.path.exists():
            return []
        with open(self.path) as file:
            file.seek(self.begins)
            return [json.loads(line) for line in file]


@dataclass
class Job:
    """What every section is given."""

    device: torch.device
    sizes: Sizes
    text: Text
    work: Path
    """What sections and calls leave for later ones; not fetched."""
    out: Path
    """What is fetched: few and small files."""
    results: Results
    train_seconds: float
    section: str = ""

    def tell(
        self, name: str, value: float | str | bool, unit: str = "", most: float | None = None, note: str = ""
    ) -> None:
        """Note a figure. most: the largest value that is right (a difference's, say); a larger one fails the run."""
        value = value if isinstance(value, str | bool) else float(value)
        self.results.write(
            {"section": self.section, "name": name, "value": value, "unit": unit, "most": most, "note": note}
        )
        print(f"  {name}: {value if isinstance(value, str | bool) else f'{value:.6g}'} {unit}", flush=True)

    def peak(self, of: str) -> None:
        """Note the most memory in use since the last call; a CPU has none to tell."""
        if self.device.type == "cuda":
            self.tell(f"peak memory of {of}", torch.cuda.max_memory_allocated(self.device) / 2**30, "GiB")
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass(frozen=True)
class Section:
    name: str
    limit_seconds: float
    work: Callable[[Job], None]
    proves: str
    """For docs/gpu.md."""
    least_seconds: float = 10.0
    """Not begun with less than this left."""


def run(sections: Sequence[Section], job: Job, seconds: float, stretch: float = 1.0) -> bool:
    """Run them within so many seconds in all, their own limits times `stretch`; returns whether every one ended."""
    deadline, sound = time.monotonic() + seconds - CLOSING_SECONDS, True
    for section in sections:
        left = deadline - time.monotonic()
        if left < section.least_seconds:
            job.results.end(
                section.name, "skipped", 0.0, f"{left:.0f} s were left, it takes {section.least_seconds:.0f}"
            )
            sound = False
            continue
        limit = min(stretch * section.limit_seconds, left)
        print(f"{section.name} (at most {limit:.0f} s)", flush=True)
        sound &= attempt(section, job, limit)
    return sound


def attempt(section: Section, job: Job, limit: float) -> bool:
    """One section in a process of its own; returns whether it ended."""
    job.section, began = section.name, time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # with it goes what it starts
        code = 1
        try:
            code = inside(section, job, limit)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    try:
        status = ended(pid, began + limit + GRACE_SECONDS)
    finally:
        kill(pid)
    seconds = time.monotonic() - began
    if status is None:
        job.results.end(section.name, "killed", seconds, f"did not stop at its limit of {limit:.0f} s")
    elif os.waitstatus_to_exitcode(status) not in RECORDED:
        job.results.end(section.name, "killed", seconds, f"its process ended with {os.waitstatus_to_exitcode(status)}")
    return status == 0


def inside(section: Section, job: Job, limit: float) -> int:
    """The section's own process; returns its exit code."""

    def stop(number: int, frame: Any) -> None:
        raise TimeLimit

    began = time.monotonic()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 0.5)  # and again, should someone swallow it
    try:
        section.work(job)
        status, error = "ended", ""
    except (TimeLimit, Exception) as problem:
        signal.setitimer(signal.ITIMER_REAL, 0)
        traceback.print_exc()
        place = [each for each in traceback.extract_tb(problem.__traceback__) if each.name != stop.__name__][-1]
        over = isinstance(problem, TimeLimit)
        status = "stopped" if over else "failed"
        what = f"over its {limit:.0f} s" if over else f"{type(problem).__name__}: {problem}"
        error = f"{what[:2000]} (in {Path(place.filename).name}, line {place.lineno})"
    signal.setitimer(signal.ITIMER_REAL, 0)
    job.results.end(section.name, status, time.monotonic() - began, error)
    return 0 if status == "ended" else 1


def ended(pid: int, deadline: float) -> int | None:
    """The process's wait status, None when it still runs at the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    return None


def kill(pid: int) -> None:
    """The section's process group, whatever is left of it."""
    try:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
