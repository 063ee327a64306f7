"""Copies to the store while work goes on: order, coalescing, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hedgemix.runtime.checkpoint import Checkpoints
from pipeline.storage import uploader
from pipeline.storage.store import Storage, open_storage
from pipeline.storage.uploader import Uploader
from support.s3_server import StoreServer, store_process, store_server

__all__ = ["store_process", "store_server"]


@dataclass(frozen=True)
class Gated(Storage):
    """Notes what goes up, and lets it through while the gate is open; fails while `failing` has something."""

    gate: threading.Event = field(default_factory=threading.Event)
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)

    def push(self, path: Path) -> None:
        with open(path, "rb") as file:
            self.gate.wait(10)
            self.write_bytes(path, file.read())

    def write_bytes(self, path: Path, data: bytes) -> None:
        self.gate.wait(10)
        if self.failing:
            raise OSError(self.failing[0])
        self.seen.append((path.name, data))

    def remove(self, path: Path) -> None:
        self.removed.append(path.name)


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gated:
    monkeypatch.setattr(uploader, "SMALL_BYTES", 100)
    return Gated("s3://bucket/x", tmp_path)


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def note(copy: Uploader, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    copy(path)


def test_a_clock_goes_up_now_and_then_and_at_the_end(gated: Gated) -> None:
    gated.gate.set()
    copy = Uploader(gated, interval_seconds=0.3)
    for beat in range(100):
        note(copy, gated.root / "clock.json", b"%d" % beat)
        time.sleep(0.01)
    assert copy.close()
    states = [int(data) for _, data in gated.seen]
    assert states == sorted(set(states)) and states[0] == 0 and states[-1] == 99 and 3 <= len(states) <= 8


def test_a_list_goes_up_after_what_it_names_and_never_ahead(gated: Gated) -> None:
    """Uploads slower than checkpoints: the list that goes up is the one that was true then."""
    copy = Uploader(gated, interval_seconds=0.0)
    for number in range(4):
        note(copy, gated.root / f"c-{number}.pt", b"%d" % number * 200)
        note(copy, gated.root / "c.json", b"%d" % number)
        note(copy, gated.root / "clock.json", b"%d" % number)
        if number == 0:
            until(lambda: not any(entry.path.name == "c-0.pt" for entry in copy._queue))
        else:
            (gated.root / f"c-{number - 1}.pt").unlink()
    gated.gate.set()
    assert copy.close()
    names = [name if name.endswith(".pt") else f"{name} {data.decode()}" for name, data in gated.seen]
    assert names[0] == "c-0.pt"  # open when it was deleted
    assert names[-3:] == ["c-3.pt", "c.json 3", "clock.json 3"]
    for name in ("c-1.pt", "c-2.pt", "c.json 1", "c.json 2"):
        assert name not in names
    assert "c-0.pt" in gated.removed and "c-3.pt" not in gated.removed


def test_a_failure_is_told_and_made_good(gated: Gated) -> None:
    gated.gate.set()
    gated.failing.append("no room")
    copy = Uploader(gated, interval_seconds=0.0, retry_seconds=0.05)
    note(copy, gated.root / "c-1.pt", bytes(200))
    note(copy, gated.root / "c.json", b"1")
    until(lambda: copy.failure)
    assert copy.failure == "OSError: no room" and gated.seen == []
    note(copy, gated.root / "clock.json", b"1")
    gated.failing.clear()
    until(lambda: len(gated.seen) == 3)
    assert [name for name, _ in gated.seen] == ["c-1.pt", "c.json", "clock.json"]
    assert copy.close() and copy.failure == ""


def test_close_is_bounded(gated: Gated) -> None:
    gated.gate.set()
    gated.failing.append("gone")
    copy = Uploader(gated)
    note(copy, gated.root / "clock.json", b"1")
    began = time.monotonic()
    assert not copy.close(timeout_seconds=0.3)
    assert time.monotonic() - began < 2 and copy.failure == "OSError: gone"
    gated.failing.clear()  # its thread ends
    assert copy.close(10)


def test_a_folder_needs_no_copy(tmp_path: Path) -> None:
    copy = Uploader(open_storage(str(tmp_path)))
    note(copy, tmp_path / "clock.json", b"1")
    assert copy.close() and copy._thread is None


def test_checkpoints_outlive_the_machine(store_server: StoreServer, tmp_path: Path) -> None:
    """A new machine takes up the newest state, and old ones are gone from the store too."""
    here = open_storage(store_server.uri(), tmp_path / "here")
    folder = here.root / "_steps/train-1"
    folder.mkdir(parents=True)
    copy = Uploader(here, interval_seconds=0.0)
    states = Checkpoints(folder, kept=copy)
    for number in range(5):
        states.save(number, {"weights": torch.full((400_000,), float(number))})
    states.close()
    assert copy.close() and copy.failure == ""
    there = open_storage(store_server.uri(), tmp_path / "there")
    found = there.names(there.root / "_steps/train-1")
    assert {"checkpoint.json", "checkpoint-4.pt"} <= set(found) and len(found) <= 3
    for name in found:
        there.pull(there.root / "_steps/train-1" / name)
    taken = Checkpoints(there.root / "_steps/train-1")
    assert taken.load()["weights"][0] == 4 and taken.damaged == []


def test_a_dead_store_does_not_end_the_work(store_server: StoreServer, tmp_path: Path) -> None:
    here = open_storage(store_server.uri(), tmp_path)
    store_server.stop()
    copy = Uploader(here, retry_seconds=0.1)
    note(copy, here.root / "clock.json", b"1")
    until(lambda: copy.failure)
    assert "NETWORK_CONNECTION" in copy.failure
    (here.root / "clock.json").unlink()
    assert copy.close(20)
