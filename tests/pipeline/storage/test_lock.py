"""One driver a record, in a folder and in an object store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hedgemix.config import RecipeError
from pipeline.storage.lock import Lease, hold
from pipeline.storage.store import Storage, open_storage
from support.s3_server import StoreServer, store_process, store_server

__all__ = ["store_process", "store_server"]

QUICK: dict[str, Any] = {"renew_seconds": 0.3, "stale_seconds": 2.0, "settle_seconds": 0.5}
LOCK = Path("_records/tiny/record.lock")

HOLDER = f"""
import sys, time
from pathlib import Path
from pipeline.storage.lock import hold
from pipeline.storage.store import open_storage
with hold(open_storage(sys.argv[1], Path(sys.argv[2])), Path("{LOCK}"), **{QUICK!r}):
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


def machine(server: StoreServer, scratch: Path) -> Storage:
    return open_storage(server.uri(), scratch)


def test_a_folder_is_locked(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with hold(storage, LOCK) as lost:
        assert not lost()
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


def test_a_second_is_refused_and_the_next_goes_on_at_once(store_server: StoreServer, tmp_path: Path) -> None:
    here, there = machine(store_server, tmp_path / "here"), machine(store_server, tmp_path / "there")
    calls: list[int] = []
    with hold(here, LOCK, **QUICK) as lost:
        with pytest.raises(RecipeError, match="another driver"), hold(here, LOCK, **QUICK):  # at once, by the flock
            pass
        with (
            pytest.raises(RecipeError, match=r"s3://records/runs/_records/tiny, on \S+\); wait for it or stop it"),
            hold(there, LOCK, lambda: calls.append(1), **QUICK),
        ):
            pass
        time.sleep(3 * QUICK["renew_seconds"])
        assert not lost() and calls == [1]
    assert here.names(here.root) == {}
    with hold(there, LOCK, lambda: calls.append(1), **QUICK):
        assert calls == [1]


def test_a_killed_holders_lease_is_taken_over(store_server: StoreServer, tmp_path: Path) -> None:
    there, calls = machine(store_server, tmp_path / "there"), []
    patient = {**QUICK, "stale_seconds": 5.0}  # more than a busy machine takes to look at it
    there.read_bytes(LOCK)  # its first question takes longest
    process = holder(store_server.uri(), tmp_path / "here")
    process.kill()
    process.wait()
    began = time.monotonic()
    with hold(there, LOCK, lambda: calls.append(1), **patient):
        assert calls == [1] and time.monotonic() - began < 2 * patient["stale_seconds"]
    there.write_bytes(LOCK, json.dumps({"owner": "x", "host": "y", "turn": 1}).encode())
    time.sleep(QUICK["stale_seconds"] + 1.1)  # the store's times are whole seconds
    with hold(there, LOCK, lambda: calls.append(1), **QUICK):
        assert calls == [1]  # old when we came: no waiting


def test_a_slow_start_leaves_a_lease_that_looks_alive(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machine(store_server, tmp_path / "here"), machine(store_server, tmp_path / "there")
    write, writes = Lease.write, []

    def slow(lease: Lease) -> None:
        writes.append(lease)
        if len(writes) == 1:
            time.sleep(QUICK["settle_seconds"])
        write(lease)

    monkeypatch.setattr(Lease, "write", slow)
    with hold(here, LOCK, **{**QUICK, "renew_seconds": 60.0}):
        assert len(writes) == 2 and Lease(there, LOCK, 60.0).age() < QUICK["stale_seconds"]


def test_of_many_at_once_one_goes_on(store_server: StoreServer, tmp_path: Path) -> None:
    went: list[int] = []
    refused: list[int] = []
    start, all_done = threading.Barrier(4), threading.Barrier(4)

    def drive(number: int) -> None:
        storage = machine(store_server, tmp_path / str(number))
        start.wait(30)
        try:
            with hold(storage, LOCK, renew_seconds=0.3, stale_seconds=5.0, settle_seconds=1.5) as lost:
                went.append(number)
                all_done.wait(30)
                assert not lost()
        except RecipeError:
            refused.append(number)
            all_done.wait(30)

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(went) == 1 and len(refused) == 3


def test_a_lost_lease_is_noticed_and_left_to_the_other(store_server: StoreServer, tmp_path: Path) -> None:
    """A holder that stood still for too long, as on a suspended machine, finds another in its place."""
    process = holder(store_server.uri(), tmp_path / "here")
    try:
        process.send_signal(signal.SIGSTOP)
        there = machine(store_server, tmp_path / "there")
        with hold(there, LOCK, **QUICK) as lost:
            process.send_signal(signal.SIGCONT)
            time.sleep(3 * QUICK["renew_seconds"])
            assert not lost()
    finally:
        process.kill()
        process.wait()
    other = json.dumps({"owner": "x", "host": "y", "turn": 1}).encode()
    with hold(there, LOCK, **QUICK) as lost:
        there.write_bytes(LOCK, other)
        end = time.monotonic() + 5
        while not lost():
            assert time.monotonic() < end
            time.sleep(0.05)
    assert there.read_bytes(LOCK) == other
