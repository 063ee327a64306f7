"""Writes on a condition: against a real server, and beside a dictionary that does the same."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from pipeline.storage import conditional
from pipeline.storage.conditional import Version
from pipeline.storage.store import Storage, open_storage, storage_at
from support.s3_server import StoreServer, store_process, store_server

__all__ = ["store_process", "store_server"]


def test_writes_hold_to_their_conditions_as_a_dictionary_does(store_server: StoreServer, tmp_path: Path) -> None:
    storage, draw = open_storage(store_server.uri(), tmp_path), random.Random(1)
    there: dict[Path, Version] = {}
    tags: list[str | None] = [None, '"none"']
    for number in range(40):
        path, data, tag = storage.root / draw.choice("ab"), str(number).encode(), draw.choice(tags[-3:] + tags[:1])
        if draw.random() < 0.1:
            storage.remove(path)
            there.pop(path, None)
        allowed = tag == (there[path].tag if path in there else None)
        new = storage.put_if(path, data, tag)
        assert (new is not None) == allowed
        if new is not None:
            there[path] = Version(data, new)
            tags.append(new)
        assert storage.read_version(path) == there.get(path)


def test_of_many_writers_at_once_one_writes(store_server: StoreServer, tmp_path: Path) -> None:
    storage, wrote = open_storage(store_server.uri(), tmp_path), []
    start = threading.Barrier(6)

    def write(number: int) -> None:
        tag: str | None = None
        for turn in range(5):
            start.wait(30)
            if storage.put_if(storage.root / "x", f"{turn} {number}".encode(), tag):
                wrote.append(turn)
            start.wait(30)
            version = storage.read_version(storage.root / "x")
            tag = version.tag if version else None

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrote == list(range(5))


def test_a_write_that_was_sent_twice_is_one(store_server: StoreServer, tmp_path: Path) -> None:
    storage = open_storage(store_server.uri(), tmp_path)
    tag = storage.put_if(storage.root / "x", b"mine", None)
    assert tag and storage.put_if(storage.root / "x", b"mine", None) == tag


def test_what_is_refused_is_no_condition_that_failed(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(store_server.uri(), tmp_path)
    conditional.connect.cache_clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG00000000000")
    store_server.check_credentials(True)
    with pytest.raises(OSError, match="InvalidAccessKeyId"):
        storage.put_if(storage.root / "x", b"1", None)
    with pytest.raises(OSError, match="InvalidAccessKeyId"):
        storage.read_version(storage.root / "x")


def test_a_store_that_cannot_is_told(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def opened() -> Storage:
        return open_storage(store_server.uri(), tmp_path, lines.append)

    assert opened().conditional and lines == [] and opened().names(opened().root) == {}
    assert not storage_at(store_server.uri(), tmp_path).conditional  # it was not tried
    put_if = conditional.put_if
    monkeypatch.setattr(conditional, "put_if", lambda uri, key, data, tag: put_if(uri, key, data, None) or "tag")
    assert not opened().conditional and "takes conditions and does not keep to them" in lines[-1]
    monkeypatch.setattr(conditional, "find_spec", lambda name: None)
    assert not opened().conditional and "pip install 'hedgemix[s3]'" in lines[-1]
    assert "a lease, weaker than a lock" in lines[-1]
    assert "Arrow" in conditional.why_not("gs://bucket/prefix", "bucket/prefix/x")
