"""Files that are whole or absent, and what is said when one cannot be."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from hedgemix.runtime import files


class FullDisk:
    """A file on a disk that takes `room` bytes more."""

    def __init__(self, path: Path, room: int) -> None:
        self._file, self._room = open(path, "wb"), room  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@pytest.mark.parametrize("write", [files.write_json, files.save_tensors])
@pytest.mark.parametrize("room", [0, 30_000])
def test_a_full_disk_is_told_as_one(write: object, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says "unexpected pos"; which file it was, a write does not say."""
    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(path, room), raising=False)
    path = tmp_path / "weights"
    value = "x" * 100_000 if write is files.write_json else {"weights": torch.zeros(100_000)}
    with pytest.raises(OSError) as full:
        write(path, value)  # type: ignore[operator]
    line = f"{path}: No space left on device; make room, and run the same command again"
    assert full.value.errno == errno.ENOSPC and files.told(full.value) == line
    assert not list(tmp_path.iterdir())


def test_another_error_of_torch_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("of torch")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RuntimeError, match="of torch"):
        files.save_tensors(tmp_path / "a", {})


def test_a_place_for_a_file_is_looked_at_before_the_work(tmp_path: Path) -> None:
    files.check_new(tmp_path / "new" / "a.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
    (tmp_path / "a.txt").write_text("mine")
    for path, number in ((tmp_path / "a.txt", errno.EEXIST), (tmp_path / ("n" * 300), errno.ENAMETOOLONG)):
        with pytest.raises(OSError) as refused:
            files.check_new(path)
        assert refused.value.errno == number and files.told(refused.value).startswith(str(path))
    with pytest.raises(FileExistsError):
        files.check_new(tmp_path / "a.txt" / "b")
    assert (tmp_path / "a.txt").read_text() == "mine"
