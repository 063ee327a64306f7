"""Checkpoints that storage cut short, flipped or lost, and the clock that goes on over restarts."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch

from hedgemix.runtime import checkpoint, clock
from hedgemix.runtime.checkpoint import Checkpoints
from hedgemix.runtime.clock import Clock


def saved(folder: Path, *numbers: int) -> Checkpoints:
    kept = Checkpoints(folder)
    for number in numbers:
        kept.save(number, {"weights": [torch.full((1000,), float(number))], "step": number})
    kept.close()
    return kept


def step(folder: Path) -> int | None:
    found = Checkpoints(folder).load()
    assert found is None or torch.equal(found["weights"][0], torch.full((1000,), float(found["step"])))
    return found and found["step"]


def test_the_newest_of_two_is_taken_up(tmp_path: Path) -> None:
    assert step(tmp_path) is None
    saved(tmp_path, 1, 2, 3)
    assert step(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2.pt", "checkpoint-3.pt", "checkpoint.json"]


def test_what_is_saved_is_what_the_state_was_then(tmp_path: Path) -> None:
    kept, tensor = Checkpoints(tmp_path), torch.zeros(1_000_000)
    kept.save(1, {"tensor": tensor})
    tensor += 1
    kept.close()
    assert not Checkpoints(tmp_path).load()["tensor"].any()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "pickle"])
def test_a_damaged_checkpoint_costs_the_way_from_the_one_before(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-2.pt"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"step": 99}))
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 3] if damage == "cut" else content)
    again = Checkpoints(tmp_path)
    assert again.load()["step"] == 1 and len(again.damaged) == 1 and "checkpoint-2.pt" in again.damaged[0]
    (tmp_path / "checkpoint-1.pt").write_bytes(b"")
    assert step(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checkpoints": 3}', '{"checkpoints": [{"number": 1}]}'])
def test_a_damaged_list_of_checkpoints_is_none(tmp_path: Path, content: str) -> None:
    saved(tmp_path, 1)
    (tmp_path / "checkpoint.json").write_text(content)
    assert step(tmp_path) is None


def test_names_in_the_list_stay_in_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    saved(outside, 7)
    saved(inside, 1)
    found = json.loads((outside / "checkpoint.json").read_text())
    found["checkpoints"][0]["number"] = "/../../outside/checkpoint-7"
    (inside / "checkpoint.json").write_text(json.dumps(found))
    assert step(inside) is None


def test_a_state_is_written_again_only_where_it_was_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-2.pt"
    written = path.stat().st_mtime_ns
    again = Checkpoints(tmp_path)
    assert again.load()["step"] == 2
    again.save(2, {"weights": [torch.full((1000,), 2.0)], "step": 2})
    again.close()
    assert path.stat().st_mtime_ns == written
    path.write_bytes(b"damaged")
    again = Checkpoints(tmp_path)
    assert again.load()["step"] == 1
    again.save(2, {"weights": [torch.full((1000,), 2.0)], "step": 2})
    again.close()
    assert step(tmp_path) == 2


def test_a_failed_write_ends_nothing_and_the_next_one_may_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = saved(tmp_path, 1)
    write = checkpoint.save_tensors

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    kept.save(2, {"weights": [torch.zeros(1)], "step": 2})
    kept.close()
    assert "No space left" in kept.failures[0] and step(tmp_path) == 1
    monkeypatch.setattr(checkpoint, "save_tensors", write)
    kept.save(3, {"weights": [torch.full((1000,), 3.0)], "step": 3})
    kept.close()
    assert len(kept.failures) == 1 and step(tmp_path) == 3


class Seconds:
    """A clock's clock."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def test_time_since_the_checkpoint_stays_used_and_is_told_as_lost(tmp_path: Path) -> None:
    path, seconds = tmp_path / "clock.json", Seconds()
    first = Clock(path, None, seconds)
    seconds.at += 7
    first.beat()
    second = Clock(path, 5.0, seconds)  # killed at 7 s, taken up from a checkpoint of 5 s
    assert (second.elapsed(), second.starts, second.lost_seconds) == (7.0, 2, 2.0)
    seconds.at += 3
    second.beat()
    third = Clock(path, None, seconds)  # no checkpoint is left: anew, and all of it was for nothing
    assert (third.elapsed(), third.starts, third.lost_seconds) == (0.0, 3, 10.0)


def test_a_clock_that_cannot_be_read_falls_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "clock.json"
    path.write_text("{")
    assert Clock(path, 5.0, Seconds()).elapsed() == 5.0
    assert clock.read(path)["starts"] == 1


def test_a_beat_that_storage_refuses_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = Seconds()
    beating = Clock(tmp_path / "clock.json", None, seconds)

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clock, "write_json", full)
    seconds.at += 2
    beating.beat()
    assert beating.elapsed() == 2
