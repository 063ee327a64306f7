"""What the marks of one command say: when it worked, how long a step took, and what the rest of the time went to."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WORK = ("train_stage", "score_stage", "quantize_stage", "counts_stage", "evaluate_stage")
UNSETTLED_STEPS = 5
"""First steps of a run that are not counted: allocators and caches fill."""


@dataclass(frozen=True)
class Mark:
    """One call, in seconds of the machine's monotonic clock."""

    pid: int
    name: str
    begin: float
    end: float
    cpu: float


@dataclass(frozen=True)
class Command:
    """One command that was run: begin and end, its processes' marks, and their CPU seconds over time."""

    begin: float
    end: float
    seeds: int
    marks: Sequence[Mark]
    cpu: dict[int, list[tuple[float, float]]]
    """For each process, (time, CPU seconds used until then)."""

    def named(self, *names: str) -> list[Mark]:
        return [mark for mark in self.marks if mark.name in names]

    def first(self, name: str) -> Mark:
        return min(self.named(name), key=lambda mark: mark.begin)

    def seconds(self) -> float:
        return self.end - self.begin

    def without_work(self, begin: float = 0.0, end: float = float("inf")) -> float:
        """Seconds, within these bounds, in which no stage was at work in any process."""
        begin, end = max(begin, self.begin), min(end, self.end)
        return end - begin - covered([(mark.begin, mark.end) for mark in self.named(*WORK)], begin, end)

    def cpu_without_work(self) -> float:
        """CPU seconds of all processes, less those of the stages."""
        total = sum(series[-1][1] for series in self.cpu.values())
        return total - sum(mark.cpu for mark in self.named(*WORK))

    def first_step(self) -> float:
        return self.first("train_step").begin - self.begin

    def steps(self) -> tuple[float, float]:
        """Median milliseconds from step to step, and of CPU in a step, over all ranks."""
        walls: list[float] = []
        cpus: list[float] = []
        for pid in {mark.pid for mark in self.named("train_step")}:
            settled = [mark for mark in self.named("train_step") if mark.pid == pid][UNSETTLED_STEPS:]
            walls += np.diff([mark.begin for mark in settled]).tolist()
            cpus += [mark.cpu for mark in settled]
        return 1000 * float(np.median(walls)), 1000 * float(np.median(cpus))

    def beside_training(self) -> float:
        """Of one core: what the processes that do not train use while others do."""
        steps = self.named("train_step")
        ranks = {mark.pid for mark in steps}
        pid = steps[0].pid
        begin, end = (edge(mark.begin for mark in steps if mark.pid == pid) for edge in (min, max))
        used = 0.0
        for other, series in self.cpu.items():
            inside = [cpu for at, cpu in series if begin <= at <= end]
            if other not in ranks and inside:
                used += inside[-1] - inside[0]
        return used / (end - begin)


def phases(command: Command) -> dict[str, float]:
    """Seconds without work of the pipeline's command, for its first seed; then its end."""
    ray, train, stage = command.first("init"), command.first("perform train"), command.first("train_stage")
    evaluated = command.first("perform evaluate")
    first_evaluation = command.first("evaluate_stage")
    loads = [
        mark
        for mark in command.named("import ray.train", "import pipeline.execution.train_job")
        if mark.pid == stage.pid
    ]
    joins = [mark for mark in command.named("init_process_group") if mark.pid == stage.pid]
    imports, joining = (sum(mark.end - mark.begin for mark in part) for part in (loads, joins))
    gang = command.without_work(evaluated.begin, first_evaluation.begin)
    last = max(mark.end for mark in command.named(*WORK))
    return {
        "the command's imports, recipe and data check": command.without_work(command.begin, ray.begin),
        "starting Ray": command.without_work(ray.begin, ray.end),
        "the seed's task, until it runs": command.without_work(ray.end, train.begin),
        "Ray Train's controller and worker group": command.without_work(train.begin, stage.begin) - imports - joining,
        "imports of its first worker": imports,
        "joining the process group": joining,
        "from the last rank's end of training to the task's": command.without_work(stage.end, train.end),
        "between training, quantization, scoring and evaluation": command.without_work(train.end, evaluated.begin),
        "the evaluation's gang": gang,
        "after the last stage, shutting down": command.end - last,
    }


def covered(parts: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds between begin and end that lie in at least one part."""
    total, reached = 0.0, begin
    for start, stop in sorted(parts):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            total += stop - start
            reached = stop
    return total


def read(folder: Path) -> list[Mark]:
    """All marks in a folder, each process's in the order of their ends; a line that a kill cut short is left out."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found.append(Mark(int(path.stem), record["name"], record["begin"], record["end"], record["cpu"]))
    return found


@dataclass
class Sampler:
    """CPU seconds of every process whose environment has this setting, read again and again until it is stopped."""

    setting: str
    seconds: float = 0.25
    found: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    others: set[tuple[int, int]] = field(default_factory=set)

    def __enter__(self) -> Sampler:
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()

    def run(self) -> None:
        while not self.stopped.wait(self.seconds):
            for name in os.listdir("/proc"):
                if name.isdigit():
                    self.sample(int(name))

    def sample(self, pid: int) -> None:
        try:
            parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            born = int(parts[19])
            if (pid, born) in self.others:
                return
            if pid not in self.found and self.setting.encode() not in Path(f"/proc/{pid}/environ").read_bytes():
                self.others.add((pid, born))
                return
        except OSError:  # it ended, or is not ours to read
            return
        used = (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")
        if used or pid in self.found:
            self.found.setdefault(pid, []).append((time.monotonic(), used))
