"""`record.py --status`: what it tells of records that run, failed or were damaged, and that it only reads."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hedgemix import recipes
from hedgemix.config import to_dict
from hedgemix.data.dataset import Dataset
from hedgemix.runtime.checkpoint import Checkpoints
from hedgemix.runtime.clock import FIELDS
from hedgemix.runtime.files import write_json
from pipeline.analysis.narrow_table import print_in_parts
from pipeline.monitor import status, status_view
from pipeline.steps import graph
from pipeline.steps.graph import SeedSteps
from pipeline.steps.step import Step
from pipeline.storage.lock import hold
from pipeline.storage.store import Storage, open_storage
from support import tiny_record
from support.s3_server import StoreServer, store_process, store_server  # noqa: F401

RECIPE = recipes.laptop()
DATASET = Dataset(
    source="docs",
    train_shards=(),
    valid_shards=(),
    tokenizer="",
    vocab_size=512,
    train_tokens=10_000,
    valid_tokens=4 * RECIPE.evaluate.chunk_tokens,
    max_valid_tokens=0,
    valid_bytes=100,
    train_documents=1,
    valid_documents=1,
    tokenizer_sha256="t",
    valid_sha256="v",
    train_sha256="x",
    text_sha256="",
)


def begin(storage: Storage) -> dict[int, SeedSteps]:
    """A record of two seeds of which nothing is done."""
    plan = planned(storage, 1, 2)
    folder = storage.record_folder("small")
    storage.write_bytes(folder / "recipe.json", json.dumps(to_dict(RECIPE)).encode())
    graph.keep_steps(plan)
    return plan.seeds


def planned(storage: Storage, *seeds: int) -> graph.RecordPlan:
    return graph.plan_record("small", RECIPE, DATASET, graph.data_step(storage, RECIPE.data), seeds)


def finish(step: Step, **result: float) -> None:
    told = {"key": step.key, "files": {}, "seconds": 12.34, "attempts": 2, "result": result}
    step.storage.write_bytes(step.folder / "result.json", json.dumps(told).encode())


def work(step: Step, seconds: float, age_seconds: float = 0.0) -> None:
    """A clock that says so many seconds were used, noted so long ago."""
    step.folder.mkdir(parents=True, exist_ok=True)
    write_json(step.folder / "clock.json", dict(zip(FIELDS, (seconds, 1, 0.0, 0.0), strict=True)))
    at = time.time() - age_seconds
    os.utime(step.folder / "clock.json", (at, at))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "runs"))


def ask(out: object, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code and what it prints."""
    code = status_view.main(["--status", str(out), *options])
    told = capsys.readouterr()
    return code, told.out + told.err


def look(step: Step, chunks: int = 4) -> status.State:
    return status.step_state(step.storage, step.kind, step.name, to_dict(RECIPE), chunks)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_every_state_of_a_step(storage: Storage) -> None:
    steps = begin(storage)[1]
    assert look(steps.train) == status.State("train", "waiting")

    work(steps.train, seconds=RECIPE.train.budget_seconds / 3, age_seconds=5)
    checkpoints = Checkpoints(steps.train.folder)
    for number in (3, 7):
        checkpoints.save(number, {"x": torch.zeros(1)})
    checkpoints.close()
    found = look(steps.train)
    assert (found.state, found.starts) == ("at work", 1)
    assert found.note == "33 %, sign of life 5 s ago, checkpoint at step 7"
    work(steps.train, seconds=1, age_seconds=7200)
    assert look(steps.train).state == "stopped" and "2 h ago" in look(steps.train).note

    finish(steps.train)
    assert look(steps.train) == status.State("train", "done", "", 12.34, 2)

    work(steps.evaluate, seconds=1)
    (steps.evaluate.folder / "trace.jsonl").write_text('{"chunk": 0}\n')
    assert look(steps.evaluate).note.startswith("25 %, ")
    error = steps.evaluate.folder / "error.txt"
    error.write_text("\x1b[31mValueError\x1b[0m: [bold]no\n\nframes\n")
    assert look(steps.evaluate).state == "failed" and "no" in look(steps.evaluate).note
    assert "frames" not in look(steps.evaluate).note
    at = error.stat().st_mtime - 10  # the same command goes on after the failure
    os.utime(error, (at, at))
    assert look(steps.evaluate).state == "at work"
    finish(steps.evaluate, bpb_final=1.25)
    assert look(steps.evaluate).note == "1.2500 bits/byte"


def test_training_by_steps_tells_its_fraction_from_the_log(storage: Storage) -> None:
    step = begin(storage)[1].train
    work(step, 1)
    (step.folder / "log.jsonl").write_text('{"fraction": 0.25}\n{"fraction": 0.5}\n{"frac')
    recipe = to_dict(RECIPE) | {"train": to_dict(RECIPE.train) | {"steps": 100}}
    found = status.step_state(storage, "train", step.name, recipe, 4)
    assert found.note.startswith("50 %, ")


@pytest.mark.parametrize("width", [40, 48, 60, 80])
def test_a_narrow_terminal_gets_every_number_whole(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    states = [
        (str(1 << 55), status.State("evaluate", "done", "1.2500 bits/byte", 123456.7, 12)),
        ("7", status.State("quantize", "at work", "33 %, sign of life 5 s ago, checkpoint at step 7000", 99.5, 1)),
    ]
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_in_parts(lambda columns: status_view.table(states, columns), len(status_view.HEADINGS), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines()) and "\u2026" not in text
    words = text.split()
    for number in (str(1 << 55), "123,456.7", "12", "1.2500", "99.5", "33", "7000"):
        assert number in words
    assert words.count("evaluate") == words.count("quantize") == words.count("seed")


def test_it_reads_well_and_writes_nothing(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    steps = begin(storage)
    finish(steps[1].train)
    steps[1].quantize.folder.mkdir(parents=True)
    (steps[1].quantize.folder / "error.txt").write_text("\x1b[31mValueError\x1b[0m: [bold]" + "long " * 40)
    work(steps[2].train, 20)
    before = files(storage.root)
    code, output = ask(storage.root, capsys)
    assert code == 0 and files(storage.root) == before
    lines = output.splitlines()
    assert lines[0] == "small: no driver" and f"table: {storage.root}/small.parquet (not yet)" in lines
    assert all(len(line) <= 80 for line in lines if not line.startswith("table:"))
    assert "\x1b" not in output and "ValueError: [bold]long" in output
    assert ["2", "train", "at", "work"] in [line.split()[:4] for line in lines]
    assert [line.split()[:3] for line in lines if " done " in line] == [["1", "train", "done"]]


def test_a_driver_that_holds_the_record_is_seen_and_not_hindered(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(storage)
    lock = storage.record_folder("small") / "record.lock"
    with hold(storage, lock):
        assert "small: a driver is at work" in ask(storage.root, capsys)[1]
    assert "small: no driver" in ask(storage.root, capsys)[1]
    with open(lock, "rb") as file:  # a status that looks just now
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with hold(storage, lock):
            pass


DAMAGES = {
    "steps.json": [b"{", b"[]", b'{"seeds": 3}', b'{"seeds": {"1": {}}, "counts": 1, "chunks": Infinity}', b"\xff"],
    "recipe.json": [b"{", b'{"train": 3}', b'{"train": {"budget_seconds": "x"}}'],
    "result.json": [b"{", b"[]", b'{"result": 3, "seconds": "x", "attempts": []}'],
    "clock.json": [b"{", b'{"elapsed_seconds": NaN, "starts": "x"}'],
    "checkpoint.json": [b"{", b'{"checkpoints": {}}', b'{"checkpoints": [{"number": Infinity}]}', b"[" * 100_000],
    "log.jsonl": [b"\xff\n\n{", b'{"fraction": "x"}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, c) for name, all in DAMAGES.items() for c in all])
def test_damage_is_shown_and_raises_nothing(
    storage: Storage, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    steps = begin(storage)
    work(steps[1].train, 1)
    folder = storage.record_folder("small") if name in ("steps.json", "recipe.json") else steps[1].train.folder
    (folder / name).write_bytes(content)
    code, output = ask(storage.root, capsys)
    assert code == 0 and output.startswith("small: no driver") and "small.parquet" in output
    if content in (b"{", b"[]"):
        assert f"{name} is damaged" in output or name == "log.jsonl"


def test_other_damage(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    steps = begin(storage)
    (storage.root / "small.parquet").write_bytes(b"PAR1 not")
    (storage.root / "_steps").mkdir()
    steps[1].train.folder.write_text("in the way")
    (steps[2].train.folder / "result.json").mkdir(parents=True)
    (storage.root.parent / "secret-0").mkdir()
    (storage.root.parent / "secret-0" / "result.json").write_text('{"result": {"bpb_final": 7.0}}')
    path = storage.record_folder("small") / "steps.json"
    told = json.loads(path.read_text())
    told["seeds"]["\x1b[31m3"] = {"evaluate": "../../secret-0"}
    path.write_text(json.dumps(told))
    code, output = ask(storage.root, capsys)
    assert code == 0 and "\x1b" not in output and "7.0" not in output
    for sign in ("the table is damaged", "a file is in the place", "result.json is damaged", "names no step"):
        assert sign in " ".join(output.split()), output


def test_what_is_not_there_is_a_user_s_mistake(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = ask(tmp_path / "no", capsys)
    assert code == 2 and "is no folder" in output and not (tmp_path / "no").exists()
    code, output = ask(storage.root, capsys)
    assert code == 2 and "holds no record;" in output
    begin(storage)
    code, output = ask(storage.root, capsys, "--record", "other")
    assert code == 2 and "'other'; there are small" in output
    assert ask(storage.root, capsys, "--record", "small")[0] == 0
    assert ask("ftp://somewhere/x", capsys)[0] == 2


def test_the_steps_of_earlier_commands_stay_named(storage: Storage) -> None:
    steps = begin(storage)
    path = storage.record_folder("small") / "steps.json"
    graph.keep_steps(planned(storage, 3))
    told = json.loads(path.read_text())
    assert list(told["seeds"]) == ["1", "2", "3"] and told["chunks"] == 4
    assert told["seeds"]["2"]["evaluate"] == steps[2].evaluate.name
    path.write_text("{")
    assert list(begin(storage)) == [1, 2] and list(json.loads(path.read_text())["seeds"]) == ["1", "2"]


def test_a_record_on_an_object_store(
    store_server: StoreServer,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = open_storage(store_server.uri(), tmp_path / "writer")
    steps = begin(storage)
    finish(steps[1].train)
    step = steps[1].evaluate
    step.folder.mkdir(parents=True)
    write_json(step.folder / "clock.json", {"elapsed_seconds": 3.0, "starts": 1})
    (step.folder / "trace.jsonl").write_text('{"chunk": 0}\n{"chunk": 1}\n')
    for path in step.folder.iterdir():
        storage.push(path)
    monkeypatch.setenv("HEDGEMIX_SCRATCH", str(tmp_path / "reader"))
    with hold(storage, storage.record_folder("small") / "record.lock"):
        code, output = ask(store_server.uri(), capsys)
    before = storage.names(storage.root)  # with the lock's object, which nobody holds now
    assert code == 0 and "a driver is at work on " in output and "renewed its lease" in output
    assert "50 %, sign of life" in output and "s3://records/runs/small.parquet (not yet)" in output
    assert "small: no driver" in ask(store_server.uri(), capsys)[1]
    assert storage.names(storage.root) == before and not (tmp_path / "reader").exists()
    code, output = ask(store_server.uri("empty"), capsys)
    assert code == 2 and "holds no record" in output
    code, output = ask(store_server.uri(bucket="vanished"), capsys)
    assert code == 2 and "Traceback" not in output
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in output


@pytest.mark.slow
def test_a_real_record_asked_by_a_machine_without_ray(undisturbed: tuple[Path, int, str], tmp_path: Path) -> None:
    out, _, _ = undisturbed
    (tmp_path / "ray.py").write_text("raise ImportError('there is no Ray here')")
    before = files(out)
    told = subprocess.run(
        [sys.executable, str(tiny_record.ROOT / "pipeline" / "record.py"), "--status", str(out), "--record", "tiny"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tiny_record.ROOT}", "COLUMNS": "140"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0 and not told.stderr and files(out) == before
    lines = [line.split() for line in told.stdout.splitlines() if line]
    assert [line[-1] for line in lines if line[0] == "evaluate"] == ["bits/byte", "waiting"]
    assert ["2", "train", "failed", "IsADirectoryError:"] in [line[:4] for line in lines]
    assert "seed 2 failed: train: IsADirectoryError" in told.stdout
