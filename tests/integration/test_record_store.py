"""A record whose runs folder is an object store: killed on one machine, finished on another, read with pandas."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pandas as pd
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from benchmarks.faults import injection
from benchmarks.faults.cluster import until
from hedgemix.runtime import clock
from pipeline import record
from pipeline.execution import ray_session
from support import fault_costs, tiny_record
from support.fault_costs import Faults, Watch, work
from support.faulty_record import LONG, Undisturbed, bits, training_for, undisturbed_bits
from support.s3_server import BUCKET, KEYS, StoreServer, store_process, store_server  # noqa: F401

pytestmark = pytest.mark.slow
OPTIONS = ["--compute.checkpoint-seconds", "0", "--seeds", "1", "--record", "tiny"]


def objects(server: StoreServer) -> dict[str, fs.FileInfo]:
    found = server.filesystem().get_file_info(fs.FileSelector(BUCKET, recursive=True))
    return {info.path: info for info in found if info.type == fs.FileType.File}


def checkpoints(server: StoreServer) -> list[str]:
    """Those of the evaluation."""
    return [path for path in objects(server) if "/evaluate-" in path and "/checkpoint-" in path]


@contextlib.contextmanager
def told_when(true: Callable[[], bool], file: Path) -> Iterator[None]:
    """Meanwhile, make the file once this is true."""
    ended = Event()

    def look() -> None:
        while not ended.wait(0.1):
            if true():
                file.touch()
                return

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def arguments(server: StoreServer, text: Path, *options: str) -> list[str]:
    """The command's, with the store for its runs folder."""
    made = tiny_record.arguments(text, Path("unused"), *options)
    made[made.index("unused")] = server.uri()
    return made


def training(scratch: Path, seconds: float) -> Path:
    """Wait until training has noted so many seconds; the working copy of the runs folder."""
    until(lambda: any(training_for(out, seconds) for out in scratch.glob("hedgemix-*/*")), 300, lambda: "no training")
    [out] = scratch.glob("hedgemix-*/*")
    return out


@pytest.mark.faults
def test_killed_on_one_machine_a_record_ends_on_another(
    store_server: StoreServer,  # noqa: F811
    undisturbed: tuple[Path, int, str],
    text: Path,
    tmp_path: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store_server.make()
    options = arguments(store_server, text, *OPTIONS)
    # The second machine has nothing of the first but the text, whose time and place the data step reads. The first is
    # lost once the store has a checkpoint: those are copied while the work goes on.
    copied = tmp_path / "copied"
    plan = injection.Plan(
        tmp_path / "faults", injection.kill("*/trace.jsonl", 3, "write", machine=True, after=str(copied))
    )
    watch = Watch(tmp_path, "evaluate", fault_costs.fired(plan))
    watch.start()
    with told_when(lambda: plan.fired() > 0 and bool(checkpoints(store_server)), copied):
        code, output = tiny_record.run(options, tmp_path, {**plan.environment(), "HEDGEMIX_SCRATCH": str(tmp_path)})
    assert code == -signal.SIGKILL, output
    plan.check()
    before = objects(store_server)
    [trained] = [path for path in before if "/train-" in path and path.endswith("/result.json")]
    assert checkpoints(store_server)
    [scratch] = tmp_path.glob("hedgemix-*")
    scratch.rename(tmp_path / "gone with the machine")

    code, output = tiny_record.run(options, tmp_path, {"HEDGEMIX_SCRATCH": str(tmp_path)})
    watch.stop()
    assert code == 0, output
    after = objects(store_server)
    assert after[trained].mtime == before[trained].mtime
    assert [path for path in after if "/_records/tiny/tensorboard/seed1/row/events." in path]
    table = pq.read_table(f"{BUCKET}/runs/tiny.parquet", filesystem=store_server.filesystem()).to_pandas()
    assert len(table) == 1 and table.status[0] == "done"
    assert bits(table.iloc[0]) == undisturbed_bits(undisturbed)
    assert table.retries[0] == 1  # the evaluation was started twice
    assert table.artifact_path[0].startswith(f"s3://{BUCKET}/runs/_steps/quantize-")

    # Nothing that was stored or printed holds the secret that all of it was written with.
    secret = KEYS["AWS_SECRET_ACCESS_KEY"].encode()
    for path in after:
        with store_server.filesystem().open_input_stream(path, compression=None) as stream:
            assert secret not in stream.read(), path
    assert secret.decode() not in output and f"s3://{BUCKET}/runs/tiny.parquet" in output

    # A third time, on a third machine, there is nothing to do but the report; and a person's pandas reads the folder.
    monkeypatch.setenv("HEDGEMIX_SCRATCH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: pytest.fail("Ray was started"))
    code = record.main(["laptop", *options, "--report"])
    output = capsys.readouterr().out
    assert code == 0 and "nothing to do" in output
    assert f"report: s3://{BUCKET}/runs/_records/tiny/report.html" in output
    with store_server.filesystem().open_input_stream(f"{BUCKET}/runs/_records/tiny/report.html") as stream:
        page = stream.read().decode()
    assert page.count("<svg") == 10 and "is not there" not in page
    folder = pd.read_parquet(f"{BUCKET}/runs", filesystem=store_server.filesystem())
    assert list(folder.seed) == [1]
    told = work(watch, table.lost_seconds[0])
    faults.note(17, "machine lost, another finishes from an object store", "in the second chunk", watch, told)


@pytest.mark.soak
def test_a_store_that_stands_still_for_a_while_is_waited_for(
    store_server: StoreServer,  # noqa: F811
    undisturbed_long: Undisturbed,
    text: Path,
    tmp_path: Path,
    faults: Faults,
) -> None:
    options = arguments(store_server, text, "--compute.checkpoint-seconds", "1", *LONG)
    driver = tiny_record.start(options, tmp_path, {"HEDGEMIX_SCRATCH": str(tmp_path)})
    try:
        out = training(tmp_path, 3)
        [told] = out.glob("_steps/train-*/clock.json")
        before = clock.read(told)["elapsed_seconds"]
        store_server.pause()
        time.sleep(10)
        assert clock.read(told)["elapsed_seconds"] > before, "training waited for the store"
        store_server.resume()
        output, _ = driver.communicate(timeout=300)
    finally:
        store_server.resume()
        driver.kill()
    assert driver.returncode == 0, output
    row = pq.read_table(f"{BUCKET}/runs/tiny.parquet", filesystem=store_server.filesystem()).to_pandas().iloc[0]
    assert row.status == "done" and bits(row) == undisturbed_bits(undisturbed_long)
    assert row.retries == 0 and row.lost_seconds == 0 and row.checkpoint_failures == 0
    faults.note(18, "object store silent for 10 s", "in training", 0.0, "none: training did not wait")


@pytest.mark.soak
def test_a_bucket_that_vanishes_in_training_is_told(
    store_server: StoreServer,  # noqa: F811
    text: Path,
    tmp_path: Path,
    faults: Faults,
) -> None:
    options = arguments(store_server, text, "--compute.checkpoint-seconds", "1", *LONG)
    driver = tiny_record.start(options, tmp_path, {"HEDGEMIX_SCRATCH": str(tmp_path)})
    try:
        training(tmp_path, 3)
        store_server.wipe()
        gone = time.time()
        output, _ = driver.communicate(timeout=400)
    finally:
        driver.kill()
    assert driver.returncode == 1 and BUCKET in output and "Traceback" not in output, output
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in output
    told = f"the command ends with exit code 1 after {time.time() - gone:.0f} s, and what is wrong"
    faults.note(18, "bucket removed", "in training", None, told, equal=False)


def test_a_bucket_that_vanished_or_wrong_keys_are_told_before_any_work(
    store_server: StoreServer,  # noqa: F811
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEDGEMIX_SCRATCH", str(tmp_path))
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: pytest.fail("Ray was started"))

    def told(uri: str) -> str:
        options = tiny_record.arguments(text, Path("unused"), *OPTIONS)
        options[options.index("unused")] = uri
        assert record.main(["laptop", *options]) == 2
        printed = capsys.readouterr()
        assert (
            printed.err.startswith("error: ") and "Traceback" not in printed.err and "starting Ray" not in printed.out
        )
        return printed.out + printed.err

    assert "vanished" in told(store_server.uri(bucket="vanished"))
    store_server.make()
    store_server.check_credentials(True)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in told(store_server.uri())
