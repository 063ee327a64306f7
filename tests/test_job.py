"""`ray job submit` against a head node on this machine: the same table as without it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import tinyrecord
from ray.job_submission import JobSubmissionClient

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
COLUMNS = ["bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final", "artifact_sha256", "total_bytes"]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A head node with a dashboard on loopback; its address. Only its own processes are killed after."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temporary = tempfile.mkdtemp(prefix="ray-job-", dir="/tmp")  # socket paths must stay short
    command = [str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2", "--disable-usage-stats"]
    command += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", f"--temp-dir={temporary}"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    log = open(Path(temporary) / "head.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                JobSubmissionClient(address).list_jobs()
                break
            except Exception:
                assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_submitted_job_writes_the_same_table(
    head: str, undisturbed: tuple[Path, int, str], text: Path, tmp_path: Path
) -> None:
    options = tinyrecord.arguments(text, tmp_path, "--seeds", "1", "--record", "tiny")
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", str(tinyrecord.ROOT)]
    done = subprocess.run(
        [*command, "--", "python", "pipeline/record.py", "laptop", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout and "bits per byte of" in done.stdout
    mine = pd.read_parquet(tmp_path).iloc[0]
    theirs = pd.read_parquet(undisturbed[0] / "tiny.parquet")
    theirs = theirs[theirs.seed == 1].iloc[0]
    assert mine.status == "done"
    assert {column: mine[column] for column in COLUMNS} == {column: theirs[column] for column in COLUMNS}
