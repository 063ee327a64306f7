"""What a record's Ray cannot do without is watched, and its loss ends what the main thread waits for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.execution import ray_session as sessions
from pipeline.execution import watchdog
from pipeline.execution.watchdog import SIGNAL, Parts, RayLost, watched


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.05)


def refused(why: str) -> None:
    pytest.fail(f"given up: {why}")


def test_a_loss_ends_what_the_main_thread_waits_for() -> None:
    before, began = signal.getsignal(SIGNAL), time.monotonic()
    with (
        pytest.raises(RayLost, match="the raylet was lost; give the same command again"),
        watched(lambda: "the raylet" if time.monotonic() > began + 0.2 else "", refused),
    ):
        time.sleep(30)
    assert time.monotonic() < began + 10 and signal.getsignal(SIGNAL) is before


def test_without_a_loss_nothing_is_raised_and_ctrl_c_stays_what_it_is() -> None:
    with watched(lambda: "", refused):
        time.sleep(0.2)
    with pytest.raises(KeyboardInterrupt) as ended, watched(lambda: "", refused):
        raise KeyboardInterrupt
    assert not isinstance(ended.value, RayLost)


def test_a_main_thread_that_cannot_leave_is_given_up() -> None:
    told: list[str] = []
    with pytest.raises(RayLost), watched(lambda: "Ray's head", told.append, grace=0.1):
        try:
            time.sleep(30)
        finally:
            time.sleep(1)  # as one that asks a head which is gone
    assert told == ["Ray's head was lost; give the same command again: it goes on from here"]


def test_a_raylet_that_ends_is_lost_also_when_nobody_collects_it(tmp_path: Path) -> None:
    path = str(tmp_path / "sockets" / "raylet")
    (tmp_path / "raylet").symlink_to(sys.executable)
    command = [str(tmp_path / "raylet"), "-S", "-c", "import time; time.sleep(60)", f"--raylet_socket_name={path}"]
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    with socket.create_server(("127.0.0.1", 0)) as head, subprocess.Popen(command, env=environment) as process:
        try:
            until = time.monotonic() + 10
            while watchdog.raylet_process(path) is None and time.monotonic() < until:
                time.sleep(0.01)
            parts = Parts(path, f"127.0.0.1:{head.getsockname()[1]}", 5.0)
            assert parts.raylet is not None and parts.raylet[0] == process.pid and parts() == ""
            process.kill()
            while not parts() and time.monotonic() < until:
                time.sleep(0.01)
            assert parts() == "this machine's raylet"
        finally:
            process.kill()


def test_a_head_is_lost_once_it_was_silent_for_long_enough(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        parts = Parts(str(tmp_path / "nobody's"), f"127.0.0.1:{head.getsockname()[1]}", 0.3)
        assert parts.raylet is None and parts() == ""  # a raylet that cannot be seen is not watched
    assert parts() == ""
    time.sleep(0.4)
    assert parts() == "Ray's head"


def test_the_parts_of_a_real_ray_are_seen(ray_session: None) -> None:
    parts = sessions.parts()
    assert parts.raylet is not None and parts() == ""
    heard = parts.heard
    time.sleep(0.01)
    assert parts() == "" and parts.heard > heard
