"""Text encoded by Ray tasks: the files of one machine, byte for byte, and errors in a line."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hedgemix.config import DataConfig
from hedgemix.data import dataset, shards, text_set
from pipeline.execution import encode
from support import text_data


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches and shards of little text."""
    monkeypatch.setattr(text_set, "SHARD_TOKENS", 20_000)
    monkeypatch.setattr(text_set, "BATCH_CHARACTERS", 8_000)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepared(text: Path, folder: Path, encode_parts: text_set.EncodeParts | None) -> dict[str, bytes]:
    config = DataConfig(
        source="text", paths=(str(text),), vocab_size=512, valid_fraction=0.1, overlap_words=0, memory_bytes=10_000
    )
    dataset.save(dataset.prepare(config, folder, lambda line: None, encode_parts), folder)
    return files(folder)


def test_tasks_make_the_files_of_one_machine(
    small: None, ray_session: None, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    here = prepared(text, tmp_path / "here", None)
    there = prepared(text, tmp_path / "there", encode.once_started(lambda: began.append("ray")))
    assert there == here and len(here) > 10 and "val_000000.bin" in here
    assert began == ["ray", "ray"]  # asked before each side, of which the first starts it
    (tmp_path / "cut").mkdir()
    monkeypatch.setattr(shards, "write_shard", stopping(shards.write_shard, 4))
    with pytest.raises(KeyboardInterrupt):
        prepared(text, tmp_path / "cut", encode.encode_by_tasks)
    monkeypatch.undo()
    monkeypatch.setattr(text_set, "SHARD_TOKENS", 20_000)
    monkeypatch.setattr(text_set, "BATCH_CHARACTERS", 8_000)
    assert prepared(text, tmp_path / "cut", encode.encode_by_tasks) == here  # goes on behind the third shard


def stopping(write: object, at: int) -> object:
    count = iter(range(1, 1000))

    def stopped(*given: object) -> None:
        if next(count) == at:
            raise KeyboardInterrupt
        write(*given)  # type: ignore[operator]

    return stopped


def test_few_batches_wait_at_once_and_come_in_their_order(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MOST_IN_FLIGHT", 3)
    sizes = random.Random(0).choices(range(1, 40), k=30)
    batches = [list(text_data.documents()[:size]) for size in sizes]
    model, taken = text_data.processor().serialized_model_proto(), 0

    def fed() -> Iterator[list[str]]:
        nonlocal taken
        for batch in batches:
            taken += 1
            yield batch

    done = 0
    for tokens, expected in zip(
        encode.encode_by_tasks(model, fed()), text_set.encode_here(model, iter(batches)), strict=True
    ):
        assert tokens.dtype == np.uint16 and np.array_equal(tokens, expected)
        assert taken - done <= 3
        done += 1
    assert done == 30


def test_a_part_that_cannot_be_encoded_is_told_in_a_line(ray_session: None) -> None:
    model = text_data.processor().serialized_model_proto()
    with pytest.raises(encode.EncodeError) as failed:
        list(encode.encode_by_tasks(model, iter([["fine"], ["a lone \udc80"], ["fine"]])))
    told = str(failed.value)
    assert told.startswith("a part of the text could not be encoded: TypeError: List elements") and "\n" not in told


def test_a_process_that_encodes_does_without_torch() -> None:
    script = "import sys; from pipeline.execution import encode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_ray_is_started_when_the_first_batch_comes() -> None:
    def failing() -> None:
        raise RuntimeError("it was started")

    parts = encode.once_started(failing)(b"", iter([["a"]]))
    with pytest.raises(RuntimeError, match="it was started"):
        next(parts)
