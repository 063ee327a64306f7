"""One driver a record, and one process a step, whatever machine they run on."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hedgemix.config import RecipeError
from pipeline.storage.lease import DEFAULT, ConditionalLock, Held, Lease, Times, refusal_message
from pipeline.storage.store import Storage

BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def hold(
    storage: Storage,
    path: Path,
    waiting: Callable[[], None] = lambda: None,
    *,
    patient: bool = False,
    on_lost: Callable[[], None] = lambda: None,
    times: Times = DEFAULT,
) -> Iterator[Held]:
    """Hold the lock file `path`; yields what says whether it was lost, and publishes files only while it is not.

    In a folder it is an flock: a second holder is refused at once (a patient one waits), and a killed one's lock is
    free at once. In an object store it is an object besides, which its holder renews. One that is not renewed for a
    while is taken over; of one that may be alive we wait to see a renewal (calling `waiting` once). Raises
    RecipeError naming the host that holds it.

    `on_lost` is called, on another thread, when another has taken it over. A store that writes on no condition has the
    weaker `Lease`, and a patient holder there the flock alone.
    """
    storage.ready()
    local = storage.local_path(path)
    local.parent.mkdir(parents=True, exist_ok=True)
    with open(local, "a", encoding="utf-8") as file:
        if patient:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif not try_flock(file):
            raise RecipeError(refusal_message(storage, path))
        if not storage.remote or (patient and not storage.conditional):
            yield Held(storage)
            return
        if storage.conditional:
            lease: Lease = ConditionalLock(storage, path, times, place_of(file), patient, on_lost)
        else:
            lease = Lease(storage, path, times)
        lease.take(waiting)
        try:
            yield lease
        finally:
            lease.release()


def try_flock(file: IO[str], patience_seconds: float = 0.5) -> bool:
    """Take the lock, and say whether that went well; a status that tries it holds it for an instant, a driver until
    its end. Raises RecipeError where the file system has no locks."""
    until = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                raise RecipeError(
                    f"{file.name}: this file system has no locks ({error.strerror}), so that two drivers "
                    "would not see each other; give an --out on one that has"
                ) from None
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)


def place_of(file: IO[str]) -> str:
    """Name an open file as nobody else can while it is open: machine, its boot, device and inode. Who has its flock
    knows that an earlier holder of the same place is gone."""
    status = os.fstat(file.fileno())
    boot = BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else secrets.token_hex(16)
    return f"{socket.gethostname()} {boot} {status.st_dev} {status.st_ino}"
