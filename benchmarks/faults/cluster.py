"""A Ray cluster of several nodes on this machine, to run the command beside it and take nodes away: for tests and the
soak.

Each node is a `ray start --block` in a session of its own. To kill a node is to SIGKILL every process of that session,
workers too: what a spot machine that vanishes looks like to the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RAY = str(Path(sys.executable).with_name("ray"))
HOST = "127.0.0.1"
STORE_BYTES = 80 * 2**20
CPUS, GPUS = 16, 8
START_SECONDS = 180
"""The most that a node may take to come up, on a machine that does much else."""

QUICK = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A killed node refuses its health checks at once and is declared dead after five: 2.5 s, not 15 s. One that is only
    # slow has 5 s to answer each.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass
class Node:
    name: str
    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        """Processes of the node's session that still run."""
        return session(self.process.pid)

    def kill(self) -> None:
        """Take the machine away: SIGKILL to all of it, whatever it is doing."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()  # the leader is our child: until it is reaped it counts
            time.sleep(0.05)
        self.process.wait()


@dataclass
class Cluster:
    """Made by `cluster`; `nodes` are those besides the head."""

    folder: Path
    environment: dict[str, str]
    port: int
    head: Node
    nodes: list[Node] = field(default_factory=list)
    count: int = 0
    state: Any = None

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def command_environment(self) -> dict[str, str]:
        """What a command needs to work on this cluster."""
        return {**self.environment, "RAY_ADDRESS": self.address}

    def add(self, cpus: int = CPUS, gpus: int = GPUS) -> Node:
        """Start one more node; returns when the cluster has it: two that start at once can block each other."""
        self.count += 1
        options = [f"--address={self.address}", "--dashboard-agent-listen-port=0", "--min-worker-port=0"]
        name = f"node{self.count}"
        options += ["--max-worker-port=0", f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--node-name={name}"]
        log = self.folder / f"{name}.log"
        node = Node(name, start(options, self.environment, log))
        self.nodes.append(node)

        def up() -> bool:
            if node.process.poll() is not None:  # Ray gives up after 30 s, which a machine that does much else may need
                node.kill()
                node.process = start(options, self.environment, log)
            return name in self.alive().values()

        until(up, START_SECONDS, self.logs)
        return node

    def wait(self, alive: int, seconds: float = 30) -> None:
        """Until so many nodes, the head among them, are alive."""
        until(lambda: len(self.alive()) == alive, seconds, lambda: f"{sorted(self.alive().values())} {self.logs()}")

    def alive(self) -> dict[str, str]:
        """Hex id and name of every node that Ray takes to be alive; none while there is no head. Machines that the
        autoscaler made have one name."""
        from ray._raylet import GcsClient

        assert self.head.process.poll() is None, self.logs()
        try:
            socket.create_connection((HOST, self.port), timeout=5).close()  # Ray's own client would wait for 40 s
            nodes = GcsClient(address=self.address).get_all_node_info(timeout=5).items()
        except Exception:  # Ray's own errors for a head that is not there yet, or no more
            return {}
        return {key.hex(): node.node_name for key, node in nodes if node.state == 0}

    def trainings(self) -> list[str]:
        """The state of every placement group there was: PENDING, CREATED (a job has its machine) or REMOVED."""
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        if self.state is None:
            self.state = GlobalState()
            options = GcsClientOptions.create(
                self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
            self.state._initialize_global_state(options)
        return [group["state"] for group in self.state.placement_group_table().values()]

    def logs(self) -> str:
        """What every `ray start` has said."""
        return "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def drain(self, node: Node, seconds: float = 60) -> None:
        """The notice a spot machine gets before it is taken: Ray places nothing there any more, and tells its jobs."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        accepted, reason = GcsClient(address=self.address).drain_node(
            next(key for key, name in self.alive().items() if name == node.name),
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the machine is to be taken away",
            int((time.time() + seconds) * 1000),
        )
        assert accepted, reason

    def kill(self) -> None:
        """All machines at once."""
        for node in [*self.nodes, self.head]:
            node.kill()
        self.nodes.clear()

    def restart(self, nodes: int) -> None:
        """After `kill`: the same address, so many new nodes, and none of the old cluster's memory."""
        self.head = start_head(self.folder, self.environment, self.port)
        until(lambda: bool(self.alive()), START_SECONDS, self.logs)
        for _ in range(nodes):
            self.add()


@contextmanager
def cluster(
    nodes: int, environment: dict[str, str] | None = None, autoscale: int = 0, idle_minutes: float = 0.1
) -> Iterator[Cluster]:
    """A head without GPUs and `nodes` machines with 8 pretended GPUs each.

    environment: added to that of every process of the cluster. autoscale: so many more machines at most come when
    something waits for them, and go when idle for `idle_minutes`.
    """
    folder = Path(tempfile.mkdtemp(prefix="hx", dir="/tmp"))  # Ray's sockets are below it; their paths must be short
    everything = {**os.environ, **QUICK, **(environment or {})}
    everything.pop("RAY_ADDRESS", None)
    port = free_port()
    made = Cluster(folder, everything, port, start_head(folder, everything, port, autoscale, idle_minutes))
    try:
        until(lambda: bool(made.alive()), START_SECONDS, made.logs)
        for _ in range(nodes):
            made.add()
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder, ignore_errors=True)


def start_head(
    folder: Path, environment: dict[str, str], port: int, autoscale: int = 0, idle_minutes: float = 0.1
) -> Node:
    options = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
    options += ["--num-cpus=4", "--num-gpus=0", "--node-name=head", "--min-worker-port=0", "--max-worker-port=0"]
    options += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"]
    if autoscale:
        path = folder / "autoscaling.json"
        path.write_text(json.dumps(autoscaling(f"{HOST}:{port}", autoscale, idle_minutes)))
        options.append(f"--autoscaling-config={path}")
        environment = {**environment, **AUTOSCALING}
    return Node("head", start(options, environment, folder / "head.log"))


AUTOSCALING = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "0",
    # The fake provider takes the node of this id to be the head.
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "fffffffffffffffffffffffffffffffffffffffffffffffffff00000",
}


def autoscaling(address: str, most: int, idle_minutes: float) -> dict[str, object]:
    """Ray's autoscaler over its fake provider, whose machines are processes here. Ray's own AutoscalingCluster is not
    used: it begins and ends with `ray stop --force`, which ends every Ray on the machine."""
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "upscaling_speed": 2.0,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 4, "GPU": 0}, "node_config": {}, "max_workers": 0},
            "gpus": {
                "resources": {"CPU": CPUS, "GPU": GPUS, "object_store_memory": STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        **{f"{name}_commands": [] for name in empty},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def start(options: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    common = ["--block", f"--node-ip-address={HOST}", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
    with open(log, "ab") as file:
        return subprocess.Popen(
            [RAY, "start", *common, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def session(leader: int) -> list[int]:
    """The living processes of a session. Ray puts some in process groups of their own; none leaves the session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of) == leader and state != "Z":
                    found.append(int(entry.name))
    return found


def cpu_seconds(pids: list[int]) -> float:
    """User and system time these processes have used."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], bool], seconds: float, told: Callable[[], object]) -> None:
    """Wait for it; AssertionError with what `told` says when it does not come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)
