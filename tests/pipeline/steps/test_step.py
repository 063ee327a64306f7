"""A step on disk: done once, whole or not at all, and noticed when storage changed what it made."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hedgemix.runtime import clock
from pipeline.execution.train_job import scratch
from pipeline.steps.recovery import clocked, resuming, set_aside
from pipeline.steps.step import DamagedStepError, Made, Step, fetch, perform, save_outputs
from pipeline.storage.store import Storage


def step(folder: Path, kind: str = "data", key: str = "x") -> Step:
    return Step(kind, key, Storage("", folder))


def making(of: Step, answer: int = 1, **reads: dict[str, str]) -> Any:
    """Work that writes one file."""

    def work() -> Made:
        with clocked(of):
            (of.folder / "answer.txt").write_text(str(answer))
            return save_outputs(of, {"answer": answer}, reads)

    return work


def test_two_records_that_share_a_step_do_it_once(tmp_path: Path) -> None:
    shared, done = step(tmp_path), []

    def work() -> Made:
        time.sleep(0.3)
        done.append(1)
        return making(shared, len(done))()

    threads = [threading.Thread(target=perform, args=(shared, work, {})) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (record := shared.record()) and record["result"] == {"answer": 1} and done == [1]


def test_only_the_result_that_was_judged_is_set_aside(tmp_path: Path) -> None:
    mine = step(tmp_path)
    perform(mine, making(mine, 1), {})
    judged = (mine.folder / "result.json").read_bytes()
    set_aside(mine)
    perform(mine, making(mine, 2), {})
    set_aside(mine, judged)
    assert (record := mine.record()) and record["result"] == {"answer": 2}
    set_aside(mine, (mine.folder / "result.json").read_bytes())
    assert mine.record() is None


def test_a_done_step_is_not_done_again(tmp_path: Path) -> None:
    mine = step(tmp_path)
    assert mine.record() is None
    assert perform(mine, making(mine), {"by": "me"}) == {"answer": 1}
    assert perform(mine, lambda: pytest.fail("done twice"), {}) == {"answer": 1}
    record = mine.record()
    assert record is not None and record["origin"] == {"by": "me"} and record["seconds"] >= 0
    assert record["started_at"] <= record["finished_at"]
    assert (record["attempts"], record["lost_seconds"]) == (1, 0)
    assert list(record["files"]) == ["answer.txt"] and record["files"]["answer.txt"]["bytes"] == 1


def test_a_step_that_fails_or_is_damaged_is_not_done(tmp_path: Path) -> None:
    mine = step(tmp_path)
    with pytest.raises(OSError):
        perform(mine, lambda: (_ for _ in ()).throw(OSError("disk")), {})
    assert mine.record() is None
    (mine.folder / "result.json").write_text('{"key": "x"')
    assert mine.record() is None
    for damaged in (json.dumps({"key": "another", "result": {}}).encode(), b"[]", b"null", b"\xff\xfe", b""):
        (mine.folder / "result.json").write_bytes(damaged)
        assert mine.record() is None
    (mine.folder / "error.txt").write_text("what ended an earlier command's attempts")
    assert perform(mine, making(mine, 2), {}) == {"answer": 2}
    assert not (mine.folder / "error.txt").exists()


SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_step import making, perform, step
mine = step(Path({folder!r}))
{fault}
perform(mine, making(mine), {{}})
"""


def killed(folder: Path, fault: str) -> int:
    """Exit code of a process that does the step with a fault."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), fault=fault)
    return subprocess.run([sys.executable, "-c", script], check=False).returncode


def test_killed_between_write_and_rename_a_step_is_not_done_and_its_next_start_is_told(tmp_path: Path) -> None:
    fault = """
replace = os.replace
os.replace = lambda a, b: os._exit(9) if str(b).endswith("result.json") else replace(a, b)
"""
    assert killed(tmp_path, fault) == 9
    mine = step(tmp_path)
    assert list(mine.folder.glob(".result.json.*")) and mine.record() is None
    perform(mine, making(mine), {})
    record = mine.record()
    assert record is not None and record["attempts"] == 2 and not list(mine.folder.glob(".*.tmp"))


def test_the_seconds_of_a_killed_attempt_are_told_as_lost(tmp_path: Path) -> None:
    fault = """
import test_step, threading
def slow(of):
    def work():
        with test_step.clocked(of):
            threading.Timer(2.5, lambda: os._exit(9)).start()
            threading.Event().wait()
    return work
making = slow
"""
    assert killed(tmp_path, fault) == 9
    mine = step(tmp_path)
    perform(mine, making(mine), {})
    record = mine.record()
    assert record is not None and record["attempts"] == 2 and 1.9 <= record["lost_seconds"] <= 2.5


@pytest.mark.parametrize("damage", [b"", b"2", b"11", None])
def test_a_file_that_storage_changed_is_noticed_before_it_is_read(tmp_path: Path, damage: bytes | None) -> None:
    mine = step(tmp_path)
    perform(mine, making(mine), {})
    sums = fetch(mine, "answer.txt")
    assert fetch(mine) == sums and list(sums) == ["data"]
    path = mine.folder / "answer.txt"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(DamagedStepError, match=r"data-x: .*answer.txt is damaged") as error:
        fetch(mine)
    assert error.value.step == "data-x"
    set_aside(mine)
    assert mine.record() is None and (mine.folder / "result.damaged.json").exists()
    with pytest.raises(DamagedStepError, match="result.json is gone"):
        fetch(mine)
    perform(mine, making(mine), {})
    assert fetch(mine) == sums
    record = mine.record()
    assert record is not None and (record["attempts"], record["lost_seconds"]) == (2, 0)
    with pytest.raises(DamagedStepError, match="made no other.txt"):
        fetch(mine, "other.txt")


def test_what_is_redone_for_storage_is_not_charged_again(tmp_path: Path) -> None:
    mine = step(tmp_path)
    perform(mine, making(mine), {})
    noted = clock.read(mine.folder / "clock.json")
    (mine.folder / "clock.json").write_text(json.dumps({**noted, "elapsed_seconds": 600.0}))
    set_aside(mine)
    assert clock.Clock(mine.folder / "clock.json", 580.0).elapsed() == pytest.approx(580.0, abs=1)


def test_a_writer_that_is_thought_dead_is_waited_for(tmp_path: Path) -> None:
    mine, order = step(tmp_path), []

    def write(name: str, seconds: float) -> None:
        with resuming(mine):
            order.append(f"{name} begins")
            time.sleep(seconds)
            order.append(f"{name} ends")

    first = threading.Thread(target=write, args=("first", 0.5))
    first.start()
    while not order:
        time.sleep(0.01)
    write("second", 0)
    first.join()
    assert order == ["first begins", "first ends", "second begins", "second ends"]


def test_a_killed_training_s_scratch_goes_with_the_next_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, other = step(tmp_path / "runs", "train", "a"), step(tmp_path / "runs", "train", "b")
    killed = scratch(mine)
    left = killed.__enter__()  # and nothing after it, as by a kill
    (left / "notes").write_text("x")
    with scratch(other) as beside, scratch(mine) as again:
        assert again == left and list(again.iterdir()) == [] and beside != again
        (again / "notes").write_text("y")
    assert list(tmp_path.glob("hedgemix-train-*")) == []
