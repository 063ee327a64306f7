"""A record at work on a cluster of processes while it is disturbed: the command that is started again and again, the
hits, and what is seen meanwhile."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from benchmarks.faults import cluster as clusters
from benchmarks.faults import disturbances, leaks
from benchmarks.faults.cluster import Cluster
from benchmarks.faults.disturbances import Bounds, Kill
from benchmarks.faults.leaks import Samples
from hedgemix.runtime.layout import RESULT

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "pipeline" / "record.py"), "laptop"]
OPTIONS = """
--record soak --data.source docs --data.packages numpy --data.max-text-bytes 300000 --data.vocab-size 512
--data.valid-fraction 0.1 --data.max-valid-tokens 6000
--model.layers 2 --model.width 64 --model.heads 2 --model.kv-heads 2 --model.mlp-hidden 128
--model.bigram-buckets 256 --model.bigram-width 32 --model.value-embedding-width 32
--train.steps 60 --train.batch-tokens 512 --train.sequence-tokens 64 --train.microbatch-sequences 8
--train.calibration-sequences 8 --train.warmup-steps 1 --train.log-every-steps 5
--evaluate.window-tokens 64 --evaluate.overlap-tokens 64 --evaluate.segment-tokens 512 --evaluate.chunk-tokens 1024
--evaluate.ttt.sequence-tokens 64 --compute.workers 1 --compute.cpus-per-worker 1 --compute.evaluate-workers 2
--compute.checkpoint-seconds 0.5 --compute.max-restarts 30
"""
RECIPE = OPTIONS.split()
NODE_CPUS = 3
TICK_SECONDS = 0.2
WATCH_SECONDS = 1.0
SAMPLE_SECONDS = 5.0
END_SECONDS = 180.0
"""So long a command may take to notice that its cluster is gone."""
STALLED_MINUTES = 6.0
"""No step ends for so long: it hangs."""


@dataclass(frozen=True)
class Plan:
    """How long, how much, how often."""

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
    kinds: tuple[str, ...] = tuple(disturbances.WEIGHTS)
    """What may happen."""


@dataclass
class Disturbed:
    """One run, and what it has seen."""

    plan: Plan
    folder: Path
    environment: dict[str, str]
    cluster: Cluster | None
    draw: random.Random
    victim: random.Random
    began: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    batch: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    ended: int = 0
    """Steps that are done."""
    progressed: float = field(default_factory=time.monotonic)
    """When the last of them was."""
    kills: list[Kill] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """Commands that had to be ended."""
    missed: list[str] = field(default_factory=list)
    """Kinds that found nobody to kill."""
    bounds: dict[str, Bounds] = field(default_factory=dict)
    commands: list[int] = field(default_factory=list)
    """Ids of every command's process, which leads its session."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the commands that ended by themselves."""
    sessions: set[int] = field(default_factory=set)
    samples: Samples = field(default_factory=Samples)
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
        return leaks.members(set(self.sessions))

    def over(self) -> bool:
        """Whether the seeds and the minutes are."""
        return self.seconds() >= 60 * self.plan.minutes and len(self.done) >= self.plan.seeds

    def step(self) -> None:
        """Start the command again if it has ended, for the next seeds if its own are done."""
        if self.process and (code := self.process.poll()) is not None:
            self.codes.append(code)
            self.process = None
            if code == 0:
                self.done += self.batch
                self.batch = []
        if self.process is None and (self.batch or not self.over()):
            first = len(self.done)
            self.start(self.batch or list(range(first, first + self.plan.at_once)))
        self.check_progress()
        time.sleep(TICK_SECONDS)

    def check_progress(self) -> None:
        """Raises RuntimeError when no step has ended for long."""
        ended = len(list(self.runs.glob(f"_steps/*/{RESULT}")))
        if ended != self.ended:
            self.ended, self.progressed = ended, time.monotonic()
        if time.monotonic() - self.progressed > 60 * STALLED_MINUTES:
            raise RuntimeError(f"no step ended for {STALLED_MINUTES:g} minutes: {self.tail()}")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Samples are taken, and signs of recovery looked for, meanwhile; the rest may wait for a machine to start."""
        ended = Event()

        def watch() -> None:
            sampled = -SAMPLE_SECONDS
            while not ended.wait(WATCH_SECONDS):
                disturbances.look([each for each in self.kills if each.recovered_seconds is None], self.runs)
                if self.seconds() - sampled >= SAMPLE_SECONDS:
                    sampled = self.seconds()
                    self.sample()

        thread = Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def sample(self) -> None:
        pids = self.pids()
        self.processes.append((self.seconds(), len(pids)))
        if process := self.process:
            self.samples.add(self.seconds(), "driver", process.pid)
        heads = set(clusters.session(self.cluster.head.process.pid)) if self.cluster else set(pids)
        for pid in pids:
            name = Path(leaks.title(pid).split(" ")[0]).name
            if name in ("raylet", "gcs_server"):
                self.samples.add(self.seconds(), name if pid in heads else f"{name} of a node", pid)

    def tail(self) -> str:
        return (self.folder / "commands.log").read_text(errors="replace")[-3000:]

    def strike(self, kind: str) -> bool:
        """Disturb the work if there is one of this kind to be met now."""
        held = disturbances.holders(self.runs)
        if kind in disturbances.TITLES:
            found = disturbances.victims(kind, self.pids(), held)
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
            machines = [self.cluster.head, *self.cluster.nodes]
            self.hit(kind, "head and nodes", [pid for node in machines for pid in node.pids()], held)
            self.cluster.kill()
            self.end_command()
            self.cluster.restart(0)
            for _ in range(self.plan.nodes):
                self.cluster.add(NODE_CPUS, 0)
        elif kind == "storage":
            gate = self.folder / "full"
            gate.touch()
            time.sleep(disturbances.FULL_SECONDS)
            gate.unlink()
            self.hit(kind, f"no space for {disturbances.FULL_SECONDS:g} s", [], {})
        elif kind == "byte":
            paths = disturbances.damageable(self.runs)
            if not paths:
                return False
            path = self.victim.choice(paths)
            try:
                disturbances.flip(path, self.victim)
            except OSError:  # it went just now
                return False
            self.hit(kind, path.name, [], {}, [path.parent.name])
        else:
            return False
        return True

    def hit(self, kind: str, what: str, pids: list[int], held: dict[int, str], steps: list[str] | None = None) -> None:
        """Kill these and note it. `held`: who works on which step."""
        began, seconds = time.time(), self.seconds()
        disturbances.kill(pids)
        steps = steps or sorted({name for pid, name in held.items() if pid in pids})
        disturbances.note(self.bounds, self.runs, steps if pids else [])
        writing = {pid for pid, name in held.items() if kind in ("driver", "cluster") or name in steps}
        self.kills.append(Kill(kind, seconds, began, what, steps, writing))
        print(f"[{seconds:6.1f} s] {kind}: {what} {' '.join(steps)}", flush=True)

    def end_command(self) -> None:
        """The command whose cluster was lost must end by itself, and say so."""
        if self.process:
            try:
                self.codes.append(self.process.wait(timeout=END_SECONDS))
            except subprocess.TimeoutExpired:
                self.stuck.append(f"the command did not end within {END_SECONDS:g} s of its cluster: {self.tail()}")
                self.process.kill()
                self.process.wait()
            self.process = None

    def run(self) -> None:
        """Until the seeds and the minutes are over."""
        kinds = [kind for kind in self.plan.kinds if self.cluster or kind not in ("node", "cluster")]
        due, kind = 0.0, ""
        while True:
            self.step()
            if self.over() and not self.batch:
                return
            if self.seconds() >= 60 * self.plan.minutes and len(self.done) + len(self.batch) >= self.plan.seeds:
                continue  # the last seeds end in peace
            if not kind:
                due = max(due, self.seconds()) + self.draw.expovariate(1 / self.plan.mean_seconds)
                kind = disturbances.draw_kind(self.draw, kinds)
            elif self.seconds() >= due:
                if self.strike(kind):
                    kind, due = "", self.seconds()
                elif self.seconds() >= due + disturbances.PATIENCE_SECONDS:
                    self.missed.append(kind)
                    kind = ""

    def last(self) -> int:
        """The same command for all seeds, undisturbed: what was damaged after it was done is made again. Its code."""
        self.start(self.done)
        assert self.process is not None
        self.progressed = time.monotonic()
        while self.process.poll() is None:
            self.check_progress()
            time.sleep(TICK_SECONDS)
        return self.process.returncode
