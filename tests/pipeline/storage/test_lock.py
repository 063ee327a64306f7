"""One driver a record, and one process a step, in a folder and in an object store."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hedgemix.config import RecipeError
from pipeline.storage.lease import Lease, LostLockError, Times
from pipeline.storage.lock import hold, place_of
from pipeline.storage.store import Storage, open_storage, storage_at
from support.s3_server import StoreServer, store_process, store_server

__all__ = ["store_process", "store_server"]

QUICK = Times(renew_seconds=0.3, stale_seconds=2.0, settle_seconds=0.5)
LOCK = Path("_records/tiny/record.lock")
OTHER = json.dumps({"owner": "x", "host": "y", "turn": 1}).encode()

HOLDER = f"""
import sys, time
from pathlib import Path
from pipeline.storage.lease import Times
from pipeline.storage.lock import hold, place_of
from pipeline.storage.store import open_storage
with hold(open_storage(sys.argv[1], Path(sys.argv[2])), Path("{LOCK}"), times=Times{tuple(QUICK)!r}):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(uri: str, scratch: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, uri, str(scratch)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def machine(server: StoreServer, scratch: Path, conditional: bool = True) -> Storage:
    """A machine's view of the store, or that of a store that writes on no condition; not tried, which takes time."""
    return replace(storage_at(server.uri(), scratch), conditional=conditional)


def owner(storage: Storage) -> str:
    return str(json.loads(storage.read_bytes(LOCK) or b"{}").get("owner"))


both = pytest.mark.parametrize("conditional", [True, False], ids=["lock", "lease"])


def test_a_folder_is_locked(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with hold(storage, LOCK) as held:
        assert not held.lost()
        with pytest.raises(RecipeError, match="another driver is at work on this record"), hold(storage, LOCK):
            pass
    process = holder(str(tmp_path), tmp_path)
    try:
        with pytest.raises(RecipeError, match="another driver"), hold(storage, LOCK):
            pass
    finally:
        process.kill()
        process.wait()
    with hold(storage, LOCK):
        pass


def test_a_file_system_without_locks_is_no_other_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    refused = pytest.raises(
        RecipeError, match=r"record\.lock: this file system has no locks \(Function not impl.*--out"
    )
    with refused, hold(open_storage(str(tmp_path)), LOCK):
        pass


@both
def test_a_second_is_refused_and_the_next_goes_on_at_once(
    store_server: StoreServer, tmp_path: Path, conditional: bool
) -> None:
    here, there = (machine(store_server, tmp_path / name, conditional) for name in ("here", "there"))
    calls: list[int] = []
    with hold(here, LOCK, times=QUICK) as held:
        with pytest.raises(RecipeError, match="another driver"), hold(here, LOCK, times=QUICK):  # at once, by the flock
            pass
        with (
            pytest.raises(RecipeError, match=r"s3://records/runs/_records/tiny, on \S+\); wait for it or stop it"),
            hold(there, LOCK, lambda: calls.append(1), times=QUICK),
        ):
            pass
        time.sleep(3 * QUICK.renew_seconds)
        assert not held.lost() and calls == [1]
    assert list(here.names(here.root)) == ([str(LOCK)] if conditional else [])
    with hold(there, LOCK, lambda: calls.append(1), times=QUICK):
        assert calls == [1]


@both
def test_a_killed_holder_s_lock_is_taken_over(store_server: StoreServer, tmp_path: Path, conditional: bool) -> None:
    there, calls = machine(store_server, tmp_path, conditional), []
    there.write_bytes(LOCK, OTHER)
    began = time.monotonic()
    with hold(there, LOCK, lambda: calls.append(1), times=QUICK):
        assert calls == [1] and time.monotonic() - began < 2 * QUICK.stale_seconds
    there.write_bytes(LOCK, OTHER)
    time.sleep(QUICK.stale_seconds + 1.1)  # the store's times are whole seconds
    with hold(there, LOCK, lambda: calls.append(1), times=QUICK):
        assert calls == [1]  # old when we came: no waiting


def test_on_its_own_machine_a_killed_holder_is_not_waited_for(store_server: StoreServer, tmp_path: Path) -> None:
    here, there = (machine(store_server, tmp_path / name) for name in ("here", "there"))
    long, lease = Times(600.0, 600.0), json.dumps({"owner": "x", "host": "y", "turn": 1})
    for storage in (here, there):
        storage.local_path(LOCK).parent.mkdir(parents=True)
    with open(here.local_path(LOCK), "a") as file:  # whose flock ends with the process
        here.write_bytes(LOCK, json.dumps(json.loads(lease) | {"place": place_of(file)}).encode())
    waited: list[int] = []

    def seen() -> None:
        waited.append(1)
        raise TimeoutError

    with pytest.raises(TimeoutError), hold(there, LOCK, seen, times=long):
        pass
    assert waited == [1]
    with hold(here, LOCK, seen, times=long):
        pass
    assert waited == [1]


def test_a_slow_start_leaves_a_lease_that_looks_alive(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (machine(store_server, tmp_path / name, False) for name in ("here", "there"))
    write, writes = Lease.write, []

    def slow(lease: Lease) -> None:
        writes.append(lease)
        if len(writes) == 1:
            time.sleep(QUICK.settle_seconds)
        write(lease)

    monkeypatch.setattr(Lease, "write", slow)
    with hold(here, LOCK, times=QUICK._replace(renew_seconds=60.0)):
        assert len(writes) == 2 and Lease(there, LOCK).age() < QUICK.stale_seconds


@both
def test_of_many_at_once_one_goes_on(store_server: StoreServer, tmp_path: Path, conditional: bool) -> None:
    went: list[int] = []
    refused: list[int] = []
    start, all_done = threading.Barrier(4), threading.Barrier(4)

    def drive(number: int) -> None:
        storage = machine(store_server, tmp_path / str(number), conditional)
        start.wait(30)
        try:
            with hold(storage, LOCK, times=Times(0.3, 5.0, 1.5)) as held:
                went.append(number)
                all_done.wait(30)
                assert not held.lost()
        except RecipeError:
            refused.append(number)
            all_done.wait(30)

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(went) == 1 and len(refused) == 3


def test_who_stood_still_leaves_the_lock_to_the_other(store_server: StoreServer, tmp_path: Path) -> None:
    """A holder that stood still for too long, as on a suspended machine, finds another in its place."""
    process = holder(store_server.uri(), tmp_path / "here")
    try:
        process.send_signal(signal.SIGSTOP)
        there = machine(store_server, tmp_path / "there")
        with hold(there, LOCK, times=QUICK) as held:
            mine = owner(there)
            process.send_signal(signal.SIGCONT)
            time.sleep(3 * QUICK.renew_seconds)
            assert not held.lost() and owner(there) == mine
    finally:
        process.kill()
        process.wait()


@both
def test_a_lost_lock_is_noticed_and_nothing_more_is_published(
    store_server: StoreServer, tmp_path: Path, conditional: bool
) -> None:
    there = machine(store_server, tmp_path, conditional)
    calls: list[int] = []
    with hold(there, LOCK, times=QUICK, on_lost=lambda: calls.append(1)) as held:
        there.write_bytes(LOCK, OTHER)
        end = time.monotonic() + 5
        while not held.lost():
            assert time.monotonic() < end
            time.sleep(0.05)
        path = there.root / "table"
        path.write_bytes(b"late")
        with pytest.raises(LostLockError):
            held.publish(path)
    assert there.read_bytes(LOCK) == OTHER and there.read_bytes(path) is None
    assert calls == ([1] if conditional else [])


def test_a_patient_one_waits_for_who_holds_it(store_server: StoreServer, tmp_path: Path) -> None:
    here, there = (machine(store_server, tmp_path / name) for name in ("here", "there"))
    order: list[str] = []

    def wait() -> None:
        with hold(there, LOCK, patient=True, times=QUICK):
            order.append("there")

    with hold(here, LOCK, patient=True, times=QUICK):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(QUICK.stale_seconds + 0.5)  # renewed all the while
        order.append("here")
    waiting.join(10)
    assert order == ["here", "there"]


@pytest.mark.parametrize("still", ["before the renewal", "after the renewal"])
def test_who_stood_still_on_its_way_to_publish_publishes_nothing(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still: str
) -> None:
    """The holder stands still between two of its requests, while another takes the lock and publishes."""
    here, there = (machine(store_server, tmp_path / name) for name in ("here", "there"))
    never, at_once = Times(600.0, 600.0), Times(600.0, 0.0)
    for storage, text in ((here, b"here"), (there, b"there")):
        (storage.ready() / "table").write_bytes(text)
    put_if, stood = Storage.put_if, []

    def slow(storage: Storage, path: Path, data: bytes, tag: str | None) -> str | None:
        renewal = path == LOCK
        if storage == here and not stood and renewal == (still == "before the renewal"):
            stood.append(path)
            with hold(there, LOCK, times=at_once) as other:
                other.publish(there.root / "table")
        return put_if(storage, path, data, tag)

    with hold(here, LOCK, times=never) as held:
        monkeypatch.setattr(Storage, "put_if", slow)
        with pytest.raises(LostLockError):
            held.publish(here.root / "table")
    assert stood and there.read_bytes(there.root / "table") == b"there"


def test_a_renewal_whose_answer_was_lost_is_not_another_s(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, put_if = machine(store_server, tmp_path), Storage.put_if

    def unanswered(*arguments: object) -> None:
        put_if(*arguments)  # type: ignore[arg-type]
        raise OSError("no answer")

    with hold(here, LOCK, times=Times(600.0)) as held:
        (here.root / "table").write_bytes(b"1")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no answer"):
            patch.setattr(Storage, "put_if", unanswered)
            held.publish(here.root / "table")
        held.publish(here.root / "table")
        assert not held.lost()
    assert here.read_bytes(here.root / "table") == b"1" and owner(here) == ""
