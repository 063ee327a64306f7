from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.data import shards


def test_the_file_is_the_official_format(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "a.bin", np.array([1, 2, 65535]))
    expected = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 2, 65535)
    assert (tmp_path / "a.bin").read_bytes() == expected
    tokens = shards.open_shard(tmp_path / "a.bin", 65536)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [1, 2, 65535]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("tokens", [[65536], [-1], [[1, 2]]])
def test_tokens_that_do_not_fit_are_not_written(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="0..65535"):
        shards.write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def header(*words: int) -> bytes:
    return struct.pack("<256i", *words, *[0] * (256 - len(words)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"", "is empty: 0 bytes"),
        (b"\x01" * 100, "is empty: 100 bytes"),
        (header(20240520, 1, 0), "is empty: 1024 bytes"),
        (header(7, 1, 2) + bytes(4), "begins with 7, expected 20240520"),
        (header(20240520, 2, 2) + bytes(4), "version 2, expected 1"),
        (header(20240520, 1, 3) + bytes(4), "cut short: 1028 bytes, expected 1030"),
        (header(20240520, 1, 1) + bytes(4), "too long: 1028 bytes, expected 1026"),
        (header(20240520, 1, 2) + bytes(3), "cut short: 1027 bytes, expected 1028"),
        (header(20240520, 1, -1) + bytes(4), "too long"),
    ],
)
def test_broken_files_are_named_with_what_is_wrong(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "broken.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"data\.shards_dir: .*broken\.bin.*{reason}"):
        shards.open_shard(path, 1024)


def test_the_first_id_outside_the_vocabulary_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_TOKENS", 10)
    tokens = np.full(35, 1023)
    shards.write_shard(tmp_path / "a.bin", tokens)
    shards.open_shard(tmp_path / "a.bin", 1024)
    tokens[[34, 23]] = 2000, 1024
    shards.write_shard(tmp_path / "a.bin", tokens)
    with pytest.raises(RecipeError, match="token 1024 at position 23, expected ids below data.vocab_size 1024"):
        shards.open_shard(tmp_path / "a.bin", 1024)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 30), st.data())
def test_a_stream_is_its_shards_joined(sizes: list[int], limit: int, data: st.DataObject) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    stream = shards.TokenStream(np.split(whole, np.cumsum(sizes)[:-1]), limit)
    expected = whole[:limit] if limit else whole
    assert len(stream) == len(expected)
    start = data.draw(st.integers(0, len(expected)))
    count = data.draw(st.integers(0, len(expected) - start))
    found = stream.read(start, count)
    assert found.dtype == np.uint16 and found.tolist() == expected[start : start + count].tolist()
    for bad in ((-1, 1), (start, len(expected) - start + 1), (0, -1)):
        with pytest.raises(IndexError):
            stream.read(*bad)


def test_a_stream_of_files_reads_a_copy(tmp_path: Path) -> None:
    for name, tokens in (("a.bin", [1, 2, 3]), ("b.bin", [4, 5])):
        shards.write_shard(tmp_path / name, np.array(tokens))
    stream = shards.TokenStream([tmp_path / "a.bin", str(tmp_path / "b.bin")])
    stream.read(0, 5)[:] = 9
    assert stream.read(0, 5).tolist() == [1, 2, 3, 4, 5]
