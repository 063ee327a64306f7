"""`ray job submit` against a head node on this machine: the same table as without it, and what a job adds to that."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.job_submission import JobSubmissionClient

from benchmarks.faults import injection
from hedgemix.runtime import clock
from pipeline.monitor import metrics
from support import project_copy, tiny_record
from support.s3_server import free_port

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
COLUMNS = ["bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final", "artifact_sha256", "artifact_bytes"]


@dataclass(frozen=True)
class Head:
    address: str
    temporary: Path

    def packages(self, job: Any) -> list[Path]:
        """The unpacked working directory of the job on the node."""
        name = Path(job.runtime_env["working_dir"]).stem
        return list(self.temporary.glob(f"session_2*/runtime_resources/working_dir_files/{name}"))


@contextlib.contextmanager
def started(**environment: str) -> Iterator[Head]:
    """A head node with a dashboard on loopback. Only its own processes are killed after."""
    port, agent = free_port(), free_port()
    temporary = tempfile.mkdtemp(prefix="ray-job-", dir="/tmp")  # socket paths must stay short
    command = [str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2", "--disable-usage-stats"]
    command += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", f"--temp-dir={temporary}"]
    command += [f"--dashboard-agent-listen-port={agent}"]  # another head's agent may have the usual one
    own = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = open(Path(temporary) / "head.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env={**own, **environment}, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while answer(f"{address}/api/jobs/") not in (200, 401):
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.5)
        yield Head(address, Path(temporary))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def answer(url: str) -> int:
    """The status a stranger's request gets, 0 for none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as found:
            return found.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # A busy machine writes no table in Ray's three seconds; metrics every two seconds instead of every ten:
    # no process of a record is shorter, and each report costs every process of the head.
    with started(RAY_JOB_STOP_WAIT_TIME_S="20", RAY_metrics_report_interval_ms="2000") as found:
        yield found


def submit(head: str, folder: Path, *options: str, **variables: str) -> list[str]:
    """The command line that runs the record as a job, with `folder` as its working directory."""
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", str(folder)]
    if variables:
        command += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    return [*command, "--", "python", "pipeline/record.py", "laptop", *options]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


class Scrape(threading.Thread):
    """Reads what Prometheus would: the targets that the head names in its file, again and again."""

    def __init__(self, head: Head) -> None:
        super().__init__(daemon=True)
        self.file = head.temporary / "prom_metrics_service_discovery.json"
        self.ended = threading.Event()
        self.values: dict[tuple[str, str, str], float] = {}
        """The last value by column, seed and stage."""
        self.records: set[str] = set()

    def run(self) -> None:
        while not self.ended.wait(1):
            with contextlib.suppress(OSError, ValueError):
                for target in json.loads(self.file.read_text())[0]["targets"]:
                    self.take(urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode())

    def take(self, text: str) -> None:
        for name, found, value in re.findall(r"^ray_hedgemix_(\w+){(.*)} (\S+)$", text, re.MULTILINE):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', found))
            self.values[name, labels["seed"], labels["stage"]] = float(value)
            self.records.add(labels["record"])


def last_job(head: str) -> Any:
    """What Ray knows about the job that was submitted last."""
    return max(JobSubmissionClient(head).list_jobs(), key=lambda job: job.start_time)


def processes(out: Path) -> list[int]:
    """Processes whose command line or open files name the runs folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            opened = [os.readlink(file) for file in (process / "fd").iterdir()]
            if int(process.name) != os.getpid() and any(name.startswith(str(out)) for name in opened):
                found.append(int(process.name))
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_copy.make(tmp_path / "project")


def test_a_job_s_table_log_package_and_exit_code(
    head: Head, undisturbed: tuple[Path, int, str], text: Path, tmp_path: Path, project: Path
) -> None:
    """One job of two seeds: the environment it was given reaches driver and workers, where it kills the quantization
    once; a folder in the place of the second seed's lock fails that seed."""
    out = tmp_path / "runs"
    in_the_way = next(path for path in undisturbed[0].glob("_steps/train-*/step.lock") if path.is_dir())
    (out / in_the_way.relative_to(undisturbed[0])).mkdir(parents=True)
    plan = injection.Plan(tmp_path / "faults", injection.kill("*/artifact.hmx"))
    options = tiny_record.arguments(text, out, "--seeds", "1", "2", "--record", "tiny", "--compute.max-restarts", "1")
    given = {**plan.environment(), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25"}
    scrape = Scrape(head)
    scrape.start()
    done = run(submit(head.address, project, *options, **given))
    scrape.ended.set()
    scrape.join()
    job = last_job(head.address)
    told = done.stdout + done.stderr + str(job.message)
    assert done.returncode == 1 and (job.status, job.driver_exit_code) == ("FAILED", 1), told
    plan.check()

    table = pd.read_parquet(out / "tiny.parquet").set_index("seed")
    theirs = pd.read_parquet(undisturbed[0] / "tiny.parquet").set_index("seed")
    assert list(table.status) == ["done", "failed"] and table.error[2] == theirs.error[2].replace(
        str(undisturbed[0]), str(out)
    )
    assert {column: table[column][1] for column in COLUMNS} == {column: theirs[column][1] for column in COLUMNS}

    # What Prometheus saw while it ran is named as the table's columns and holds their values. Of what came in the last
    # two seconds, it saw nothing.
    assert scrape.records == {"tiny"}
    assert {column for column, _, stage in scrape.values if stage == "row"} <= set(table.columns)
    assert {column for column, _, _ in scrape.values} <= set(table.columns) | set(metrics.BESIDE)
    seen = {column: scrape.values[column, "1", "row"] for column in ("steps", "train_loss_nats", "artifact_bytes")}
    assert seen == {column: table[column][1] for column in seen}
    assert scrape.values["steps", "1", "train"] == 12 and 0 < scrape.values["fraction", "1", "train"] <= 1
    assert ("limit_bytes", "2", "row") in scrape.values and ("steps", "2", "row") not in scrape.values

    log = JobSubmissionClient(head.address).get_job_logs(job.submission_id)
    assert "bits per byte of" in log and "seed 1: quantize was lost, starts again: WorkerCrashedError" in log
    lines = [line for line in log.splitlines() if line.strip() and "job_manager.py" not in line]  # Ray's first line
    assert not [line for line in lines if not line.isprintable() or "Traceback" in line or "INFO" in line]
    assert len(set(lines)) == len(lines), [line for line in lines if lines.count(line) > 1]

    [package] = head.packages(job)
    sent = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {"pipeline/record.py", "hedgemix/train/trainer.py", "pyproject.toml"} <= sent
    assert not [name for name in project_copy.HOME if name in sent] and "stays at home" not in log

    # Done seeds alone: the command finds nothing to do, and the job has succeeded.
    done = run(submit(head.address, project, *options[: options.index("--seeds") + 2], *options[-4:], **given))
    assert done.returncode == 0 and "nothing to do" in done.stdout, done.stdout + done.stderr


def test_a_recipe_that_cannot_run_is_a_failed_job(head: Head, text: Path, tmp_path: Path, project: Path) -> None:
    """The client tells 0 or 1 alone; the command's own code stands in the job's information."""
    options = tiny_record.arguments(text, Path("runs"))
    done = run(submit(head.address, project, *options))
    assert done.returncode == 1 and "give an absolute path" in done.stdout, done.stdout + done.stderr
    assert last_job(head.address).driver_exit_code == 2


@pytest.fixture(scope="module")
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache that nobody has filled yet, for the compiled tests of this file."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


@pytest.mark.soak
@pytest.mark.parametrize("way", ["command", "job"])
def test_a_compiled_record_meets_no_module_of_the_script_s_folder(
    way: str, request: pytest.FixtureRequest, text: Path, tmp_path: Path, project: Path, compiler_cache: dict[str, str]
) -> None:
    """As recipes record and single_gpu train. Nothing beside the script comes before a library of its name: jobs of the
    tests above meet none either, and the compiler does not in the test of open ports."""
    options = tiny_record.arguments(text, tmp_path / "runs", *project_copy.COMPILED)
    if way == "job":
        command = submit(request.getfixturevalue("head").address, project, *options, **compiler_cache)
    else:
        command = [sys.executable, str(project / "pipeline" / "record.py"), "laptop", *options]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **compiler_cache},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = pd.read_parquet(tmp_path / "runs").iloc[0]
    assert row.status == "done" and row.steps == 3


@pytest.mark.soak
def test_a_stopped_job_goes_on_as_the_same_job(head: Head, text: Path, tmp_path: Path, project: Path) -> None:
    """`ray job stop` in the middle of training: pending rows, no process of ours; then the numbers of an undisturbed
    record, its time charged once."""
    steps = ["--seeds", "1", "--record", "tiny", "--train.steps", "600", "--compute.checkpoint-seconds", "1"]
    (tmp_path / "calm").mkdir()
    code, output = tiny_record.run(tiny_record.arguments(text, tmp_path / "calm", *steps), tmp_path)
    assert code == 0, output
    calm = pd.read_parquet(tmp_path / "calm").iloc[0]

    out = tmp_path / "runs"
    command = submit(head.address, project, *tiny_record.arguments(text, out, *steps))
    assert run([*command[: command.index("--")], "--no-wait", *command[command.index("--") :]]).returncode == 0
    job, client = last_job(head.address), JobSubmissionClient(head.address)
    deadline = time.monotonic() + 240
    while not list(out.glob("_steps/train-*/checkpoint.json")):
        assert time.monotonic() < deadline, client.get_job_logs(job.submission_id)
        time.sleep(0.1)
    assert run([str(BIN / "ray"), "job", "stop", "--address", head.address, job.submission_id]).returncode == 0
    log = client.get_job_logs(job.submission_id)
    assert "stopped; the same command goes on from here" in log, log
    stopped = pd.read_parquet(out).iloc[0]
    assert stopped.status == "pending" and pd.isna(stopped.error)
    deadline = time.monotonic() + 20
    while processes(out):
        assert time.monotonic() < deadline, processes(out)
        time.sleep(0.2)
    [noted] = out.glob("_steps/train-*/clock.json")
    used = clock.read(noted)
    assert used["starts"] == 1 and not list(out.glob("_steps/train-*/result.json"))

    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    row = pd.read_parquet(out).iloc[0]
    assert row.status == "done" and row.restarts == 1
    assert {column: row[column] for column in COLUMNS} == {column: calm[column] for column in COLUMNS}
    assert row.train_seconds > used["elapsed_seconds"] and row.lost_seconds < used["elapsed_seconds"]


@pytest.mark.soak
def test_a_head_with_a_token_takes_no_job_and_no_driver_without_it(tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    generate = [str(BIN / "ray"), "get-auth-token", "--generate"]
    subprocess.run(generate, env={**os.environ, **token}, check=True, capture_output=True)
    with started(**token) as head:
        assert answer(f"{head.address}/api/jobs/") == 401
        command = [str(BIN / "ray"), "job", "submit", "--address", head.address, "--", "touch", str(tmp_path / "ran")]
        refused = run(command)  # the tests' own environment has no token
        assert refused.returncode == 1 and "Authentication" in refused.stdout + refused.stderr
        found = None
        deadline = time.monotonic() + 30
        while found is None:
            assert time.monotonic() < deadline
            found = re.search(r"--address='([^']+)'", (head.temporary / "head.log").read_text())
            time.sleep(0.2)
        gcs = found[1]
        join = [sys.executable, "-c", f"import ray; ray.init(address={gcs!r}, logging_level='ERROR')"]
        told = run(join)
        assert told.returncode != 0 and "Authentication" in told.stderr
        assert not (tmp_path / "ran").exists()
        done = subprocess.run(command, env={**os.environ, **token}, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and (tmp_path / "ran").exists(), done.stdout + done.stderr
