"""Ray for the length of a record: the cluster that RAY_ADDRESS names, else one on this machine alone.

Import this before anything that imports Ray.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

# Ray reads these when it is imported. How often Ray Train looks at its workers (by default 2 s, the least it takes to
# notice anything), and how long it waits for a node before it asks anew.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what Ray says would be coloured in a job's log too

from pipeline.execution.ray_address import FIX, check_cluster, cluster_address

if not cluster_address():
    # Under `uv run` Ray would pack the folder the command is in, data and all, and start every process by uv.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray
from ray._private.node import Node
from ray.exceptions import RayError
from rich.console import Console

from hedgemix.config import RecipeError
from hedgemix.runtime.cpus import available_cpus
from pipeline.execution import own_ray
from pipeline.execution.resources import on_cluster
from pipeline.execution.stopping import raise_on_signals
from pipeline.execution.watchdog import HEAD_SECONDS, OWN_HEAD_SECONDS, Parts, RayLost, watched
from pipeline.storage.machine import machine_to_itself

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
OBJECT_STORE_BYTES = 256 * 2**20
"""Of our own Ray; tasks hand each other paths, so it needs little."""

ALONE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "RAY_worker_niceness": "0",
    "RAY_num_workers_soft_limit": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
"""For a Ray on this machine alone: nobody takes the machine away with a warning, so no process has to listen for one
during training; Ray Train's controller blocks where Ray advises against it, of which it needs no warning; and training,
which runs in Ray's workers, gives way to other programs no more than it would outside (Ray starts workers with niceness
15). A process without work, which still looks for signals a hundred times a second, 0.9 % of a core, ends after a
second, which is long enough to be there for the next stage; and nobody reads how busy the machine is, which Ray's agent
would note every 2.5 s. Memory that a step frees is kept for the next one: glibc would give it back to the system, and
take a fault for every page of it again, 1,300 a step of recipe laptop."""

NEEDLESS = ("start_api_server", "start_log_monitor", "start_monitor")
"""What starts a process beside a Ray that nobody asks there: the dashboard's server, which `ray.init` waits for though
it shows no dashboard; who sends workers' output to a driver that wants none; the autoscaler of one machine."""


@contextmanager
def few_processes() -> Iterator[None]:
    """Have a Ray that is started meanwhile do without NEEDLESS: three CPU seconds, of which the command waits for one.

    It overrides what Ray keeps to itself: should a later Ray call these otherwise, its own processes start again.
    """
    kept = {name: getattr(Node, name) for name in NEEDLESS if hasattr(Node, name)}
    for name in kept:
        setattr(Node, name, lambda self, **options: None)
    try:
        yield
    finally:
        for name, start in kept.items():
            setattr(Node, name, start)


@contextmanager
def ray_started(console: Console) -> Iterator[None]:
    """Start Ray for the length of a record: the cluster that RAY_ADDRESS names, else one on this machine alone. Raises
    RecipeError when the cluster does not take this driver, or this machine has no place for a Ray."""
    with ExitStack() as held:
        if not on_cluster():
            busy = "another record is at work on this machine; waiting for it"
            shared = "note: records of others are at work on this machine, and share its cores: {}"
            held.enter_context(
                machine_to_itself(lambda: console.print(busy), lambda who: console.print(shared.format(who)))
            )
        shutdown = held.enter_context(ExitStack())
        shutdown.callback(ray.shutdown if on_cluster() else end_own)
        try:
            connect(console) if on_cluster() else start(console)
        except (KeyboardInterrupt, SystemExit) as ended:
            end_started()
            if isinstance(ended, SystemExit) and ended.code != signal.SIGTERM:  # so ends Ray's own handler of it
                raise
            raise KeyboardInterrupt from None
        raise_on_signals()  # Ray's handler would end this process without a word; `ray job stop` then waits 3 s.
        try:
            with watched(parts(), give_up):
                yield
        except RayLost:
            shutdown.pop_all()  # it would ask what is lost, until Ray ends this process
            kill_started()
            raise


def give_up(why: str) -> None:
    """End this process, with the processes that it started."""
    kill_started()
    os.write(2, f"{why}\n".encode())
    os._exit(1)


def parts() -> Parts:
    """Name to the watchdog what of this Ray it watches."""
    node = ray._private.worker.global_worker.node
    return Parts(node.raylet_socket_name, node.gcs_address, HEAD_SECONDS if on_cluster() else OWN_HEAD_SECONDS)


def end_started() -> None:
    """Shut down a Ray that is starting, with every process below this one: its agents do not notice the end of a raylet
    that has hardly begun."""
    import psutil  # Ray brings it

    begun = psutil.Process().children(recursive=True)
    ray.shutdown()
    kill(begun)


def end_own() -> None:
    """Shut down a Ray of this machine alone, with what is left below it: an agent that could start no thread, under
    `ulimit -v`, say, does not notice the end of its raylet."""
    import psutil

    below = [child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server")]
    begun = [process for child in below for process in child.children(recursive=True)]
    ray.shutdown()
    kill(begun)


def kill_started() -> None:
    """Kill every process below this one: those of a Ray that it started, and those that Ray started for it."""
    import psutil

    kill(psutil.Process().children(recursive=True))


def kill(processes: list[Any]) -> None:
    """Kill processes of psutil's, never another one that has a number of theirs since."""
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def check_ray() -> None:
    """Find out, in half a minute, whether there is a cluster where RAY_ADDRESS names one, or a place for a Ray on this
    machine. Raises RecipeError."""
    if on_cluster():
        check_cluster()
    else:
        own_ray.prepare(os.environ)


def connect(console: Console) -> None:
    """Join the cluster that RAY_ADDRESS names. Raises RecipeError when it does not answer or refuses."""
    address = cluster_address()
    console.print(f"connecting to the Ray cluster at {address} (RAY_ADDRESS)", soft_wrap=True)
    check_ray()
    try:
        ray.init(**QUIET, runtime_env={"env_vars": train_settings()})
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise RecipeError(f"RAY_ADDRESS {address}: {line}; {FIX}") from error


def start(console: Console) -> None:
    """Start a Ray on this machine alone. Raises RecipeError when its temporary folder is no place for it, or it does
    not start."""
    check_ray()
    console.print("starting Ray on this machine (RAY_ADDRESS would name a cluster)")
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    try:
        with few_processes():
            ray.init(
                address="local",
                num_cpus=available_cpus(),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **QUIET,
            )
    except Exception as error:  # Ray raises many kinds, plain ones too
        end_started()
        line = next(iter(str(error).splitlines()), type(error).__name__)
        logs = f"{own_ray.temporary_folder(os.environ)}/ray/session_latest/logs"
        raise RecipeError(f"Ray did not start on this machine: {line} What its processes said is in {logs}") from error


def train_settings() -> dict[str, str]:
    """Collect what our processes on a cluster, which are not this one's children, are told of this one's environment:
    how Ray Train works, and nothing else. What the job was submitted with reaches them by itself, and Ray refuses it
    twice."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    there = (told.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_") and name not in there}
