"""The lock of one machine: the same for every TMPDIR, waited for, another user's told."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from threading import Event, Thread

import pytest

from hedgemix.config import RecipeError
from pipeline.storage import machine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock lies, in place of /tmp."""
    monkeypatch.delenv("HEDGEMIX_LOCKS", raising=False)
    place = tmp_path / "locks"
    place.mkdir()
    monkeypatch.setattr(machine, "FOLDER", place)
    return place


def test_two_commands_with_temporary_folders_of_their_own_meet(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, entered = Event(), Event()

    def second() -> None:
        with machine.machine_to_itself(waiting.set):
            entered.set()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "one"))
    with machine.machine_to_itself(lambda: pytest.fail("nobody else is there")):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "two"))
        thread = Thread(target=second, daemon=True)
        thread.start()
        assert waiting.wait(10) and not entered.wait(0.2)
    assert entered.wait(10)
    thread.join(10)
    assert [path.name for path in folder.iterdir()] == [f"hedgemix-{os.getuid()}.lock"]


def test_where_the_fixed_folder_takes_nothing_the_temporary_one_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "FOLDER", tmp_path / "missing")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert machine.lock_folder() == folder
    monkeypatch.setenv("HEDGEMIX_LOCKS", str(tmp_path))
    assert machine.lock_folder() == tmp_path


def test_another_user_s_record_is_told_and_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    me = os.getuid()
    with machine.machine_to_itself(lambda: pytest.fail("nobody else is there"), told.append):
        monkeypatch.setattr(machine.os, "getuid", lambda: me + 1)
        with machine.machine_to_itself(lambda: pytest.fail("another user is not waited for"), told.append):
            assert told == [machine.name_of(me)]
    assert not machine.working_users(folder)
    assert machine.name_of(3_999_999) == "3999999"


def test_a_lock_is_there_for_others_to_see_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        with machine.machine_to_itself(lambda: None):
            [lock] = folder.iterdir()
            assert lock.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_folder_without_locks_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(machine.fcntl, "flock", none)
    refused = pytest.raises(RecipeError, match="lock: Operation not supported; set HEDGEMIX_LOCKS to a folder")
    with refused, machine.machine_to_itself(lambda: pytest.fail("nobody else is there")):
        pass


def test_a_link_in_the_lock_s_place_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / f"hedgemix-{os.getuid()}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="remove it, or set HEDGEMIX_LOCKS"), machine.machine_to_itself(lambda: None):
        pass
    assert not (tmp_path / "elsewhere").exists()
