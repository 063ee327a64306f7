"""A record whose runs folder is an object store: killed on one machine, finished on another, read with pandas."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from pipeline.monitor import status
from pipeline.storage.store import Storage, open_existing
from support import fault_costs, tensorboard_events, tiny_record
from support.fault_costs import Faults, Watch, work
from support.faulty_record import LONG, OFTEN, Undisturbed, bits, training_for, undisturbed_bits
from support.s3_server import BUCKET, KEYS, StoreServer, store_process, store_server  # noqa: F401

pytestmark = pytest.mark.slow


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


def driver_at(storage: Storage) -> str:
    return status.driver(storage, storage.root / "_records" / "tiny" / "record.lock")


@pytest.mark.faults
@pytest.mark.usefixtures("ray_session")
def test_every_stage_killed_once_and_then_the_machine_another_ends_with_the_same_numbers(
    store_server: StoreServer,  # noqa: F811
    undisturbed: Undisturbed,
    text: Path,
    tmp_path: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The machine, driver and all, in the evaluation's second start; the same command finishes elsewhere, and what was
    done is not done again."""
    options, scratch = arguments(store_server, text, *OFTEN), tmp_path / "scratch"
    scratch.mkdir()
    # The second machine has nothing of the first but the text, whose time and place the data step reads. The first is
    # lost once the store has a checkpoint: those are copied while the work goes on.
    copied = tmp_path / "copied"
    plan = injection.Plan(
        tmp_path / "faults",
        injection.kill("*/checkpoint*.pt", at=3),
        injection.kill("*/artifact.hmx"),
        injection.kill("*/score-*/result.json"),
        injection.kill("*/trace.jsonl", at=5, event="write"),
        injection.kill("*/trace.jsonl", at=8, event="write", machine=True, after=str(copied)),
    )
    kinds, machine = ("train", "quantize", "score", "evaluate"), 4
    seen: set[str] = set()
    with ExitStack() as stack:
        watches = [
            stack.enter_context(Watch(scratch, kind, fault_costs.fired(plan, number)))
            for number, kind in enumerate(kinds)
        ]
        stack.enter_context(told_when(lambda: plan.fired(machine) > 0 and bool(checkpoints(store_server)), copied))
        process = tiny_record.start(options, tmp_path, {**plan.environment(), "HEDGEMIX_SCRATCH": str(scratch)})
        while process.poll() is None:
            seen |= {driver_at(Storage("", out)) for out in scratch.glob("hedgemix-*/*")}
            time.sleep(0.1)
    assert process.returncode == -signal.SIGKILL, process.communicate()[0]
    plan.check()
    assert "a driver is at work" in seen
    [out] = scratch.glob("hedgemix-*/*")
    assert driver_at(Storage("", out)) == "no driver"
    storage = open_existing(store_server.uri())
    assert driver_at(storage).startswith("a driver is at work on ")  # so it looks from elsewhere, for a lease's time
    steps = status.read(storage, storage.root / "_records" / "tiny" / "steps.json")
    assert steps
    states = [state for _, state in status.states(storage, steps, {})]
    assert [state.state for state in states if state.step in ("train", "evaluate")] == ["done", "at work"]
    before = objects(store_server)
    [trained] = [path for path in before if "/train-" in path and path.endswith("/result.json")]
    assert checkpoints(store_server)
    losses = [clock.read(folder / "clock.json")["lost_seconds"] for watch in watches if (folder := watch.folder())]
    [mine] = scratch.glob("hedgemix-*")
    mine.rename(tmp_path / "gone with the machine")

    monkeypatch.setenv("HEDGEMIX_SCRATCH", str(scratch))
    lost = Watch(scratch, "evaluate", fault_costs.fired(plan, machine))
    with lost:
        code, output = tiny_record.run_here(options)
    assert code == 0, output
    after = objects(store_server)
    assert after[trained].mtime == before[trained].mtime
    table = pq.read_table(f"{BUCKET}/runs/tiny.parquet", filesystem=store_server.filesystem()).to_pandas()
    assert len(table) == 1 and table.status[0] == "done"
    row = table.iloc[0]
    assert bits(row) == undisturbed_bits(undisturbed)
    assert (row.restarts, row.retries) == (1, 5)
    assert row.artifact_path.startswith(f"s3://{BUCKET}/runs/_steps/quantize-")

    # What was tracked is in the store too, each value once, though a driver was killed.
    tracked = f"{BUCKET}/runs/_records/tiny/tensorboard/seed1"
    assert [path for path in after if f"{tracked}/row/events." in path]
    [out] = scratch.glob("hedgemix-*/*")
    told = tensorboard_events.scalars(out / "_records" / "tiny" / "tensorboard" / "seed1" / "evaluate")
    assert all(map(tensorboard_events.rising, told.values()))
    assert told["evaluate/bpb_final"][-1] == (3999, pytest.approx(row.bpb_final, rel=1e-6))
    # What a driver that was not killed passed on of the training.
    whole = undisturbed[0] / "_records" / "tiny" / "tensorboard" / "seed1" / "train"
    assert [at for at, _ in tensorboard_events.scalars(whole)["train/steps"]] == [2, 4, 6, 8, 10, 12]

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

    where = ("at its third checkpoint", "at the artifact", "at its result", "in the third chunk")
    names = ("training worker killed", "quantization killed", "scoring killed", "evaluation killed")
    for watch, seconds, name, place in zip(watches, losses, names, where, strict=True):
        assert seconds <= 2.5 or watch.kind in ("quantize", "score")
        faults.note(1, name, place, watch, work(watch, seconds))
    name = "machine lost, another finishes from an object store"
    faults.note(17, name, "in the third chunk", lost, work(lost, row.lost_seconds))


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
        options = tiny_record.arguments(text, Path("unused"), *OFTEN)
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
