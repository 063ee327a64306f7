"""How Ray is started and joined, with `ray.init` in place of a Ray: what it is asked for, and what its failures say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError
from rich.console import Console

from hedgemix.config import RecipeError
from pipeline import record
from pipeline.execution import ray_address, ray_session
from pipeline.storage import machine
from support import tiny_record

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.init` was asked for; no Ray is started or ended."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_session, "parts", lambda: lambda: "")
    for ends in ("end_started", "end_own"):  # the Ray of other tests, below this process
        monkeypatch.setattr(ray_session, ends, lambda: None)
    monkeypatch.setattr(machine, "FOLDER", tmp_path)
    return asked


def test_our_own_ray_has_the_cpus_that_this_process_may_use(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session, "available_cpus", lambda: 3)
    environment = dict(os.environ)
    try:
        with ray_session.ray_started(Console(quiet=True)):
            assert asked["num_cpus"] == 3 and asked["address"] == "local"
    finally:
        os.environ.clear()
        os.environ.update(environment)


def test_a_folder_that_is_no_place_for_ray_is_told_before_data_are_made(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "missing"))
    assert record.main(["laptop", *tiny_record.arguments(text, tmp_path / "runs")]) == 2
    told = capsys.readouterr()
    assert "set RAY_TMPDIR to a folder" in told.err and "data:" not in told.out


@pytest.mark.parametrize(
    "failure", [ConnectionError("no"), RuntimeError("a token\nis missing"), AuthenticationError("no")]
)
def test_a_cluster_that_refuses_is_named_with_the_fix(
    failure: Exception, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise failure

    monkeypatch.setattr(ray_session.ray, "init", refuse)
    monkeypatch.setattr(ray_session, "check_cluster", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    out = Console(record=True, quiet=False, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    refused = pytest.raises(RecipeError, match=r"^RAY_ADDRESS 10\.0\.0\.1:6379: .*unset RAY_ADDRESS")
    with refused, ray_session.ray_started(out):
        pytest.fail("nothing was joined")
    assert "connecting to the Ray cluster at 10.0.0.1:6379" in out.export_text()


def test_a_ray_that_does_not_start_is_told_in_a_line(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise Exception("The node timed out.\nMore.")

    monkeypatch.setattr(ray_session.ray, "init", fail)
    monkeypatch.setattr(ray_session.own_ray, "prepare", lambda environment: None)
    monkeypatch.setattr(os, "environ", dict(os.environ, RAY_TMPDIR="/a/place"))
    refused = pytest.raises(RecipeError, match=r"Ray did not start .*: The node timed out\. .* /a/place/ray/session_")
    with refused, ray_session.ray_started(Console(quiet=True)):
        pytest.fail("nothing was started")


def test_a_cluster_that_is_not_there_is_told_before_data_are_made(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_address.check_cluster, "__defaults__", (0.0,))
    assert record.main(["laptop", *tiny_record.arguments(text, tmp_path / "runs")]) == 2
    told = capsys.readouterr()
    assert f"RAY_ADDRESS {address}: nobody answers there" in told.err and "data:" not in told.out
    assert not list((tmp_path / "runs").glob("_steps/data-*"))


@pytest.mark.parametrize(("code", "expected"), [(signal.SIGTERM, KeyboardInterrupt), (1, SystemExit)])
def test_only_the_end_by_sigterm_is_an_interruption(
    code: int, expected: type[BaseException], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(**options: Any) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(ray_session.ray, "init", end)
    monkeypatch.setattr(ray_session, "check_cluster", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(expected), ray_session.ray_started(Console(quiet=True)):
        pytest.fail("nothing was joined")


UV = """
from pipeline.execution import ray_session
from ray._private import ray_constants
print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)
"""


@pytest.mark.parametrize(("address", "packs"), [("local", "False"), ("10.0.0.1:6379", "True")])
def test_a_ray_of_this_machine_does_not_pack_the_folder_under_uv_run(address: str, packs: str) -> None:
    environment = {**os.environ, "RAY_ADDRESS": address}
    environment.pop("RAY_ENABLE_UV_RUN_RUNTIME_ENV", None)
    done = subprocess.run(
        [sys.executable, "-c", UV], stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT, env=environment
    )
    assert done.stdout.strip() == packs


STARTS = """
import subprocess, sys, time
from rich.console import Console
from pipeline.execution import ray_session
def init(**options):
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    print(subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
    time.sleep(1)
    raise SystemExit(15)
ray_session.ray.init = init
try:
    with ray_session.ray_started(Console(file=sys.stderr)):
        print("started")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_ray_that_is_interrupted_while_it_starts_leaves_no_process(tmp_path: Path) -> None:
    environment = {**os.environ, "HEDGEMIX_LOCKS": str(tmp_path)}
    command = [sys.executable, "-c", STARTS]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT, env=environment, timeout=60)
    *processes, last = done.stdout.split()
    assert last == "interrupted" and len(processes) == 2
    until = time.monotonic() + 10
    while (alive := [each for each in processes if is_alive(each)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


ENDS = """
import subprocess, sys
from rich.console import Console
from pipeline.execution import ray_session
ray_session.parts = lambda: lambda: ""
def init(**options):
    print(subprocess.Popen([sys.argv[1]], stdout=subprocess.PIPE, encoding="utf-8").stdout.readline(), flush=True)
ray_session.ray.init = init
ray_session.ray.shutdown = lambda: None
with ray_session.ray_started(Console(file=sys.stderr)):
    pass
"""


def test_an_agent_that_does_not_notice_the_end_of_its_raylet_is_ended(tmp_path: Path) -> None:
    raylet = tmp_path / "raylet"
    raylet.write_text("#!/bin/sh\nsleep 600 & echo $!\nwait\n")
    raylet.chmod(0o755)
    environment = {**os.environ, "HEDGEMIX_LOCKS": str(tmp_path)}
    command = [sys.executable, "-c", ENDS, str(raylet)]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT, env=environment, timeout=60)
    assert done.returncode == 0 and done.stdout.strip()
    until = time.monotonic() + 10
    while (alive := is_alive(done.stdout.strip())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def is_alive(process: str) -> bool:
    """Whether it runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
