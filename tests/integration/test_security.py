"""What others who can write the runs folder, or reach this machine, can make the command do (docs/security.md)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from hedgemix import stages
from hedgemix.artifact import format as artifact
from hedgemix.audit import claim
from hedgemix.config import Recipe, RecipeError
from hedgemix.data import dataset as datasets
from hedgemix.data import shards
from hedgemix.data.dataset import Dataset
from hedgemix.data.tokenizer import load as load_tokenizer
from hedgemix.evaluate.trace_file import Lines
from hedgemix.experts import match, ngram_index
from hedgemix.runtime import clock as clocks
from hedgemix.runtime.checkpoint import Checkpoints
from hedgemix.runtime.files import DamagedFileError, load_tensors, replacing, sha256_of, write_json
from pipeline import record
from pipeline.execution import ray_session
from pipeline.monitor import status
from pipeline.results.table import read_rows, table_path
from pipeline.steps.recovery import resuming
from pipeline.steps.step import DamagedStepError, Made, Step, check, fetch, perform, save_outputs
from pipeline.storage.store import Storage
from support import tiny_record

ESCAPES = ["../x", "../../x", "a/../../x", "/etc/hostname", ".", "..", "", "a//b", "a\\b", "a\nb"]


@dataclass(frozen=True)
class Bomb:
    """Unpickling it makes the file."""

    marker: str

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.marker, "w")


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Bomb]:
    """Must not have gone off at the end of the test."""
    trial, marker = tmp_path / "trial", tmp_path / "went-off"
    pickle.loads(pickle.dumps(Bomb(str(trial)))).close()
    assert trial.exists()
    yield Bomb(str(marker))
    assert not marker.exists()


def plant(path: Path, bomb: Bomb, dress: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if dress == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"step": bomb, "model": {"x": bomb}}, path, _use_new_zipfile_serialization=dress == "zip")


def list_checkpoint(folder: Path, number: int) -> None:
    """checkpoint.json as if we had written that checkpoint."""
    path = folder / f"checkpoint-{number}.pt"
    entry = {"number": number, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(folder / "checkpoint.json", {"checkpoints": [entry]})


@pytest.mark.parametrize("dress", ["pickle", "zip", "legacy"])
def test_a_checkpoint_or_tensors_that_are_a_bomb_are_damaged(bomb: Bomb, tmp_path: Path, dress: str) -> None:
    plant(tmp_path / "checkpoint-9.pt", bomb, dress)
    list_checkpoint(tmp_path, 9)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None and "damaged" in checkpoints.damaged[0]
    with pytest.raises(DamagedFileError, match="run again"):
        load_tensors(tmp_path / "checkpoint-9.pt")


def test_arrays_indexes_and_artifacts_that_are_bombs_are_refused(bomb: Bomb, tmp_path: Path) -> None:
    index = tmp_path / "index"
    stream = shards.TokenStream([np.arange(50, dtype=np.uint16) % 7])
    ngram_index.build(stream, (1, 2), 7, (2,), index)
    for path in sorted(index.glob("*.npy")):
        sound = path.read_bytes()
        np.save(path, np.array([bomb], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="Python objects"):
            match.load(index, (2,)) if path.name.startswith("match_") else ngram_index.load(index)
        path.write_bytes(sound)
    for dress in ("pickle", "zip", "legacy"):
        plant(tmp_path / "artifact.hmx", bomb, dress)
        with pytest.raises(artifact.ArtifactError):
            artifact.read(tmp_path / "artifact.hmx")
        with pytest.raises(RecipeError):
            shards.map_shard(tmp_path / "artifact.hmx")
        with pytest.raises(RecipeError):
            load_tokenizer(tmp_path / "artifact.hmx")


def test_texts_that_are_bombs_count_as_damaged(bomb: Bomb, tmp_path: Path) -> None:
    step = Step("train", "0", Storage("", tmp_path))
    for name in ("result.json", "clock.json", "checkpoint.json", "trace.jsonl", "dataset.json"):
        plant(step.folder / name, bomb, "pickle")
    assert step.record() is None and Checkpoints(step.folder).load() is None
    assert clocks.read(step.folder / "clock.json")["starts"] == 0
    assert not Lines(step.folder / "trace.jsonl").take_up(1)
    with pytest.raises(RecipeError, match="prepare the data again"):
        datasets.load(step.folder)


def test_a_table_that_is_a_bomb_is_only_data(bomb: Bomb, tmp_path: Path) -> None:
    """Arrow once unpickled the types that a file names; pandas reads notes from a file's metadata."""
    fuse = pickle.dumps(bomb)
    notes = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": fuse}
    columns = [pa.field("seed", pa.int64()), pa.field("status", pa.binary(), metadata=notes)]
    schema = pa.schema(columns, metadata={b"pandas": fuse})
    path = table_path(Storage("", tmp_path), "tiny")
    pq.write_table(pa.table([[1], [fuse]], schema=schema), path)
    assert read_rows(Storage("", tmp_path), path)[0]["seed"] == 1
    assert status.rows(Storage("", tmp_path), path)[0]["status"] == fuse
    with pytest.raises(RecipeError, match="no column"):
        claim.read_rows(path)
    with contextlib.suppress(ValueError):  # pandas may refuse the notes; it must not run them
        pd.read_parquet(path)


@pytest.fixture(scope="module")
def prepared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Dataset, Storage]:
    out = tmp_path_factory.mktemp("runs")
    recipe, _ = record.parse(["laptop", *tiny_record.arguments(text, out)])
    return recipe, record.prepare(recipe, Storage("", out), Console(quiet=True))[0], Storage("", out)


def test_a_training_begins_anew_instead_of_taking_up_a_bomb_and_weights_are_refused(
    bomb: Bomb, prepared: tuple[Recipe, Dataset, Storage], tmp_path: Path
) -> None:
    recipe, dataset, _ = prepared
    folder = tmp_path / "train"
    plant(folder / "checkpoint-9.pt", bomb, "zip")
    list_checkpoint(folder, 9)
    recipe = replace(recipe, train=replace(recipe.train, steps=2))
    result = stages.train_stage(recipe=recipe, dataset=dataset, seed=1, folder=folder)
    assert result.steps == 2
    for name in ("weights.pt", "moments.pt"):
        sound = (folder / name).read_bytes()
        plant(folder / name, bomb, "zip")
        with pytest.raises(DamagedFileError, match="run again"):
            stages.quantize_stage(
                recipe=recipe,
                dataset=dataset,
                seed=1,
                train_folder=folder,
                folder=tmp_path / "quantize",
                room_bytes=10**6,
            )
        (folder / name).write_bytes(sound)
    plant(folder / "weights.pt", bomb, "legacy")
    with pytest.raises(DamagedFileError, match="run again"):
        stages.score_stage(recipe=recipe, dataset=dataset, train_folder=folder)


def made(step: Step, content: bytes = b"ours") -> Callable[[], Made]:
    def work() -> Made:
        (step.folder / "a.bin").write_bytes(content)
        return save_outputs(step, {"x": 1})

    return work


@pytest.mark.parametrize("name", ESCAPES)
def test_a_result_that_names_files_elsewhere_is_done_again(tmp_path: Path, name: str) -> None:
    step = Step("train", "0", Storage("", tmp_path / "runs"))
    perform(step, made(step), {})
    assert step.record() is not None
    told = json.loads((step.folder / "result.json").read_text())
    outside = tmp_path / "x"
    outside.write_bytes(b"theirs")
    told["files"][name] = {"bytes": 6, "sha256": hashlib.sha256(b"theirs").hexdigest()}
    write_json(step.folder / "result.json", told)
    assert step.record() is None
    with pytest.raises(DamagedStepError):
        fetch(step)
    with pytest.raises(DamagedStepError, match="leads out"):
        check(step, name, told["files"][name])
    perform(step, made(step), {})
    assert list(step.record()["files"]) == ["a.bin"] and outside.read_bytes() == b"theirs"


def test_links_lead_no_reading_and_no_writing_out_of_a_step(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"ours")
    step = Step("train", "0", Storage("", tmp_path / "runs"))
    perform(step, made(step), {})
    (step.folder / "a.bin").unlink()
    (step.folder / "a.bin").symlink_to(outside)  # with the very same bytes
    with pytest.raises(DamagedStepError, match="leads out"):
        fetch(step)
    (step.folder / "result.json").unlink()
    for name in ("a.bin", "log.jsonl", "writer.lock", "step.lock"):
        for rest in step.folder.iterdir():
            rest.unlink()
        (step.folder / name).symlink_to(outside)
        with pytest.raises(ValueError, match="is a link"):
            perform(step, made(step), {})
        with pytest.raises(ValueError, match="is a link"), resuming(step):
            pass
    assert outside.read_bytes() == b"ours"

    beside = tmp_path / f".t.json.{os.uname().nodename}.{os.getpid()}.tmp"
    beside.symlink_to(outside)
    with replacing(tmp_path / "t.json") as file:
        file.write(b"new")
    assert (tmp_path / "t.json").read_bytes() == b"new" and outside.read_bytes() == b"ours"

    (tmp_path / "linked").symlink_to(tmp_path / "runs")  # the runs folder itself may be one
    step = Step("train", "1", Storage("", tmp_path / "linked"))
    perform(step, made(step), {})
    assert fetch(step)["train"].keys() == {"a.bin"}


def test_a_dataset_names_only_files_of_its_source(prepared: tuple[Recipe, Dataset, Storage], tmp_path: Path) -> None:
    recipe, dataset, _ = prepared
    datasets.check_places(dataset, recipe.data)
    secret = tmp_path / "id_ed25519"
    secret.write_text("secret")
    for change in ({"tokenizer": str(secret)}, {"valid_shards": (str(secret),)}, {"train_shards": ("/etc/hostname",)}):
        with pytest.raises(RecipeError, match=r"not of data\.source"):
            datasets.check_places(replace(dataset, **change), recipe.data)
    folder = Path(dataset.folder)
    of_shards = replace(recipe.data, source="shards", shards_dir=str(folder), tokenizer=str(secret))
    datasets.check_places(replace(dataset, tokenizer=str(secret)), of_shards)
    with pytest.raises(RecipeError, match=r"not of data\.source"):
        datasets.check_places(replace(dataset, tokenizer=str(secret)), replace(of_shards, tokenizer=""))


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", ".", "..", "_steps", "a\\b", "a\nb", "a\x1b[2J"])
def test_a_record_s_name_stays_in_the_runs_folder(name: str) -> None:
    with pytest.raises(RecipeError, match="--record"):
        record.parse(["laptop", "--record", name])


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/hostname"])
def test_a_folder_s_storage_refuses_paths_outside(tmp_path: Path, path: str) -> None:
    storage = Storage("", tmp_path / "runs")
    uses: list[Callable[[], Any]] = [
        lambda: storage.read_bytes(Path(path)),
        lambda: storage.write_bytes(Path(path), b""),
        lambda: storage.pull(Path(path)),
        lambda: storage.remove(Path(path)),
        lambda: storage.modified(Path(path)),
        lambda: storage.names(Path(path)),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="is not under"):
            use()
    assert not list(tmp_path.rglob("*"))


def test_a_cluster_is_told_how_ray_train_works_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "MY_RAY_TRAIN_KEY"):
        monkeypatch.setenv(name, "a-secret")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.7")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "9")
    job = {"runtime_env": {"env_vars": {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "9"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    told: dict[str, Any] = {}
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: told.update(options))
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with ray_session.ray_started(Console(quiet=True)):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "a-secret" not in json.dumps(told)
    given = told["runtime_env"]["env_vars"]
    assert given["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.7" and all(name.startswith("RAY_TRAIN_") for name in given)
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" not in given  # Ray refuses what the job was given already


@pytest.mark.slow
def test_secrets_of_the_environment_end_in_no_file_and_no_output(undisturbed: tuple[Path, int, str]) -> None:
    out, _, output = undisturbed
    secrets = [value.encode() for value in tiny_record.SECRETS.values()]
    found = [path for path in out.rglob("*") if path.is_file()]
    assert len(found) > 20
    for path in found:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret in content], path
    assert not [secret for secret in tiny_record.SECRETS.values() if secret in output]
