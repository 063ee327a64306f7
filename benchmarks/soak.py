"""The soak: many tiny seeds through the whole pipeline on a real cluster of processes, while random ones are killed.

    make soak                                    # the long tests, then this
    python -m benchmarks.soak [--minutes 10] [--seeds 20] [--seed 0] [--nodes 2]

Killed are training's workers, ranks of an evaluation, tasks, jobs, whole nodes, the driver and the whole cluster; the
storage refuses writes for a moment; a bit of a checkpoint or an artifact flips. What is drawn, and how long until the
next, repeats with `--seed`; whom it meets does not, since the machine's speed says that. The same command is started
again until its seeds are done, then the next seeds, until both the seeds and the minutes are over. Then every seed must
have one row with the bits of an undisturbed run, the attempts and lost seconds that the kills ask for, and nothing may
be left behind. Writes bench/soak.md and bench/soak.json; exit code 1 when anything is wrong. Linux only.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import tyro

from benchmarks import cluster as clusters
from benchmarks import disturbance, fault, leaks, machine, verdict
from benchmarks.cluster import Cluster
from benchmarks.disturbance import Bounds, Kill
from benchmarks.leaks import Samples
from hedgemix import __version__
from pipeline import results
from pipeline.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "pipeline" / "record.py"), "laptop"]
RECIPE = [
    "--record",
    "soak",
    "--data.source",
    "docs",
    "--data.packages",
    "numpy",
    "--data.max-text-bytes",
    "300000",
    "--data.vocab-size",
    "512",
    "--data.valid-fraction",
    "0.1",
    "--data.max-valid-tokens",
    "6000",
    "--model.layers",
    "2",
    "--model.width",
    "64",
    "--model.heads",
    "2",
    "--model.kv-heads",
    "2",
    "--model.mlp-hidden",
    "128",
    "--model.bigram-buckets",
    "256",
    "--model.bigram-width",
    "32",
    "--model.value-embedding-width",
    "32",
    "--train.steps",
    "60",
    "--train.batch-tokens",
    "512",
    "--train.sequence-tokens",
    "64",
    "--train.microbatch-sequences",
    "8",
    "--train.calibration-sequences",
    "8",
    "--train.warmup-steps",
    "1",
    "--train.log-every-steps",
    "5",
    "--evaluate.window-tokens",
    "64",
    "--evaluate.overlap-tokens",
    "64",
    "--evaluate.segment-tokens",
    "512",
    "--evaluate.chunk-tokens",
    "1024",
    "--evaluate.ttt.sequence-tokens",
    "64",
    "--compute.workers",
    "1",
    "--compute.cpus-per-worker",
    "1",
    "--compute.evaluate-workers",
    "2",
    "--compute.checkpoint-seconds",
    "0.5",
    "--compute.max-restarts",
    "30",
]
NODE_CPUS = 3
TICK_SECONDS = 0.2
SAMPLE_SECONDS = 5.0
SETTLE_SECONDS = 60.0
"""So long a process may take to end after what it worked for has."""
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
"""Processes that Ray keeps for all jobs."""
STALLED_MINUTES = 6.0
"""No seed ends for so long: it hangs."""


@dataclass(frozen=True)
class Options:
    minutes: float = 10.0
    """At least so long; longer when the seeds take longer."""
    seeds: int = 20
    """At least so many; more when they end earlier."""
    at_once: int = 4
    """Seeds of one command; the next seeds' command begins when all of them are done."""
    nodes: int = 2
    """Machines beside the head; 0: no cluster, the Ray that the command starts by itself."""
    seed: int = 0
    """Of the random draws."""
    mean_seconds: float = 15.0
    """Between kills."""
    references: int = 5
    """Seeds that are run undisturbed as well; the rows of all others are only compared with what they must hold."""
    kinds: tuple[str, ...] = tuple(disturbance.WEIGHTS)
    out: Path = ROOT / "bench"
    keep: bool = False
    """Leave the folder of the run."""


@dataclass
class Soak:
    """One run, and what it has seen."""

    options: Options
    folder: Path
    environment: dict[str, str]
    cluster: Cluster | None
    draw: random.Random
    victim: random.Random
    began: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    batch: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    progressed: float = field(default_factory=time.monotonic)
    kills: list[Kill] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    """Kinds that found nobody to kill."""
    bounds: dict[str, Bounds] = field(default_factory=dict)
    commands: list[int] = field(default_factory=list)
    """Ids of every command's process, which leads its session."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the commands that ended by themselves."""
    sessions: set[int] = field(default_factory=set)
    samples: Samples = field(default_factory=Samples)
    sampled: float = 0.0
    processes: list[tuple[float, int]] = field(default_factory=list)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def arguments(self, seeds: Iterable[int]) -> list[str]:
        return [*COMMAND, *RECIPE, "--out", str(self.runs), "--seeds", *map(str, seeds)]

    def start(self, seeds: list[int]) -> None:
        self.batch = seeds
        environment = {**self.environment, "RAY_ADDRESS": self.cluster.address} if self.cluster else self.environment
        with open(self.folder / "commands.log", "ab") as log:
            self.process = subprocess.Popen(
                self.arguments(seeds), env=environment, cwd=self.folder, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.commands.append(self.process.pid)
        self.sessions.add(self.process.pid)

    def pids(self) -> list[int]:
        """Processes of the cluster, and of the command."""
        machines = [self.cluster.head, *self.cluster.nodes] if self.cluster else []
        self.sessions.update(node.process.pid for node in machines)
        return [pid for leader in self.sessions for pid in clusters.session(leader)]

    def step(self, more: bool) -> None:
        """Look once at everything: the command, the kills, the memory. With `more`, new seeds follow those done."""
        code = self.process.poll() if self.process else 0
        if code is not None:
            if self.process:
                self.codes.append(code)
                self.process = None
            if code == 0:
                self.done += self.batch
                self.batch, self.progressed = [], time.monotonic()
            first = len(self.done)
            if self.batch or more:
                self.start(self.batch or list(range(first, first + self.options.at_once)))
        if time.monotonic() - self.progressed > 60 * STALLED_MINUTES:
            raise RuntimeError(f"no seed ended for {STALLED_MINUTES:g} minutes: {self.tail()}")
        disturbance.look([each for each in self.kills if each.recovered_seconds is None], self.runs)
        if time.monotonic() - self.sampled >= SAMPLE_SECONDS:
            self.sampled = time.monotonic()
            self.sample()
        time.sleep(TICK_SECONDS)

    def sample(self) -> None:
        pids = self.pids()
        self.processes.append((self.seconds(), len(pids)))
        if self.process:
            self.samples.add(self.seconds(), "driver", self.process.pid)
        heads = set(clusters.session(self.cluster.head.process.pid)) if self.cluster else set(pids)
        for pid in pids:
            name = Path(leaks.title(pid).split(" ")[0]).name
            if name in ("raylet", "gcs_server"):
                self.samples.add(self.seconds(), name if pid in heads else f"{name} of a node", pid)

    def tail(self) -> str:
        return (self.folder / "commands.log").read_text(errors="replace")[-3000:]

    def strike(self, kind: str) -> bool:
        """Disturb the work if there is one of this kind to be met now."""
        held = disturbance.holders(self.runs)
        if kind in disturbance.TITLES:
            found = disturbance.victims(kind, self.pids(), held)
            if not found:
                return False
            pid = self.victim.choice(found)
            self.hit(kind, leaks.title(pid), [pid], held)
        elif kind == "driver":
            if not self.process:
                return False
            self.hit(kind, "the command", [self.process.pid], held)
            self.process.wait()
            self.process = None
            self.start(self.batch)
        elif kind == "node" and self.cluster:
            node = self.victim.choice(self.cluster.nodes)
            self.hit(kind, node.name, node.pids(), held)
            node.kill()
            self.cluster.nodes.remove(node)
            self.cluster.add(NODE_CPUS, 0)
        elif kind == "cluster" and self.cluster:
            self.hit(kind, "head and nodes", [], held, every=True)
            self.cluster.kill()
            self.note(held)
            self.end_command()
            self.cluster.restart(0)
            for _ in range(self.options.nodes):
                self.cluster.add(NODE_CPUS, 0)
        elif kind == "storage":
            gate = self.folder / "full"
            gate.touch()
            time.sleep(disturbance.FULL_SECONDS)
            gate.unlink()
            self.hit(kind, f"no space for {disturbance.FULL_SECONDS:g} s", [], {})
        elif kind == "byte":
            paths = disturbance.damageable(self.runs)
            if not paths:
                return False
            path = self.victim.choice(paths)
            try:
                disturbance.flip(path, self.victim)
            except OSError:  # it went just now
                return False
            self.hit(kind, path.name, [], {0: path.parent.name})
            self.kills[-1].steps = [path.parent.name]
        else:
            return False
        return True

    def hit(self, kind: str, what: str, pids: list[int], held: dict[int, str], every: bool = False) -> None:
        """Kill these and note it."""
        began, seconds = time.time(), self.seconds()
        disturbance.kill(pids)
        gone = held if every else {pid: name for pid, name in held.items() if pid in pids}
        self.note(gone)
        steps = sorted(set(gone.values()))
        writing = {pid for pid, name in held.items() if kind in ("driver", "cluster") or name in steps}
        self.kills.append(Kill(kind, seconds, began, what, steps, writing - {0}))
        print(f"[{seconds:6.1f} s] {kind}: {what} {' '.join(steps)}", flush=True)

    def note(self, held: dict[int, str]) -> None:
        disturbance.note(self.bounds, self.runs, held.values())

    def end_command(self) -> None:
        """The command whose cluster was lost must end by itself, and say so."""
        if self.process:
            try:
                self.codes.append(self.process.wait(timeout=120))
            except subprocess.TimeoutExpired:
                self.missed.append("the command did not end with its cluster")
                self.process.kill()
                self.process.wait()
            self.process = None

    def run(self) -> None:
        """Until the seeds and the minutes are over."""
        kinds = [kind for kind in self.options.kinds if self.cluster or kind not in ("node", "cluster")]
        due, kind, waited = 0.0, "", 0.0
        while True:
            over = self.seconds() >= 60 * self.options.minutes and len(self.done) >= self.options.seeds
            if over and not self.batch:
                return
            self.step(more=not over)
            if not kind:
                due = max(due, self.seconds()) + self.draw.expovariate(1 / self.options.mean_seconds)
                kind = disturbance.draw_kind(self.draw, kinds)
            elif self.seconds() >= due:
                if self.strike(kind):
                    kind, due = "", self.seconds()
                elif self.seconds() >= due + disturbance.PATIENCE_SECONDS:
                    self.missed.append(kind)
                    kind = ""

    def last(self) -> int:
        """The same command for all seeds, undisturbed: what was damaged after it was done is made again."""
        self.start(self.done)
        process = self.process
        assert process is not None
        while process.poll() is None:
            self.step(more=False)
        self.process = None
        return process.returncode


def settle(soak: Soak) -> list[str]:
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


def leftover(soak: Soak, marker: str, shared: set[str]) -> list[str]:
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
        full = fault.fail(f"{folder}/runs/*", "ENOSPC", times=10**9, during=str(folder / "full"))
        environment = {
            **os.environ, **clusters.QUICK, **fault.Plan(folder / "faults", full).environment(),
            "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "HEDGEMIX_SOAK": str(os.getpid()),
        }  # fmt: skip
        environment.pop("RAY_ADDRESS", None)
        environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        soak = Soak(options, folder, environment, None, random.Random(options.seed), random.Random(~options.seed))
        stack.callback(lambda: disturbance.kill(leaks.processes(marker, soak.sessions)))
        with ExitStack() as machines:
            if options.nodes:
                soak.cluster = machines.enter_context(clusters.cluster(0, environment))
                for _ in range(options.nodes):
                    soak.cluster.add(NODE_CPUS, 0)
            soak.began = soak.progressed = time.monotonic()
            before = len(leaks.listening(soak.pids()))
            try:
                soak.run()
                ran = soak.seconds()
                code = soak.last()
                wrong += [] if code == 0 else [f"the last command ended with {code}: {soak.tail()}"]
                wrong += settle(soak) if soak.cluster else []
            except (RuntimeError, AssertionError) as error:
                ran, wrong = soak.seconds(), [*wrong, str(error)]
            after = len(leaks.listening(soak.pids()))
        wrong += leftover(soak, marker, shared)
        seeds = soak.done[:: max(1, len(soak.done) // max(1, options.references))][: options.references]
        arguments = [*COMMAND[2:], *RECIPE, "--out", str(folder / "calm")]
        expected = verdict.undisturbed(folder / "calm", seeds, arguments) if seeds else {}
        rows = results.read(Storage("", soak.runs), soak.runs / "soak.parquet")
        wrong += verdict.wrong_rows(rows, soak.done, expected)
        wrong += verdict.wrong_steps(soak.runs, soak.bounds)
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
    attempts, lost = (sum(row[name] or 0 for row in rows) for name in ("attempts", "lost_seconds"))
    lines = [
        "# Soak",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, load {about['load']} at the start; torch "
        f"{about['torch']}, Ray {about['ray']}, Python {about['python']}. {told['minutes']:.1f} minutes of kills, drawn "
        f"with seed {told['seed']}; {told['seeds']} seeds done, {len(told['references'])} of them compared with an "
        f"undisturbed run, bit by bit.",
        "",
        "| what | |",
        "|---|---:|",
        f"| commands started | {told['commands']} |",
        f"| of them ended by themselves with seeds not done | {sum(code != 0 for code in told['codes'])} |",
        f"| attempts of steps (four a seed undisturbed) | {attempts} |",
        f"| seconds of work that were lost | {lost:.1f} |",
        f"| most processes at once | {told['processes']} |",
        f"| listening ports at the start, at the end | {told['ports'][0]}, {told['ports'][1]} |",
        f"| what was wrong | {len(told['wrong'])} |",
        "",
        "| hit | times | on a step's work | went on | seconds until it did: median | most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in disturbance.WEIGHTS:
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
