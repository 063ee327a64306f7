"""Whose files a data set's folder holds, and what a making that was stopped leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hedgemix.config import DataConfig, RecipeError
from hedgemix.data import corpus, dataset, shards, text_set
from support.text_data import documents


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents()[:150]))
    return DataConfig(source="text", paths=(str(path),), vocab_size=400, valid_fraction=0.1)


@pytest.fixture(scope="module")
def made(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    return dataset.prepare(config, tmp_path_factory.mktemp("data"), silent)


OTHERS = ("train_000000.bin", "val_1.bin", "tokenizer.model", "memory.ppmd", "dataset.json", "begun.json")


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_others_wrote_stay(config: DataConfig, tmp_path: Path, name: str) -> None:
    """Refused before anything is read; also beside a data set of ours that does not name them."""
    (tmp_path / name).write_bytes(b"of somebody")
    unread = dataclasses.replace(config, paths=("/none",))
    with pytest.raises(RecipeError, match=f"{tmp_path} holds {name}, which no dataset.json there names"):
        dataset.prepare(unread, tmp_path, silent)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"of somebody")]


def test_shards_that_are_read_where_the_data_set_lies_are_not_of_it(
    config: DataConfig, made: dataset.Dataset, tmp_path: Path
) -> None:
    for path in Path(made.tokenizer).parent.glob("*.bin"):
        shutil.copy(path, tmp_path)
    shutil.copy(made.tokenizer, tmp_path)
    for _ in range(2):
        dataset.save(
            dataset.prepare(DataConfig(source="shards", shards_dir=str(tmp_path), vocab_size=400), tmp_path, silent),
            tmp_path,
        )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RecipeError, match=r"holds tokenizer.model, train_000000.bin, val_000000.bin, which no"):
        dataset.prepare(config, tmp_path, silent)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_making_that_was_stopped_is_made_anew(
    config: DataConfig, made: dataset.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.save(dataset.prepare(config, tmp_path, silent), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", full_disk)
        with pytest.raises(OSError, match="No space left"):
            dataset.prepare(config, tmp_path, silent)
    with pytest.raises(RecipeError, match="dataset.json cannot be read"):
        dataset.load(tmp_path)
    dataset.save(dataset.prepare(config, tmp_path, silent), tmp_path)
    assert dataset.load(tmp_path).train_sha256 == made.train_sha256


def test_a_making_that_was_stopped_goes_on_behind_its_last_whole_shard(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_set, "SHARD_TOKENS", 7_000)
    monkeypatch.setattr(text_set, "BATCH_CHARACTERS", 25_000)
    whole = dataset.prepare(config, tmp_path / "whole", silent)
    write, written, room = shards.write_shard, list[Path](), 0

    def stops(path: Path, tokens: np.ndarray) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            full_disk()
        write(path, tokens)
        written.append(path)

    monkeypatch.setattr(shards, "write_shard", stops)
    for shards_a_start in (2, 1, 3):
        room = shards_a_start
        with pytest.raises(OSError, match="No space left"):
            dataset.prepare(config, tmp_path / "parts", silent)
    written[2].write_bytes(b"cut since")
    del written[2:]
    room, lines = 1000, list[str]()
    found = dataset.prepare(config, tmp_path / "parts", lines.append)
    assert "train: 2 shards are there from a making that was stopped" in lines
    assert (found.train_sha256, found.valid_sha256) == (whole.train_sha256, whole.valid_sha256)
    assert len(written) == len(set(written)) == len(whole.train_shards) + len(whole.valid_shards) > 8
    written.clear()
    other = dataset.prepare(dataclasses.replace(config, valid_fraction=0.2), tmp_path / "parts", silent)
    assert [str(path) for path in written] == [*other.train_shards, *other.valid_shards]  # of others nothing is taken


def full_disk(*given: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_read_is_told(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    shutil.copy(config.paths[0], tmp_path / "text")
    (tmp_path / "text" / ".hidden.txt").write_text("hidden")
    (tmp_path / "text" / "image.png").write_text("image")
    lines: list[str] = []
    found = dataset.prepare(dataclasses.replace(config, paths=(str(tmp_path / "text"),)), tmp_path / "a", lines.append)
    whole = found.train_bytes + found.train_bytes_removed + found.valid_bytes
    n_documents = len(list(corpus.collect(config)))
    assert lines[0] == (
        f"read: 1 files, {n_documents} documents, {whole:,} bytes; passed over: 1 files of other kinds, 1 hidden files"
    )


def test_a_folder_that_cannot_be_one_is_refused_at_once(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    unread = dataclasses.replace(config, paths=("/none",))
    with pytest.raises(RecipeError, match="file is not a folder"):
        dataset.prepare(unread, tmp_path / "file", silent)
