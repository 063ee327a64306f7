"""Processes that race for one lock of an object store, and stand still in between for longer than it allows.

Each holder reads a number, and publishes the next one: if two ever held the lock at once, one of them publishes over
the other, and the number ends below the count of what was published. The lease is measured, and may fail.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.s3_server import StoreServer, store_process, store_server  # noqa: F401

pytestmark = pytest.mark.soak
HOLDERS = 6
TIMES = (0.3, 1.5, 0.15)
"""A thirteenth of those of a record."""
STOPS_A_REQUEST = 0.02
"""How often a holder stands still on its way to a request."""
STOP_SECONDS = (0.2, 4.0)

HOLDER = f"""
import contextlib, fcntl, hashlib, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
from hedgemix.config import RecipeError
from pipeline.storage.conditional import Version
from pipeline.storage.lease import Lease, LostLockError, Times
from pipeline.storage.lock import hold
from pipeline.storage.store import Storage, open_storage

uri, scratch, kind, seconds, folder = sys.argv[1:]
if folder:
    # A store that is a folder, every request of it at one moment: hundreds a second, where moto answers dozens.
    def at(storage, path):
        return Path(folder) / storage.relative_path(path).replace("/", "_")

    @contextlib.contextmanager
    def request():
        time.sleep(random.random() * 0.004)
        with open(Path(folder) / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        time.sleep(random.random() * 0.004)

    def read(storage, path):
        with request():
            return at(storage, path).read_bytes() if at(storage, path).exists() else None

    def version(storage, path):
        data = read(storage, path)
        return None if data is None else Version(data, hashlib.md5(data).hexdigest())

    def write(storage, path, data):
        with request():
            at(storage, path).write_bytes(data)

    def put_if(storage, path, data, tag):
        with request():
            file = at(storage, path)
            now = hashlib.md5(file.read_bytes()).hexdigest() if file.exists() else None
            if now != tag:
                return None
            file.write_bytes(data)
            return hashlib.md5(data).hexdigest()

    Storage.read_bytes, Storage.read_version, Storage.write_bytes, Storage.put_if = read, version, write, put_if
    Storage.push = lambda storage, path: write(storage, path, path.read_bytes())
    Storage.remove = lambda storage, path: at(storage, path).unlink(missing_ok=True)
    Lease.age = lambda lease: 0.0
    storage = Storage(uri, Path(scratch), kind == "lock")
    storage.root.mkdir(parents=True)
else:
    storage = replace(open_storage(uri, Path(scratch)), conditional=kind == "lock")
def stopping(name):
    ask = getattr(Storage, name)

    def stop_or_ask(*arguments):
        if random.random() < {STOPS_A_REQUEST}:
            os.kill(os.getpid(), signal.SIGSTOP)
        return ask(*arguments)

    setattr(Storage, name, stop_or_ask)

for name in ("read_bytes", "read_version", "write_bytes", "put_if", "push"):
    stopping(name)
number, published, lost, taken, doubtful = storage.root / "number", 0, 0, 0, 0
until = time.monotonic() + float(seconds)
while time.monotonic() < until:
    with contextlib.suppress(RecipeError, OSError), hold(storage, Path("race.lock"), times=Times{TIMES!r}) as held:
        taken += 1
        for _ in range(random.randrange(1, 4)):
            value = int((storage.read_bytes(number) or b"0 ").split()[0])
            number.write_text(f"{{value + 1}} {{scratch}} {{taken}}")
            try:
                held.publish(number)
                published += 1
            except LostLockError:
                lost += 1
                break
            except OSError:
                doubtful += 1
                break
    time.sleep(random.random() * 0.1)
print(taken, published, lost, doubtful)
"""


def is_stopped(pid: int) -> bool:
    """Say whether a signal has stopped the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@pytest.mark.parametrize("store", ["moto", "folder"])
@pytest.mark.parametrize("kind", ["lock", "lease"])
def test_nobody_publishes_over_another(
    store_server: StoreServer,  # noqa: F811
    tmp_path: Path,
    kind: str,
    store: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds, folder = float(os.environ.get("RACE_SECONDS", "60")), tmp_path / "store"
    folder.mkdir()
    holders = []
    for number in range(HOLDERS):
        given = [store_server.uri(), str(tmp_path / str(number)), kind, str(seconds)]
        given.append(str(folder) if store == "folder" else "")
        holders.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, *given],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.getcwd()},
            )
        )
    draw, until, due, stops = random.Random(0), time.monotonic() + seconds + 60, {}, 0
    try:
        while any(holder.poll() is None for holder in holders):
            assert time.monotonic() < until
            time.sleep(0.02)
            for holder in holders:
                if is_stopped(holder.pid) and time.monotonic() >= due.setdefault(
                    holder.pid, time.monotonic() + draw.uniform(*STOP_SECONDS)
                ):
                    del due[holder.pid]
                    stops += 1
                    holder.send_signal(signal.SIGCONT)
        outputs = [holder.communicate()[0] for holder in holders]
    finally:
        for holder in holders:
            holder.kill()
    columns = zip(*(map(int, text.split()) for text in outputs), strict=True)
    taken, published, lost, doubtful = (sum(column) for column in columns)
    if store == "folder":
        last = (folder / "number").read_text()
    else:
        with store_server.filesystem().open_input_stream("records/runs/number") as stream:
            last = stream.read().decode()
    over = published - int(last.split()[0])
    with capsys.disabled():
        print(
            f"\n{kind}, {store}: taken {taken} times, {stops} stops; published {published}, of these over another's "
            f"{over}; {lost} held back, {doubtful} that the store did not answer"
        )
    assert taken > HOLDERS and published > taken / 2
    if kind == "lock":
        assert -doubtful <= over <= 0
