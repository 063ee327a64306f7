"""What is told of a running record: columns by name, to trackers that read back what they were given."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hedgemix import recipes
from pipeline import record
from pipeline.monitor import metrics
from pipeline.monitor.board import UNREAD, Board, ProgressRecord
from pipeline.monitor.metrics import progress_numbers
from pipeline.results.schema import Row
from pipeline.storage.store import Storage
from pipeline.tracking import follower
from pipeline.tracking.follower import Follower, Trackers, check_trackers
from pipeline.tracking.tensorboard_tracker import TensorBoard
from pipeline.tracking.tracked_record import TrackedRecord
from support import tensorboard_events, tiny_record

SECRET = "5ec2e7" * 6 + "abcd"
"""As long as a key of W&B."""


@pytest.fixture
def subject(tmp_path: Path) -> TrackedRecord:
    return TrackedRecord(Storage("", tmp_path), "tiny", recipes.laptop())


def row(seed: int, status: str, **columns: Any) -> Row:
    return Row("tiny", "laptop", "0", seed, status, **columns)


def step(number: int, loss_nats: float, seed: int = 1) -> ProgressRecord:
    """A training's progress record."""
    told = {"step": number, "tokens": 512 * number, "elapsed_seconds": number / 4, "fraction": number / 12}
    return ProgressRecord(
        number, seed, "train", {**told, "matrix_rate": 0.01, "loss_nats": loss_nats, "tokens_per_second": 2048}, "tiny"
    )


def drive(tracker: Any, told: list[ProgressRecord], rows: tuple[Row, ...] = (), die: bool = False) -> None:
    """What one driver tells a tracker; with `die`, up to the moment it is killed."""
    for one in told:
        values = progress_numbers(one.stage, one.record)
        tracker.point(one.seed, one.stage, int(values["steps"]), values, time.time())
    for each in rows:
        tracker.row(each.seed, each.status == "done", metrics.row_numbers(each))
    tracker.flush()
    if not die:
        tracker.close()


def test_what_is_told_is_named_as_the_table_s_columns() -> None:
    columns = {field.name for field in dataclasses.fields(Row)}
    renamed = {column for names in metrics.RENAMED.values() for column in names.values()}
    assert renamed | set(metrics.SO_FAR) | set(metrics.POSITION.values()) <= columns
    assert not set(metrics.BESIDE) & columns and set(metrics.meanings()) == columns | set(metrics.BESIDE)
    told = progress_numbers("train", step(6, 4.5).record)
    assert told.keys() - columns == set(metrics.BESIDE)
    assert told["ms_per_step"] == 1000 * 512 / 2048 and told["steps"] == 6 and told["train_loss_nats"] == 4.5
    assert progress_numbers("quantize", {}) == {}
    assert metrics.row_numbers(row(1, "done", bpb_final=2.5, within_limits=True, train_loss_nats=float("nan"))) == {
        "bpb_final": 2.5,
        "within_limits": 1.0,
    }


def test_the_board_keeps_what_the_driver_has_not_read() -> None:
    board = Board({})
    board.gauges.set = lambda *_: None  # there is no Ray
    for number in (2, 4):
        board.put("tiny", 1, "train", step(number, 5.0).record)
    seeds, told = board.read()
    assert seeds["tiny", 1]["step"] == 4 and [one.record["step"] for one in told] == [2, 4]
    assert board.read()[1] == told  # the answer was lost
    board.put("tiny", 1, "train", step(6, 5.0).record)
    assert [one.record["step"] for one in board.read(told[-1].at_ns)[1]] == [6]
    assert len({one.at_ns for one in told}) == 2 and not board.read(board.at_ns)[1]
    for number in range(UNREAD + 5):
        board.put("tiny", 1, "train", {"step": number})
    assert [one.record["step"] for one in board.read()[1]] == list(range(5, UNREAD + 5))


@pytest.mark.slow
def test_a_record_s_events_are_its_table_s_columns(undisturbed: tuple[Path, int, str]) -> None:
    out, _, output = undisturbed
    folder = out / "_records" / "tiny" / "tensorboard"
    assert "track" not in output and sorted(path.name for path in folder.iterdir()) == ["seed1", "seed2"]
    table = pd.read_parquet(out / "tiny.parquet").set_index("seed")
    columns = set(table.columns) | set(metrics.BESIDE)
    found: dict[str, tensorboard_events.Points] = {}
    for stage in ("train", "score", "evaluate", "row"):
        told = tensorboard_events.scalars(folder / "seed1" / stage)
        assert all(tensorboard_events.rising(points) for points in told.values())
        assert {tag.partition("/")[0] for tag in told} == {stage} and {tag.partition("/")[2] for tag in told} <= columns
        found |= told
    assert [at for at, _ in found["train/train_loss_nats"]] == [2, 4, 6, 8, 10, 12]
    assert found["train/ms_per_step"][-1][1] > 0
    assert [at for at, _ in found["evaluate/bpb_final"]] == [1023, 2047, 3071, 3999]
    for column in ("bpb_final", "bpb_mixed", "bpb_quantized", "bpb_hedge", "bpb_ttt", "bpb_published"):
        last, final = found[f"evaluate/{column}"][-1][1], found[f"row/{column}"][0][1]
        assert last == final == pytest.approx(table[column][1], rel=1e-6), column
    assert found["row/artifact_bytes"] == [(0, table.artifact_bytes[1])] and found["score/fraction"][-1][1] == 1
    docs = (tiny_record.ROOT / "docs" / "watching.md").read_text()
    for stage, position in metrics.POSITION.items():
        [listed] = re.findall(rf"^\| `{stage}` \| `{position}` \| (.*) \|$", docs, re.MULTILINE)
        assert {f"{stage}/{name}" for name in [position, *re.findall(r"\w+", listed)]} == {
            tag for tag in found if tag.startswith(f"{stage}/")
        }
    # Nothing that a stage tells is left out.
    [log] = [path for path in out.glob("_steps/train-*/log.jsonl")]
    line = json.loads(log.read_text().splitlines()[-1])
    assert len(progress_numbers("train", line)) == len(line) + 1
    failed = tensorboard_events.scalars(folder / "seed2" / "row")
    assert table.status[2] == "failed" and "row/limit_bytes" in failed and "row/bpb_final" not in failed


def test_a_killed_driver_leaves_no_zigzag(subject: TrackedRecord) -> None:
    """Nor does a worker lost while the driver lives."""
    drive(TensorBoard(subject), [step(number, 9.0) for number in (2, 4, 6, 8, 10)], die=True)
    again = [step(number, 1.0) for number in (6, 8, 10, 8, 10, 12)]
    drive(TensorBoard(subject), again, (row(1, "done", bpb_final=2.5),))
    found = tensorboard_events.scalars(subject.folder / "tensorboard" / "seed1" / "train")
    assert found["train/train_loss_nats"] == [(2, 9.0), (4, 9.0), (6, 1.0), (8, 1.0), (10, 1.0), (12, 1.0)]
    drive(TensorBoard(subject), [], (row(1, "done", bpb_final=2.25),))  # one that finds the seed done
    assert tensorboard_events.scalars(subject.folder / "tensorboard" / "seed1" / "row") == {
        "row/bpb_final": [(0, 2.25)]
    }


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_seed_that_is_finished_keeps_no_file_open(subject: TrackedRecord) -> None:
    """A study tells of hundreds, and a process may open 1024 files."""
    tracker = TensorBoard(subject)
    before = open_files()
    for seed in range(1, 31):
        drive(tracker, [step(2, 9.0, seed), step(4, 8.0, seed)], (), die=True)
        for stage in ("quantize", "score", "evaluate"):
            tracker.point(seed, stage, 1, {"total_bytes": 7.0}, 0.0)
        assert open_files() == before + 4
        tracker.row(seed, True, {"bpb_final": 2.5})
        assert open_files() == before
    tracker.flush()
    tracker.close()
    for seed in (1, 30):
        folder = subject.folder / "tensorboard" / f"seed{seed}"
        assert tensorboard_events.scalars(folder / "train")["train/train_loss_nats"] == [(2, 9.0), (4, 8.0)]
        assert tensorboard_events.scalars(folder / "evaluate") == {"evaluate/total_bytes": [(1, 7.0)]}
        assert tensorboard_events.scalars(folder / "row") == {"row/bpb_final": [(0, 2.5)]}


def test_files_closed_before_still_go_to_the_store(subject: TrackedRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Path] = []
    monkeypatch.setattr(Storage, "remote", True)
    monkeypatch.setattr(Storage, "push", lambda _, path: pushed.append(path))
    tracker = TensorBoard(subject)
    drive(tracker, [step(2, 9.0)], (row(1, "done", bpb_final=2.5),))
    assert sorted(path.parent.name for path in pushed) == ["row", "train"]


def test_a_link_leads_no_event_out_of_the_runs_folder(
    subject: TrackedRecord, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    subject.folder.mkdir(parents=True)
    (subject.folder / "tensorboard").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        drive(TensorBoard(subject), [step(2, 9.0)])
    assert not list(outside.iterdir())


class Recorder:
    """A tracker that keeps what it gets, and fails at a point of its choice."""

    def __init__(self, fail: str = "", gate: threading.Event | None = None) -> None:
        self.fail, self.gate, self.got = fail, gate, list[Any]()

    def note(self, what: str, *told: Any) -> None:
        if what == self.fail:
            raise ConnectionError("the server is gone\nwith a long story")
        if self.gate:
            self.gate.wait()
        self.got.append((what, *told))

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        self.note("point", seed, stage, position)

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        self.note("row", seed, done)

    def flush(self) -> None:
        self.note("flush")

    def close(self) -> None:
        self.note("close")


def test_a_tracker_gets_every_record_once_and_a_finished_seed_s_row_once() -> None:
    tracker, warnings = Recorder(), list[str]()
    followed = Trackers([Follower("recorder", lambda: tracker, warnings.append)])
    followed.tell([step(2, 5.0), step(4, 5.0), ProgressRecord(5, 1, "quantize", {}, "tiny")])
    followed.rows([row(1, "pending"), row(2, "failed")])
    followed.rows([row(1, "done"), row(2, "failed")])
    followed.tell([step(6, 5.0), step(8, 5.0, seed=2)])  # a failed seed's other stages may still end
    followed.close()
    assert [told for told in tracker.got if told[0] != "flush"] == [
        ("point", 1, "train", 2),
        ("point", 1, "train", 4),
        ("row", 2, False),
        ("row", 1, True),
        ("close",),
    ]
    assert not warnings and not followed.followers[0].thread.is_alive()


@pytest.mark.parametrize("fail", ["make", "point", "row", "flush", "close"])
def test_a_broken_tracker_is_told_once_and_holds_nothing_up(fail: str) -> None:
    def make() -> Recorder:
        if fail == "make":
            raise ConnectionError("the server is gone")
        return Recorder(fail)

    sound, warnings = Recorder(), list[str]()
    followed = Trackers([Follower("broken", make, warnings.append), Follower("sound", lambda: sound, warnings.append)])
    followed.tell([step(number, 5.0) for number in (2, 4, 6)])
    followed.rows([row(1, "done")])
    began = time.monotonic()
    followed.close()
    assert time.monotonic() - began < 10
    assert len(warnings) == 1 and "broken stopped tracking (ConnectionError: the server is gone);" in warnings[0]
    assert [told[0] for told in sound.got if told[0] != "flush"] == ["point"] * 3 + ["row", "close"]


def test_a_tracker_that_stands_still_costs_the_record_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "CLOSE_SECONDS", 0.2)
    gate, warnings = threading.Event(), list[str]()
    followed = Trackers([Follower("slow", lambda: Recorder(gate=gate), warnings.append)])
    began = time.monotonic()
    for _ in range(3):
        followed.tell([step(number, 5.0) for number in range(follower.WAITING)])
    followed.close()
    gate.set()
    assert time.monotonic() - began < 5
    assert warnings == [
        "slow is too slow; it does not get everything",
        "slow did not take everything in time",
    ]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "runs"
    arguments = tiny_record.arguments(tmp_path / "no-text", out, "--track", "tensorboard", name)
    assert record.main(["laptop", *arguments]) == 2
    told = capsys.readouterr()
    assert f"pip install 'hedgemix[{name}]'" in told.err and "starting Ray" not in told.out
    assert not list(out.iterdir())


def test_trackers_that_cannot_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*names: str) -> str:
        assert record.main(["laptop", *tiny_record.arguments(tmp_path / "none", tmp_path, "--track", *names)]) == 2
        return capsys.readouterr().err

    assert "none goes alone" in refused("none", "tensorboard")
    for address, why in (
        ("nonsense://user:secret@x", "--track mlflow, MLFLOW_TRACKING_URI: "),
        ("https://user:secret@x", "MLFLOW_TRACKING_USERNAME"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        told = refused("mlflow")
        assert why in told and "secret" not in told
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "WANDB_MODE=offline" in refused("wandb")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        check_trackers(("mlflow",), Storage("s3://bucket/runs", tmp_path))
