"""Who holds a lock: in a folder, in an object store that writes on a condition, and in one that does not."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Any, NamedTuple

from hedgemix.config import RecipeError
from pipeline.storage.store import Storage

PUBLISH_ATTEMPTS = 3
"""Of a file that another, who needs no lock for it, writes at the same time."""


class Times(NamedTuple):
    """Holds how a lock's object is kept."""

    renew_seconds: float = 5.0
    """From renewal to renewal."""
    stale_seconds: float = 20.0
    """Without a renewal, after which its holder is taken for dead."""
    settle_seconds: float = 2.0
    """From the write of a `Lease` until it is read back."""


DEFAULT = Times()


class LostLockError(OSError):
    """Tells that another holds the lock by now."""


class Held:
    """Stands for a lock while it is held. This is a folder's: the process and its flock end together."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def lost(self) -> bool:
        """Say whether another is known to hold it; asks nobody."""
        return False

    def publish(self, path: Path) -> None:
        """Push a small file, whole or not at all. Raises LostLockError, and leaves what is there, when another holds
        the lock by then."""
        self.storage.push(path)


class Lease(Held):
    """Holds the lock's object, JSON of: owner (a random token; "" of one that was given back), host, place (of the
    file whose flock its holder has, on its machine), turn (raised with each renewal).

    This is weaker than a lock, and for stores that write on no condition: who wrote waits and reads back. Two at once
    cannot both go on unless a machine stands still between two requests for longer than that; then one of them sees
    `lost` at its next renewal, and until it stops both run.
    """

    def __init__(self, storage: Storage, path: Path, times: Times = DEFAULT, place: str = "") -> None:
        super().__init__(storage)
        self.path, self.times = path, times
        self.token = secrets.token_hex(8)
        self.own: dict[str, Any] = {"owner": self.token, "host": socket.gethostname(), "place": place, "turn": 0}
        self._lost, self._done = Event(), Event()
        self._renewing = Thread(target=self._renew, name="lease", daemon=True)

    def lost(self) -> bool:
        """Say whether a renewal has found it to be another's."""
        return self._lost.is_set()

    def publish(self, path: Path) -> None:
        """Push a small file, unless the last renewal has found the lease to be another's: LostLockError."""
        if self.lost():
            raise LostLockError(refusal_message(self.storage, self.path))
        super().publish(path)

    def read(self) -> dict[str, Any] | None:
        """Return what the object holds: {} when it is damaged, None when it is not there."""
        return parse(self.storage.read_bytes(self.path))

    def write(self) -> None:
        """Renew the lease, whoever holds it."""
        self.own["turn"] += 1
        self.storage.write_bytes(self.path, json.dumps(self.own).encode())

    def owned(self) -> bool:
        """Say whether the lock's object is this lease's own."""
        content = self.read()
        return content is not None and content.get("owner") == self.token

    def refused(self, holder: dict[str, Any] | None) -> RecipeError:
        """Make the error that names the holder's host."""
        return RecipeError(refusal_message(self.storage, self.path, str((holder or {}).get("host", ""))))

    def take(self, waiting: Callable[[], None]) -> None:
        """Write the lease once nobody holds it, and renew it from then on. Raises RecipeError when another does."""
        seen = self.read()
        if seen is not None and not is_free(seen) and (left := self.times.stale_seconds - self.age()) > 0:
            waiting()
            until = time.monotonic() + left
            while time.monotonic() < until:
                time.sleep(min(self.times.renew_seconds / 4, 1.0))
                now = self.read()
                if now is None or is_free(now):
                    break
                if now != seen:
                    raise self.refused(now)
        began = time.monotonic()
        now = self.read()
        if not (now is None or is_free(now) or now == seen):
            raise self.refused(now)
        self.write()
        # Slower than the others wait: we may have overwritten one that went on, and it has to notice first.
        slow = time.monotonic() - began >= self.times.settle_seconds
        time.sleep(self.times.stale_seconds if slow else self.times.settle_seconds)
        if not self.owned():
            raise self.refused(self.read())
        if slow:
            self.write()  # the wait has made it look like a dead one's
        self._renewing.start()

    def age(self) -> float:
        """Return the seconds since the lease was written, both ends by the store's clock: its age beside a new
        object's."""
        trial = self.path.with_name(f".{self.path.name}.{self.token}")
        self.storage.write_bytes(trial, b"now")
        now, then = self.storage.modified(trial), self.storage.modified(self.path)
        self.storage.remove(trial)
        return 0.0 if now is None or then is None else now - then

    def _renew(self) -> None:
        while not self._done.wait(self.times.renew_seconds):
            with contextlib.suppress(OSError):  # the next renewal may reach the store
                if not self.renew():
                    return

    def renew(self) -> bool:
        """Write the lease again unless it is another's; says whether it is still held."""
        content = self.read()
        if content is not None and content.get("owner") != self.token:
            self._lost.set()
            return False
        self.write()
        return True

    def release(self) -> None:
        """Give it back; one that cannot be goes stale by itself."""
        self._done.set()
        self._renewing.join(30)
        with contextlib.suppress(OSError):
            if not self._renewing.is_alive():
                self.give_back()

    def give_back(self) -> None:
        """Remove the lock's object if it is this lease's own."""
        if self.owned():
            self.storage.remove(self.path)


class ConditionalLock(Lease):
    """Holds the lock's object by compare and swap: each write names the version that it replaces, so of all that take,
    renew, take over and give back at once, one goes on, whoever stands still for how long.

    A holder that stood still may be replaced, as it cannot be told from a dead one. It learns of it before it publishes
    anything: `publish` reads what it replaces, then renews the lock, then writes if that is still what it read. Who
    took the lock before the renewal has made that fail; what was published since the renewal makes the write fail.
    """

    def __init__(
        self, storage: Storage, path: Path, times: Times, place: str, patient: bool, on_lost: Callable[[], None]
    ) -> None:
        super().__init__(storage, path, times, place)
        self.patient, self.on_lost = patient, on_lost
        self._tag: str | None = None
        self._writing = RLock()

    def read(self) -> dict[str, Any] | None:
        """Return what the object holds, in one request: {} when it is damaged, None when it is not there."""
        version = self.storage.read_version(self.path)
        return parse(version.data) if version else None

    def swap(self) -> bool:
        """Write the lease in place of the version that is known; says whether it was that one."""
        self.own["turn"] += 1
        data = json.dumps(self.own).encode()
        tag = self.storage.put_if(self.path, data, self._tag)
        if tag is None:
            # A write that the store seemed to have failed may be there all the same.
            now = self.storage.read_version(self.path)
            if now is not None and (parse(now.data) or {}).get("owner") == self.token:
                tag = self.storage.put_if(self.path, data, now.tag)
        self._tag = tag or self._tag
        return tag is not None

    def take(self, waiting: Callable[[], None]) -> None:
        """Write the lease once nobody holds it, and renew it from then on; a patient one waits for who does. Raises
        RecipeError when another does."""
        seen, until = "", 0.0
        while True:
            version = self.storage.read_version(self.path)
            holder = parse(version.data) if version else None
            self._tag = version.tag if version else None
            # Of the same place, its flock is ours now: who had it on this machine is gone.
            free = holder is None or is_free(holder) or holder.get("place") == self.own["place"]
            if not free and self._tag != seen:
                if seen and not self.patient:
                    raise self.refused(holder)
                # Its age when we came is by the store's clock; what is written while we look on ages by ours.
                left = self.times.stale_seconds - (0.0 if seen else self.age())
                if not seen and left > 0:
                    waiting()
                seen, until = str(self._tag), time.monotonic() + left
            if not free and time.monotonic() < until:
                time.sleep(min(self.times.renew_seconds / 4, 1.0))
            elif self.swap():
                break
            elif not self.patient:
                raise self.refused(self.read())
        self._renewing.start()

    def renew(self) -> bool:
        """Write the lease again unless it is another's; says whether it is still held."""
        with self._writing:
            if not self._lost.is_set() and not self.swap():
                self._lost.set()
                if not self._done.is_set():
                    self.on_lost()
            return not self._lost.is_set()

    def publish(self, path: Path) -> None:
        """Push a small file as the class says. Raises LostLockError when the lock is another's."""
        data = self.storage.local_path(path).read_bytes()
        for _ in range(PUBLISH_ATTEMPTS):
            before = self.storage.read_version(path)
            if not self.renew():
                break
            if self.storage.put_if(path, data, before.tag if before else None) is not None:
                return
        raise LostLockError(refusal_message(self.storage, self.path))

    def give_back(self) -> None:
        """Leave the object as one that nobody holds: removing it could remove the next holder's."""
        self.own["owner"] = ""
        with self._writing:
            self.swap()


def parse(data: bytes | None) -> dict[str, Any] | None:
    """Read a lock's object: {} when it is damaged, None when it is not there."""
    try:
        content = None if data is None else json.loads(data)
    except ValueError:
        content = {}
    return content if content is None or isinstance(content, dict) else {}


def is_free(holder: dict[str, Any]) -> bool:
    """Say whether the lock's object was given back."""
    return holder.get("owner") == ""


def refusal_message(storage: Storage, path: Path, host: str = "") -> str:
    """Say that another driver holds the record, and what to do."""
    on_host = f", on {host}" if host else ""
    return f"another driver is at work on this record ({storage.where(path.parent)}{on_host}); wait for it or stop it"
