"""Real commands get Ctrl-C, SIGTERM and SIGHUP at moments before any work, when they read their imports."""

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
RECORD = ["pipeline/record.py", "laptop", "--data.source", "text", "--data.paths", "missing.txt", "--out", "never/made"]
HEDGEMIX = ["-m", "pipeline.entry", "inspect", "missing.hmx"]


def caught(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal."""
    try:
        mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return False
    return bool(mask) and bool(int(mask[1], 16) >> (number - 1) & 1)


def start(*command: str) -> subprocess.Popen[str]:
    """Start it as a terminal does, and wait until it has handlers, which come with its first lines."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        cwd=ROOT,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    until = time.monotonic() + 30
    while not caught(process.pid, signal.SIGTERM) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    return process


@pytest.mark.parametrize(
    ("command", "number", "after_seconds", "expected"),
    [
        (RECORD, signal.SIGINT, 0.0, STOPPED),
        (RECORD, signal.SIGHUP, 0.4, STOPPED),
        (RECORD, signal.SIGTERM, 1.0, STOPPED),
        (HEDGEMIX, signal.SIGINT, 0.0, "stopped\n"),
        (HEDGEMIX, signal.SIGTERM, 0.3, "stopped\n"),
    ],
)
def test_a_command_that_is_still_importing_ends_at_once(
    command: list[str], number: int, after_seconds: float, expected: str
) -> None:
    process = start(*command)
    time.sleep(after_seconds)
    assert process.poll() is None
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert (process.returncode, output) == (130, expected)


def test_the_record_s_first_statements_have_a_handler_already() -> None:
    """Ctrl-C while `stopping` itself is imported, which takes longer where the disk is slow."""
    stops = "import os, signal, sys\n" + FINDER + "sys.argv[0] = 'pipeline/record.py'\n"
    code = stops + "import runpy; runpy.run_path('pipeline/record.py', run_name='__main__')"
    process = start("-c", code)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 130


FINDER = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pipeline":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""

MAIN = """
import hashlib, signal, sys, time
from hedgemix.runtime.interrupts import interruptible
from pipeline.execution import stopping
stopping.exit_on_signals()
try:
    stopping.raise_on_signals()
    print("ready", flush=True)
    {work}
    sys.exit(7)
except KeyboardInterrupt:
    print("cleaning", flush=True)
    time.sleep(30)
"""


LIBRARY_CALL = "interruptible(lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9))"
"""Minutes without an instruction of Python's, as the training of a tokenizer has seconds."""


@pytest.mark.parametrize(
    ("work", "number"),
    [("time.sleep(30)", signal.SIGINT), (LIBRARY_CALL, signal.SIGTERM), ("time.sleep(30)", signal.SIGHUP)],
)
def test_work_is_interrupted_and_a_second_signal_ends_its_clearing_without_a_word(work: str, number: int) -> None:
    process = start("-c", MAIN.format(work=work))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 130


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As of a job that a script started with `&` or nohup."""
    process = start("-c", "import signal; signal.signal(2, signal.SIG_IGN)\n" + MAIN.format(work="time.sleep(0.3)"))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 7


def test_any_other_error_is_shown_as_ever() -> None:
    code = "from pipeline.execution import stopping; stopping.exit_on_signals(); raise ValueError('odd')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, env=os.environ)
    assert done.returncode == 1 and "ValueError: odd" in done.stderr
