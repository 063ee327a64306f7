"""Real commands get Ctrl-C and SIGTERM at moments before any work, when they read their imports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STOPPED = "stopped; the same command goes on from here\n"


def caught(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal."""
    try:
        mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return False
    return bool(mask) and bool(int(mask[1], 16) >> (number - 1) & 1)


def start(*command: str) -> subprocess.Popen[str]:
    """Start it, and wait until it has handlers, which come with its first lines."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which `make test` ignores in one process
    )
    until = time.monotonic() + 30
    while not caught(process.pid, signal.SIGTERM) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_seconds", [0.0, 0.4, 1.0])
def test_a_command_that_is_still_importing_ends_at_once(number: int, after_seconds: float, tmp_path: Path) -> None:
    wrong = ["--data.source", "text", "--data.paths", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "runs")]
    process = start("pipeline/record.py", "laptop", *wrong)
    time.sleep(after_seconds)
    assert process.poll() is None
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert (process.returncode, output) == (130, STOPPED)


MAIN = """
import signal, sys, time
from pipeline.execution import stopping
stopping.exit_on_signals()
try:
    stopping.raise_on_signals()
    print("ready", flush=True)
    time.sleep(0.3 if {short} else 30)
    sys.exit(7)
except KeyboardInterrupt:
    print("cleaning", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_work_is_interrupted_and_a_second_signal_ends_its_clearing_without_a_word(number: int) -> None:
    process = start("-c", MAIN.format(short=False))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 130


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As of a job that a script started with `&` or nohup."""
    process = start("-c", "import signal; signal.signal(2, signal.SIG_IGN)\n" + MAIN.format(short=True))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 7


def test_any_other_error_is_shown_as_ever() -> None:
    code = "from pipeline.execution import stopping; stopping.exit_on_signals(); raise ValueError('odd')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, env=os.environ)
    assert done.returncode == 1 and "ValueError: odd" in done.stderr
