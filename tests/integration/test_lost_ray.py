"""A record whose own Ray loses a process that it cannot do without ends, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import ray  # noqa: F401

from support import tiny_record

# isort: split
import psutil  # Ray brings it

pytestmark = [pytest.mark.slow, pytest.mark.soak]
LONGEST = {"raylet": 15.0, "gcs_server": 30.0}
"""Seconds from the loss to the end of the command."""


@pytest.mark.parametrize("lost", ["raylet", "gcs_server"])
def test_a_record_without_its_raylet_or_its_head_ends_and_goes_on(lost: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    options = tiny_record.arguments(text, out, "--seeds", "1", "--record", "tiny", "--compute.max-restarts", "3")
    driver = tiny_record.start([*options, "--train.steps", "100000"], tmp_path)
    try:
        deadline = time.monotonic() + 200
        while not list(out.glob("_steps/train-*/clock.json")):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(driver.pid).children(recursive=True)
        [victim] = [each for each in family if each.cmdline() and Path(each.cmdline()[0]).name == lost]
        victim.kill()
        gone = time.monotonic()
        output, _ = driver.communicate(timeout=120)
        assert time.monotonic() - gone < LONGEST[lost], output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 1 and "was lost; give the same command again: it goes on from here" in output, output
    assert "Traceback" not in output
    assert pd.read_parquet(out / "tiny.parquet").status.tolist() == ["pending"]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
