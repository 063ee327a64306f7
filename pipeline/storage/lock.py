"""One driver a record, whatever machine it runs on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any

from hedgemix.config import RecipeError
from pipeline.storage.store import Storage


@contextmanager
def hold(
    storage: Storage,
    path: Path,
    waiting: Callable[[], None] = lambda: None,
    renew_seconds: float = 5.0,
    stale_seconds: float = 20.0,
    settle_seconds: float = 2.0,
) -> Iterator[Callable[[], bool]]:
    """Hold the lock file `path`; yields `lost`, which says whether another has taken it meanwhile.

    In a folder it is an flock: a second driver is refused at once, and a killed one's lock is free at once. In an
    object store it is a lease as well, an object that its holder rewrites every `renew_seconds`. One that is not
    renewed for `stale_seconds` is taken over; of one that may be alive we wait to see a renewal (calling `waiting`
    once). Raises RecipeError naming the host that holds it.

    A lease is weaker than a lock: the store cannot compare and swap through pyarrow, so who wrote waits
    `settle_seconds` and reads back. Two at once cannot both go on unless a machine stands still between two requests
    for longer than that; then one of them sees `lost` at its next renewal, and until it stops both run. A holder that
    cannot reach the store for `stale_seconds` may be taken for dead while it works; it sees `lost` when it can again.
    """
    storage.ready()
    local = storage.local_path(path)
    local.parent.mkdir(parents=True, exist_ok=True)
    with open(local, "a", encoding="utf-8") as file:
        if not try_flock(file):
            raise RecipeError(refusal_message(storage, path))
        if not storage.remote:
            yield lambda: False
            return
        lease = Lease(storage, path, renew_seconds)
        lease.take(waiting, stale_seconds, settle_seconds)
        try:
            yield lease.lost.is_set
        finally:
            lease.release()


def try_flock(file: IO[str], patience_seconds: float = 0.5) -> bool:
    """Take the lock, and say whether that went well; a status that tries it holds it for an instant, a driver until
    its end."""
    until = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)


def refusal_message(storage: Storage, path: Path, host: str = "") -> str:
    """Say that another driver holds the record, and what to do."""
    on_host = f", on {host}" if host else ""
    return f"another driver is at work on this record ({storage.where(path.parent)}{on_host}); wait for it or stop it"


class Lease:
    """Holds the lock's object, JSON of: owner (a random token), host, turn (raised with each renewal)."""

    def __init__(self, storage: Storage, path: Path, renew_seconds: float) -> None:
        self.storage, self.path, self.renew_seconds = storage, path, renew_seconds
        self.own: dict[str, Any] = {"owner": secrets.token_hex(8), "host": socket.gethostname(), "turn": 0}
        self.lost = Event()
        self._done = Event()
        self._renewing = Thread(target=self._renew, name="lease", daemon=True)

    def read(self) -> dict[str, Any] | None:
        """Return what the object holds: {} when it is damaged, None when it is not there."""
        data = self.storage.read_bytes(self.path)
        try:
            content = None if data is None else json.loads(data)
        except ValueError:
            content = {}
        return content if content is None or isinstance(content, dict) else {}

    def write(self) -> None:
        """Renew the lease, whoever holds it."""
        self.own["turn"] += 1
        self.storage.write_bytes(self.path, json.dumps(self.own).encode())

    def owned(self) -> bool:
        """Say whether the lock's object is this lease's own."""
        content = self.read()
        return content is not None and content.get("owner") == self.own["owner"]

    def refused(self, holder: dict[str, Any] | None) -> RecipeError:
        """Make the error that names the holder's host."""
        return RecipeError(refusal_message(self.storage, self.path, str((holder or {}).get("host", ""))))

    def take(self, waiting: Callable[[], None], stale_seconds: float, settle_seconds: float) -> None:
        """Write the lease once nobody holds it, and renew it from then on. Raises RecipeError when another does."""
        seen = self.read()
        if seen is not None and (left := stale_seconds - self.age()) > 0:
            waiting()
            until = time.monotonic() + left
            while time.monotonic() < until:
                time.sleep(min(self.renew_seconds / 4, 1.0))
                now = self.read()
                if now is None:
                    break
                if now != seen:
                    raise self.refused(now)
        began = time.monotonic()
        if (now := self.read()) not in (None, seen):
            raise self.refused(now)
        self.write()
        # Slower than the others wait: we may have overwritten one that went on, and it has to notice first.
        slow = time.monotonic() - began >= settle_seconds
        time.sleep(stale_seconds if slow else settle_seconds)
        if not self.owned():
            raise self.refused(self.read())
        if slow:
            self.write()  # the wait has made it look like a dead one's
        self._renewing.start()

    def age(self) -> float:
        """Return the seconds since the lease was written, both ends by the store's clock: its age beside a new
        object's."""
        trial = self.path.with_name(f".{self.path.name}.{self.own['owner']}")
        self.storage.write_bytes(trial, b"now")
        now, then = self.storage.modified(trial), self.storage.modified(self.path)
        self.storage.remove(trial)
        return 0.0 if now is None or then is None else now - then

    def _renew(self) -> None:
        while not self._done.wait(self.renew_seconds):
            with contextlib.suppress(OSError):  # the next renewal may reach the store
                content = self.read()
                if content is not None and content.get("owner") != self.own["owner"]:
                    self.lost.set()
                    return
                self.write()

    def release(self) -> None:
        """Give it back; one that cannot be goes stale by itself."""
        self._done.set()
        self._renewing.join(30)
        with contextlib.suppress(OSError):
            if not self._renewing.is_alive() and self.owned():
                self.storage.remove(self.path)
