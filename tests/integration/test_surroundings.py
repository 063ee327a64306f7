"""Whole records in surroundings that are not as usual: their numbers are the same; and how they are stopped there."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray  # noqa: F401

from pipeline.execution import own_ray
from support import tiny_record

# isort: split
import psutil  # Ray brings it

pytestmark = [pytest.mark.slow, pytest.mark.soak]
SURROUNDINGS = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONHASHSEED": "1",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
    "PYTHONOPTIMIZE": "2",
    "PYTHONSAFEPATH": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
    "OMP_NUM_THREADS": "7",
    "MASTER_ADDR": "10.1.1.1",
    "MASTER_PORT": "1",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "2",
    "COLUMNS": "40",
    "FORCE_COLOR": "1",
    "GIT_DIR": "/nowhere",
}
"""What notebooks, schedulers, torchrun, proxies, other languages and git's hooks leave in a shell."""


def numbers(out: Path) -> dict[str, float]:
    """The scores of seed 1."""
    row = pd.read_parquet(out / "tiny.parquet").set_index("seed").loc[1]
    return {name: row[name] for name in row.index if name.startswith("bpb_")}


def test_a_record_in_odd_surroundings_has_the_same_numbers(
    undisturbed: tuple[Path, int, str], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / ("x" * 150)).mkdir()
    link = tmp_path / "a link"
    link.symlink_to(tmp_path / "place")
    options = tiny_record.arguments(text, link, "--seeds", "1", "--record", "tiny", "--report")
    surroundings = {**SURROUNDINGS, "TMPDIR": str(tmp_path / ("x" * 150))}
    code, output = tiny_record.run(options, tmp_path, surroundings)
    assert code == 0 and "Traceback" not in output, output
    found = numbers(tmp_path / "place")
    assert found == numbers(undisturbed[0]) and len(found) > 4
    assert list((tmp_path / "place").glob("_records/tiny/report.html"))


def test_a_seed_more_takes_no_file_more(text: Path, tmp_path: Path) -> None:
    """A driver has 43 open at most, Ray's raylet 72: what a seed left open would not fit under this limit for long."""
    options = tiny_record.arguments(text, tmp_path, "--seeds", "1", "2", "3", "4", "--record", "tiny")
    limits = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (own_ray.FEWEST_FILES,) * 2)  # noqa: E731
    done = subprocess.run(
        [*tiny_record.COMMAND, *options], capture_output=True, encoding="utf-8", preexec_fn=limits, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stopped", ["by a scheduler", "by the end of its terminal"])
def test_a_record_ends_and_leaves_no_process(stopped: str, text: Path, tmp_path: Path) -> None:
    """A scheduler sends every process SIGTERM, those of Ray too."""
    options = tiny_record.arguments(text, tmp_path, "--seeds", "1", "--record", "tiny", "--train.steps", "100000")
    driver = subprocess.Popen(
        [*tiny_record.COMMAND, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("_steps/train-*/clock.json")):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(driver.pid).children(recursive=True)
        if stopped == "by a scheduler":
            for process in [psutil.Process(driver.pid), *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        else:
            driver.send_signal(signal.SIGHUP)
        output, _ = driver.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 130 and "stopped; the same command goes on" in output, output
    assert "Traceback" not in output
    assert pd.read_parquet(tmp_path / "tiny.parquet").status.tolist() == ["pending"]
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


GO_ON = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_record_that_was_told_to_outlive_its_terminal_does(text: Path, tmp_path: Path) -> None:
    """As under nohup, or after a shell's disown."""
    options = tiny_record.arguments(text, tmp_path, "--seeds", "1", "--record", "tiny")
    master, slave = os.openpty()
    command = [sys.executable, "-c", GO_ON, *tiny_record.COMMAND[1:], *options]
    driver = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    try:
        os.close(slave)
        shown = b""
        while b"starting Ray" not in shown:
            shown += os.read(master, 10_000)
        os.close(master)
        assert driver.wait(200) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    assert pd.read_parquet(tmp_path / "tiny.parquet").status.tolist() == ["done"]
