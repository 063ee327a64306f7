"""The soak: many tiny seeds through the whole pipeline on a real cluster of processes, while random ones are killed.

    make soak                                    # the long tests, then this
    python -m benchmarks.faults.soak [--minutes 10] [--seeds 20] [--seed 0] [--nodes 2]

Killed are training's workers, ranks of an evaluation, tasks, jobs, whole nodes, the driver and the whole cluster; the
storage refuses writes for a moment; a bit of a checkpoint or an artifact flips. What is drawn, and how long until the
next, repeats with `--seed`; whom it meets does not, since the machine's speed says that. The same command is started
again until its seeds are done, then the next seeds, until both the seeds and the minutes are over. Then every seed must
have one row with the bits of an undisturbed run, the retries and lost seconds that the kills ask for, and nothing may
be left behind. Writes bench/soak.md and bench/soak.json; exit code 1 when anything is wrong. Linux only.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import tyro

from benchmarks.faults import cluster as clusters
from benchmarks.faults import disturbances, injection, leaks, same_record
from benchmarks.faults.record_under_faults import COMMAND, NODE_CPUS, RECIPE, ROOT, Disturbed, Plan
from benchmarks.suite import machine
from hedgemix import __version__
from pipeline.results.table import read_rows
from pipeline.storage.store import Storage

SETTLE_SECONDS = 60.0
"""So long a process may take to end after what it worked for has."""
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
"""Processes that Ray keeps for all jobs."""


@dataclass(frozen=True)
class Options(Plan):
    references: int = 5
    """Seeds that are run undisturbed as well; the rows of all others are only compared with what they must hold."""
    out: Path = ROOT / "bench"
    keep: bool = False
    """Leave the folder of the run."""


def settle(soak: Disturbed) -> list[str]:
    """What still works in the cluster though no command does."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        titles = [leaks.title(pid) for pid in soak.pids()]
        busy = [name for name in titles if name.startswith("ray::") and not name.startswith(RAYS_OWN)]
        groups = [state for state in soak.cluster.trainings() if state != "REMOVED"] if soak.cluster else []
        if not busy and not groups:
            return []
        time.sleep(1)
    return [f"after the last command: {', '.join(busy + groups)}"]


def leftover(soak: Disturbed, marker: str, shared: set[str]) -> list[str]:
    """What is left when everything has been ended: processes, shared memory, temporary files, files of the runs."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (alive := leaks.processes(marker, soak.sessions)) and time.monotonic() < deadline:
        time.sleep(0.5)
    found = [f"process {pid} is left: {name[:100]}" for pid, name in alive.items()]
    found += [f"port {port} is left" for port in sorted(leaks.listening(alive))]
    memory = {path: size for path, size in leaks.files(Path("/dev/shm")).items() if path not in shared}
    mapped = leaks.used(memory)
    temporary = {path: size for path, size in leaks.files(soak.folder / "tmp").items() if not path.endswith(".lock")}
    for what, left in (
        ("shared memory", {path: size for path, size in memory.items() if path not in mapped}),
        ("temporary file", temporary),
        ("file that no step claims", leaks.unclaimed(soak.runs)),
    ):
        found += [f"{what} is left: {path} ({size:,} bytes)" for path, size in sorted(left.items())]
    return found


def main(options: Options) -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    marker = f"HEDGEMIX_SOAK={os.getpid()}"
    shared = set(leaks.files(Path("/dev/shm")))
    about = machine.describe(torch.device("cpu")) | {"ray": ray.__version__, "hedgemix": __version__}
    folder = Path(tempfile.mkdtemp(prefix="hxs", dir="/tmp"))
    wrong: list[str] = []
    with ExitStack() as stack:
        if not options.keep:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("runs", "tmp", "calm"):
            (folder / name).mkdir()
        full = injection.fail(f"{folder}/runs/*", "ENOSPC", times=10**9, during=str(folder / "full"))
        environment = {
            **os.environ, **clusters.QUICK, **injection.Plan(folder / "faults", full).environment(),
            "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "HEDGEMIX_SOAK": str(os.getpid()),
        }  # fmt: skip
        environment.pop("RAY_ADDRESS", None)
        environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        soak = Disturbed(options, folder, environment, None, random.Random(options.seed), random.Random(~options.seed))
        stack.callback(lambda: disturbances.kill(leaks.processes(marker, soak.sessions)))
        with ExitStack() as machines:
            if options.nodes:
                soak.cluster = machines.enter_context(clusters.cluster(0, environment))
                for _ in range(options.nodes):
                    soak.cluster.add(NODE_CPUS, 0)
            soak.began = soak.progressed = time.monotonic()
            before = len(leaks.listening(soak.pids()))
            try:
                machines.enter_context(soak.watched())
                soak.run()
                ran = soak.seconds()
                code = soak.last()
                wrong += [] if code == 0 else [f"the last command ended with {code}: {soak.tail()}"]
                wrong += settle(soak) if soak.cluster else []
            except (RuntimeError, AssertionError) as error:
                ran, wrong = soak.seconds(), [*wrong, str(error)]
            after = len(leaks.listening(soak.pids()))
        wrong += soak.stuck + leftover(soak, marker, shared)
        seeds = soak.done[:: max(1, len(soak.done) // max(1, options.references))][: options.references]
        arguments = [*COMMAND[2:], *RECIPE, "--out", str(folder / "calm")]
        expected = same_record.undisturbed(folder / "calm", seeds, arguments) if seeds else {}
        rows = read_rows(Storage("", soak.runs), soak.runs / "soak.parquet")
        wrong += same_record.wrong_rows(rows, soak.done, expected)
        wrong += same_record.wrong_steps(soak.runs, soak.bounds)
        wrong += [f"{each.kind} at {each.at_seconds:.0f} s: nothing went on" for each in soak.kills if each.lost()]
        trends = {role: soak.samples.trend(role, ran) for role in sorted({role for role, _ in soak.samples.taken})}
        wrong += [f"{role} grows: {trend}" for role, trend in trends.items() if trend and trend.grows()]
        told = {
            "minutes": ran / 60, "seed": options.seed, "seeds": len(soak.done), "references": seeds, "rows": rows,
            "kills": [asdict(each) | {"holders": len(each.holders)} for each in soak.kills], "missed": soak.missed,
            "commands": len(soak.commands), "codes": soak.codes, "bounds": soak.bounds, "trends": trends,
            "processes": max(count for _, count in soak.processes), "ports": [before, after], "machine": about,
            "wrong": wrong,
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        text = markdown(told)
        (options.out / "soak.json").write_text(json.dumps(told, indent=1, default=vars) + "\n")
        (options.out / "soak.md").write_text(text)
        print(text)
    return 1 if wrong else 0


def markdown(told: dict[str, Any]) -> str:
    """soak.md, from what soak.json holds."""
    rows, kills, about = told["rows"], told["kills"], told["machine"]
    retries, lost = (sum(row[name] or 0 for row in rows) for name in ("retries", "lost_seconds"))
    lines = [
        "# Soak",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, load {about['load']} at the start; torch "
        f"{about['torch']}, Ray {about['ray']}, Python {about['python']}. {told['minutes']:.1f} minutes of kills, "
        f"drawn with seed {told['seed']}; {told['seeds']} seeds done, {len(told['references'])} of them compared with "
        f"an undisturbed run, bit by bit.",
        "",
        "| what | |",
        "|---|---:|",
        f"| commands started | {told['commands']} |",
        f"| of them ended by themselves with seeds not done | {sum(code != 0 for code in told['codes'])} |",
        f"| retries of steps | {retries} |",
        f"| seconds of work that were lost | {lost:.1f} |",
        f"| most processes at once | {told['processes']} |",
        f"| listening ports at the start, at the end | {told['ports'][0]}, {told['ports'][1]} |",
        f"| what was wrong | {len(told['wrong'])} |",
        "",
        "| hit | times | on a step's work | went on | seconds until it did: median | most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in disturbances.WEIGHTS:
        mine = [each for each in kills if each["kind"] == kind]
        back = sorted(each["recovered_seconds"] for each in mine if each["recovered_seconds"] is not None)
        times = f"{statistics.median(back):.1f} | {back[-1]:.1f}" if back else "|"
        lines.append(f"| {kind} | {len(mine)} | {sum(bool(e['steps']) for e in mine)} | {len(back)} | {times} |")
    lines += [
        "",
        "| process | minutes | MiB | MiB a minute | descriptors | a minute |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for role, trend in told["trends"].items():
        if trend:
            lines.append(
                f"| {role} | {trend.minutes:.1f} | {trend.mib:.0f} | {trend.mib_a_minute:+.2f} | {trend.descriptors} | "
                f"{trend.descriptors_a_minute:+.2f} |"
            )
        else:
            lines.append(f"| {role} | less than one | | | | |")
    return "\n".join([*lines, "", *(f"- WRONG: {each}" for each in told["wrong"]), ""])


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
