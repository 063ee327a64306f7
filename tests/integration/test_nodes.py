"""Seeds over the machines of a cluster: the command, real training and evaluation, on pretended GPUs.

The time is the start of processes, a few seconds of two cores for each of five a seed.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.faults import cluster as clusters
from benchmarks.faults import injection
from benchmarks.faults.cluster import Cluster, Node
from hedgemix.runtime import clock
from support import fault_costs, tiny_record
from support.fault_costs import Faults, Watch, work
from support.faulty_record import LONG, OFTEN, Undisturbed, ended, training_for

BITS = ["bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final"]
WHOLE = ["--compute.gpus-per-worker", "8"]
"""One worker takes all of a machine."""
EIGHT = ["--compute.workers", "8", "--compute.gpus-per-worker", "1", "--compute.evaluate-workers", "8"]


class Followed:
    """A record on a cluster, watched from outside while it runs."""

    def __init__(self, cluster: Cluster, text: Path, out: Path, seeds: int, *options: str) -> None:
        self.cluster, self.out, self.seeds = cluster, out, seeds
        names = [str(1 + seed) for seed in range(seeds)]
        arguments = tiny_record.arguments(text, out, "--seeds", *names, "--record", "tiny", *options)
        self.process: subprocess.Popen[str] = tiny_record.start(arguments, out, cluster.command_environment())
        self.most = self.most_machines = 0
        """Trainings that had a machine, and machines, at once."""

    def waiting(self) -> int:
        return self.look().count("PENDING")

    def placed(self) -> int:
        return self.look().count("CREATED")

    def look(self) -> list[str]:
        states = self.cluster.trainings()
        machines = len(self.cluster.alive()) - 1
        self.most, self.most_machines = max(self.most, states.count("CREATED")), max(self.most_machines, machines)
        return states

    def until(self, *, waiting: int | None = None, placed: int | None = None) -> None:
        """Follow it until so many trainings wait for a machine, or have one."""

        def reached() -> bool:
            states = self.look()
            assert self.process.poll() is None, self.process.communicate()[0]
            return (waiting, placed) == (
                None if waiting is None else states.count("PENDING"),
                None if placed is None else states.count("CREATED"),
            )

        clusters.until(reached, 200, lambda: str(self.cluster.trainings()))

    def node(self) -> Node:
        """The machine of the only training."""
        self.look()
        groups = self.cluster.state.placement_group_table().values()
        [group] = [group for group in groups if group["state"] == "CREATED"]
        [place] = set(group["bundles_to_node_id"].values())
        return next(node for node in self.cluster.nodes if node.name == self.cluster.alive()[place])

    def trained(self, seconds: float) -> None:
        """Follow it until it has noted so many seconds of training."""
        clusters.until(lambda: training_for(self.out, seconds), 300, lambda: f"{self.process.poll()} {self.look()}")

    def end(self) -> pd.DataFrame:
        """Follow it to its end; its rows, by seed. Every seed must be done."""
        deadline = time.monotonic() + 500
        while self.process.poll() is None and time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)
        self.process.kill()
        output, _ = self.process.communicate()
        assert self.process.returncode == 0, output
        rows = pd.read_parquet(self.out / "tiny.parquet").set_index("seed")
        assert len(rows) == self.seeds and list(rows.status) == ["done"] * self.seeds
        assert all(rows[column].between(0, 20).all() for column in BITS)
        return rows

    def idle_cost(self, seconds: float) -> tuple[float, list[str]]:
        """CPU seconds of the command and of all on the head, and lines logged, while this much time goes by."""
        pids = [self.process.pid, *self.cluster.head.pids()]
        used, before = clusters.cpu_seconds(pids), self.logged()
        time.sleep(seconds)
        used = clusters.cpu_seconds(pids) - used
        return used, [line for path, lines in self.logged().items() for line in lines[len(before.get(path, [])) :]]

    def logged(self) -> dict[Path, list[str]]:
        """What workers, Train's controllers among them, have logged; without Ray's complaints, one a second, that this
        cluster has no dashboard."""
        lines = {}
        for path in (self.cluster.folder / "ray").glob("session_2*/logs/**/*"):
            if path.name.startswith(("worker-", "ray-train-")):
                with contextlib.suppress(OSError):
                    found = path.read_text(errors="replace").splitlines()
                    lines[path] = [line for line in found if "PlacementGroupCleaner" not in line]
        return lines

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def expected(undisturbed: Undisturbed) -> dict[str, float]:
    table = pd.read_parquet(undisturbed[0] / "tiny.parquet").set_index("seed")
    return {column: table.loc[1, column] for column in BITS}


@pytest.mark.soak
def test_seeds_wait_at_rest_and_take_machines_as_they_come(text: Path, tmp_path: Path) -> None:
    with clusters.cluster(0, injection.pretend_gpus()) as cluster:
        record = Followed(cluster, text, tmp_path, 2, *WHOLE)
        record.until(waiting=2)
        costs: list[tuple[float, list[str]]] = []

        def at_rest() -> bool:
            """Once the last process has started; a controller that asks all the time would take a core."""
            costs.append(record.idle_cost(4))
            return costs[-1][0] < 1.6 and len(costs[-1][1]) < 10

        clusters.until(at_rest, 60, lambda: costs)
        assert record.placed() == 0
        cluster.add()
        record.until(placed=1)
        cluster.add()
        record.end()
        assert record.most <= record.most_machines == 2


@pytest.mark.soak
@pytest.mark.parametrize("machines", [1, 2, 3])
def test_no_more_seeds_train_at_once_than_there_are_machines(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, machines: int
) -> None:
    with clusters.cluster(machines, injection.pretend_gpus()) as cluster:
        record = Followed(cluster, text, tmp_path, 3, *WHOLE)
        rows = record.end()
        assert 1 <= record.most <= machines
        assert {column: rows.loc[1, column] for column in BITS} == expected(undisturbed)


@pytest.mark.soak
def test_eight_workers_of_a_seed_share_one_of_two_machines(text: Path, tmp_path: Path) -> None:
    with clusters.cluster(2, injection.pretend_gpus()) as cluster:
        record = Followed(cluster, text, tmp_path, 3, *EIGHT)
        rows = record.end()
        assert set(rows.workers) == {8}


@pytest.mark.soak
def test_a_cluster_grows_to_its_limit_for_seeds_and_shrinks_after_them(text: Path, tmp_path: Path) -> None:
    with clusters.cluster(0, injection.pretend_gpus(), autoscale=2, idle_minutes=0.1) as cluster:
        assert len(cluster.alive()) == 1
        record = Followed(cluster, text, tmp_path, 3, *WHOLE)
        record.end()
        assert record.most_machines == 2 and record.most <= 2
        cluster.wait(1, 60)


@pytest.mark.soak
def test_a_machine_lost_in_training_is_replaced_by_another(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    plan = injection.Plan(tmp_path / "faults", injection.kill("*/checkpoint*.pt", at=3, machine=True))
    out = tmp_path / "runs"
    out.mkdir()
    environment = {**injection.pretend_gpus(), **plan.environment()}
    with clusters.cluster(2, environment) as cluster, Watch(out, "train", fault_costs.fired(plan)) as watch:
        Followed(cluster, text, out, 1, *WHOLE, *OFTEN).end()
        plan.check()
        assert len(cluster.alive()) == 2  # the head and the one that is left
    row = ended(out, undisturbed, retries=1)
    assert row.restarts == 1
    faults.note(3, "machine killed, another idle", "at a checkpoint", watch, work(watch, row.lost_seconds))


@pytest.mark.soak
def test_a_machine_removed_in_training_is_replaced_by_a_new_one(
    undisturbed_long: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    out, gone = tmp_path / "runs", fault_costs.Now()
    out.mkdir()
    options = [*WHOLE, "--compute.checkpoint-seconds", "2", "--compute.max-restarts", "1", *LONG]
    with clusters.cluster(1, injection.pretend_gpus()) as cluster, Watch(out, "train", gone) as watch:
        record = Followed(cluster, text, out, 1, *options)
        record.trained(5)
        gone.say()
        cluster.nodes.pop().kill()
        cluster.wait(1, 120)
        cluster.add()
        record.end()
    row = ended(out, undisturbed_long, retries=1)
    assert row.restarts == 1 and 0 < row.lost_seconds <= 2 + clock.BEAT_SECONDS + 1
    told = work(watch, row.lost_seconds)
    faults.note(3, "machine removed, a new one added", "in training, checkpoints every 2 s", watch, told)


@pytest.mark.soak
@pytest.mark.parametrize("killed", [True, False])
def test_a_spot_machine_s_notice_saves_the_training(
    undisturbed_long: Undisturbed, text: Path, tmp_path: Path, faults: Faults, killed: bool
) -> None:
    """No checkpoint but the one of the notice; then the machine is killed, or its deadline passes."""
    out, gone = tmp_path / "runs", fault_costs.Now()
    out.mkdir()
    options = [*WHOLE, "--compute.checkpoint-seconds", "1000", "--compute.max-restarts", "1", *LONG]
    with clusters.cluster(2, injection.pretend_gpus()) as cluster, Watch(out, "train", gone) as watch:
        record = Followed(cluster, text, out, 1, *options)
        record.trained(3)
        node = record.node()
        assert not list(out.glob("_steps/train-*/checkpoint*"))
        noticed, leave_seconds = time.time(), 60 if killed else 8
        cluster.drain(node, leave_seconds)
        clusters.until(lambda: bool(list(out.glob("_steps/train-*/checkpoint.json"))), 30, cluster.logs)
        saved = time.time() - noticed
        time.sleep(2 if killed else max(0.0, noticed + leave_seconds - time.time()))
        gone.say()
        assert gone.time is not None
        if killed:
            node.kill()
        record.end()
    row = ended(out, undisturbed_long, retries=1)
    assert saved < 5 and row.restarts == 1
    assert 0 < row.lost_seconds <= gone.time - noticed + 2
    told = f"{work(watch, row.lost_seconds)}; checkpoint {saved:.1f} s after the notice"
    end = "the machine is killed 2 s after the checkpoint" if killed else f"its deadline of {leave_seconds} s passes"
    faults.note(4, f"spot notice; {end}", "in training, no other checkpoint", watch, told)


@pytest.mark.soak
def test_a_cluster_that_was_lost_whole_costs_the_work_since_the_last_checkpoint(
    undisturbed_long: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    out, gone = tmp_path / "runs", fault_costs.Now()
    out.mkdir()
    options = [*WHOLE, "--compute.checkpoint-seconds", "2", *LONG]
    with clusters.cluster(1, injection.pretend_gpus()) as cluster, Watch(out, "train", gone) as watch:
        record = Followed(cluster, text, out, 1, *options)
        record.trained(5)
        gone.say()
        cluster.kill()
        told, _ = record.process.communicate(timeout=200)
        assert record.process.returncode == 1, told
        ended_after = time.time() - (gone.time or 0)
        cluster.restart(1)
        Followed(cluster, text, out, 1, *options).end()
    row = ended(out, undisturbed_long, retries=1)
    assert row.restarts == 1 and 0 < row.lost_seconds <= 2 + clock.BEAT_SECONDS + 1
    told = f"{work(watch, row.lost_seconds)}; the first command ended after {ended_after:.0f} s"
    faults.note(9, "whole cluster killed, started anew", "in training, checkpoints every 2 s", watch, told)
