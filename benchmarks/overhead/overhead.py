"""What Ray costs: the same seed through the pipeline's command and through plain processes, in turns.

    python -m benchmarks.overhead.overhead --quick     # minutes on two cores
    python -m benchmarks.overhead.overhead             # three turns of each

The plain side is `benchmarks/plain/launch.py`, started by torchrun for training and for evaluation: the same functions
on the same text, with as many ranks and threads. `benchmarks/overhead/marks` notes in both what ran when. Work is what
the stages of `hedgemix/stages.py` do; everything else, from a command's start to its end, is not. The pipeline prepares
the text beforehand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from benchmarks.overhead.timeline import Command, Sampler, phases, read
from benchmarks.suite import machine, report
from hedgemix.config import Recipe, to_dict
from hedgemix.runtime.files import write_json
from pipeline import record
from pipeline.storage import machine as machine_lock
from pipeline.storage.store import Storage

ROOT = Path(__file__).resolve().parent.parent.parent
MARKS = "HEDGEMIX_MARKS"
STEPS = {False: 80, True: 60}
"""Of training, by --quick."""


@dataclass(frozen=True)
class Options:
    quick: bool = False
    """One turn of each, fewer steps."""
    turns: int = 3
    """Runs of each side and number of workers (1 with --quick)."""
    workers: tuple[int, ...] = (1, 2)
    """Ranks of training and of evaluation, each number by itself."""
    seeds: int = 1
    """Seeds of one command; more share its start and its end."""
    out: Path = Path("bench")
    """Folder of overhead.md; the runs are made in a folder beside it and removed."""
    keep: bool = False
    """Leave the runs, with their marks."""
    update_docs: bool = False
    """Also write the tables into docs/performance.md."""


def main(options: Options) -> str:
    if options.update_docs and options.quick:
        sys.exit("error: --update-docs takes the figures of a whole run; leave out --quick")
    about, began = machine.describe(torch.device("cpu")), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, list[Command]]] = {}
    turns, loads = 1 if options.quick else options.turns, []
    scratch = Path(tempfile.mkdtemp(prefix="overhead-", dir=options.out.resolve()))
    try:
        with machine_lock.machine_to_itself(lambda: say("a record is at work on this machine; waiting for it")):
            record.prepare(recipe_of(options, 1, scratch)[0], Storage("", scratch / "text"), Console(stderr=True))
            for turn in range(turns):
                for workers in options.workers:
                    sides = found.setdefault(workers, {"plain": [], "ray": []})
                    for side in ("plain", "ray")[:: 1 if turn % 2 == 0 else -1]:
                        folder = scratch / f"{side}-{workers}-{turn}"
                        command = run(side, options, workers, folder, scratch / "text")
                        loads.append(os.getloadavg()[0])
                        sides[side].append(command)
                        say(
                            f"{time.monotonic() - began:5.0f} s  {side}, {workers} workers: {command.seconds():.1f} s, "
                            f"{command.without_work():.1f} s of it without work, {command.steps()[0]:.1f} ms a step, "
                            f"load {loads[-1]:.1f}"
                        )
    finally:
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    head = (
        f"{about['cpu']}, {about['cores']} cores; torch {about['torch']}, Python {about['python']}; load at the start "
        f"{about['load']}, after each command {min(loads):.1f} to {max(loads):.1f} (its own included). "
        f"{turns} {'turn' if turns == 1 else 'turns'} of {STEPS[options.quick]} steps, {options.seeds} "
        f"{'seed' if options.seeds == 1 else 'seeds'} a command. Medians, with the least and the most in brackets."
    )
    text = f"{head}\n\n{sides_table(found)}\n\n{phases_table(found)}"
    (options.out / "overhead.md").write_text(text + "\n")
    print(text)
    if options.update_docs:
        report.update(ROOT / "docs" / "performance.md", "overhead", text)
    return text


def recipe_of(options: Options, workers: int, out: Path) -> tuple[Recipe, list[str]]:
    """Recipe laptop with less text and a fixed number of steps, each rank its share of the cores; and the command
    line that gives it."""
    cpus = max(1, len(os.sched_getaffinity(0)) // workers)
    settings: dict[str, Any] = {
        "data.packages": "numpy",
        "data.max-valid-tokens": 16_384,
        "train.steps": STEPS[options.quick],
        "compute.workers": workers,
        "compute.evaluate-workers": workers,
        "compute.cpus-per-worker": cpus,
        "compute.max-restarts": 0,
        "out": out,
    }
    arguments = ["laptop", *(f"--{name}={value}" for name, value in settings.items())]
    arguments += ["--seeds", *map(str, range(1, options.seeds + 1))]
    return record.parse(arguments)[0], arguments


def run(side: str, options: Options, workers: int, folder: Path, text: Path) -> Command:
    """One side's whole command, or commands, for all seeds, in a folder of its own that holds the text."""
    marks = folder / "marks"
    shutil.copytree(text, folder)
    marks.mkdir()
    recipe, arguments = recipe_of(options, workers, folder)
    write_json(folder / "recipe.json", to_dict(recipe))
    environment = {
        **os.environ,
        MARKS: str(marks),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks" / "overhead" / "marks"), str(ROOT)]),
        "OMP_NUM_THREADS": str(int(recipe.compute.cpus_per_worker)),
        "HEDGEMIX_LOCKS": str(folder),  # this process holds the lock of records that share a machine
    }
    environment.pop("RAY_ADDRESS", None)
    if side == "ray":
        commands = [[sys.executable, str(ROOT / "pipeline" / "record.py"), *arguments]]
    else:
        commands = [part for seed in range(1, options.seeds + 1) for part in plain(workers, folder, seed)]
    with Sampler(f"{MARKS}={marks}") as sampler:
        begin = time.monotonic()
        for command in commands:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        end = time.monotonic()
    return Command(begin, end, options.seeds, read(marks), sampler.found)


def plain(workers: int, folder: Path, seed: int) -> list[list[str]]:
    """The commands of one seed, one after the other."""
    launch = ["-m", "benchmarks.plain.launch", "--runs", str(folder), "--recipe", str(folder / "recipe.json")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    named = ["--seed", str(seed), "--stages"]
    return [
        [*torchrun, *launch, *named, "train"],
        [sys.executable, *launch, *named, "quantize", "score", "counts"],
        [*torchrun, *launch, *named, "evaluate"],
    ]


def sides_table(found: dict[int, dict[str, list[Command]]]) -> str:
    measures = {
        "ms a step": lambda command: command.steps()[0],
        "CPU ms in a step, a rank": lambda command: command.steps()[1],
        "s to the first step": Command.first_step,
        "s without work, a seed": lambda command: command.without_work() / command.seeds,
        "CPU s without work, a seed": lambda command: command.cpu_without_work() / command.seeds,
        "cores used beside training": Command.beside_training,
    }
    lines = ["| workers | | plain | Ray | Ray / plain | Ray - plain |", "|---:|---|---:|---:|---:|---:|"]
    for workers, sides in found.items():
        for name, measure in measures.items():
            ours, theirs = ([measure(each) for each in sides[side]] for side in ("ray", "plain"))
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)] if name.startswith(("ms", "CPU ms")) else []
            differences = [a - b for a, b in zip(ours, theirs, strict=True)]
            ratio = spread(ratios, 3) if ratios else ""
            cells = [str(workers), name, spread(theirs), spread(ours), ratio, spread(differences)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def phases_table(found: dict[int, dict[str, list[Command]]]) -> str:
    each = {workers: [phases(command) for command in sides["ray"]] for workers, sides in found.items()}
    heads = [f"{workers} {'worker' if workers == 1 else 'workers'}" for workers in each]
    lines = ["| Ray's first seed, seconds without work | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(each)]
    for name in next(iter(each.values()))[0]:
        cells = [spread([one[name] for one in several]) for several in each.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 2) -> str:
    middle = f"{np.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
