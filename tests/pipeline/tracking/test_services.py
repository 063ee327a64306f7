"""MLflow's database and W&B's offline files, written by the trackers and read back."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from hedgemix import recipes
from pipeline.storage.store import Storage
from pipeline.tracking.follower import check_trackers
from pipeline.tracking.mlflow_tracker import MLflow
from pipeline.tracking.tracked_record import TrackedRecord
from pipeline.tracking.wandb_tracker import Wandb
from tests.pipeline.tracking.test_follower import SECRET, drive, row, step

ROW = row(1, "done", bpb_final=2.5, artifact_bytes=1000)
FAILED = row(2, "failed", retries=3)


@pytest.fixture
def subject(tmp_path: Path) -> TrackedRecord:
    return TrackedRecord(Storage("", tmp_path), "tiny", recipes.laptop())


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B reads the environment once a process."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    yield
    wandb.teardown()


def values(loss_nats: float, *numbers: int) -> list[tuple[int, float]]:
    return [(number, loss_nats) for number in numbers]


def test_mlflow_s_database_holds_one_run_a_seed(subject: TrackedRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, gone on from an earlier checkpoint; one seed ends well, one fails, one does not end."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    check_trackers(("mlflow",), subject.storage)
    drive(MLflow(subject), [step(number, 9.0) for number in (2, 4, 6)], die=True)
    again = [step(number, 1.0) for number in (4, 6, 8, 6, 8, 10)] + [step(2, 7.0, seed=2), step(2, 7.0, seed=3)]
    drive(MLflow(subject), again, (ROW, FAILED))

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{subject.storage.root}/_mlflow.db")
    experiment = client.get_experiment_by_name("hedgemix")
    runs = {run.data.tags["seed"]: run for run in client.search_runs([experiment.experiment_id])}
    told = {seed: (run.info.run_name, run.info.status, run.data.tags["record"]) for seed, run in runs.items()}
    assert told == {
        "1": ("tiny seed 1", "FINISHED", "tiny"),
        "2": ("tiny seed 2", "FAILED", "tiny"),
        "3": ("tiny seed 3", "KILLED", "tiny"),
    }
    history = client.get_metric_history(runs["1"].info.run_id, "train/train_loss_nats")
    assert [(metric.step, metric.value) for metric in history] == values(9.0, 2, 4, 6) + values(1.0, 8, 10)
    assert runs["1"].data.metrics["row/bpb_final"] == 2.5 and runs["1"].data.metrics["row/artifact_bytes"] == 1000
    assert runs["2"].data.metrics["row/retries"] == 3
    assert runs["1"].data.params == subject.settings() and subject.settings()["train.budget_seconds"] == "61"


def log_records(path: Path) -> Iterator[bytes]:
    """Of W&B's file: seven bytes, then a LevelDB log, whose blocks of 32 KiB hold whole records (1) or their first (2),
    middle (3) and last (4) parts, each behind a sum of four bytes, its length in two and its kind."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def offline_runs(folder: Path) -> dict[str, list[dict[str, object]]]:
    """What was told of every offline run, by its id: its name, points and summaries, and its exit code."""
    from wandb.proto import wandb_internal_pb2 as proto

    found: dict[str, list[dict[str, object]]] = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        told = found.setdefault(path.stem.removeprefix("run-"), [])
        for data in log_records(path):
            record = proto.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                told.append({"group": record.run.run_group, "name": record.run.display_name})
            elif kind in ("history", "summary"):
                items = record.history.item if kind == "history" else record.summary.update
                told.append({"kind": kind} | {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
            elif kind == "exit":
                told.append({"exit": record.exit.exit_code})
    return found


def test_wandb_s_offline_files_hold_one_run_a_seed_and_no_key(subject: TrackedRecord, offline: None) -> None:
    check_trackers(("wandb",), subject.storage)
    drive(Wandb(subject), [*(step(number, 9.0) for number in (2, 4, 6, 4, 6, 8)), step(2, 7.0, seed=2)], (ROW,))
    runs = offline_runs(subject.folder / "wandb")
    one, two = (told for seed in (1, 2) for name, told in runs.items() if name.endswith(f"-seed{seed}"))
    assert len(runs) == 2 and all(name.startswith(subject.identity()) for name in runs)
    assert one[0] == {"group": "tiny", "name": "tiny seed 1"} and one[-1] == {"exit": 0} and two[-1] == {"exit": 255}
    losses = [(told["train/steps"], told["train/train_loss_nats"]) for told in one if told.get("kind") == "history"]
    assert losses == values(9.0, 2, 4, 6, 8)
    assert any(told.get("row/bpb_final") == 2.5 for told in one) and not any("row/bpb_final" in told for told in two)
    for path in (path for path in subject.storage.root.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    assert os.environ["WANDB_API_KEY"] == SECRET
