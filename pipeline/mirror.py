"""Copies of files to an object store while work goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread

from pipeline.storage import Storage

SMALL_BYTES = 2**20


@dataclass(frozen=True)
class Entry:
    path: Path
    data: bytes | None
    """A small file as it was when it was told of; None for one that is read when its turn comes."""


class Mirror:
    """A `hedgemix.checkpoint.Kept`: told of a file, on any thread, it returns at once, and one thread pushes in order.

    Small files go up as they were when told of, so a list of checkpoints is never up before the checkpoints it names;
    a file that was deleted before its turn is passed over. A file told of again and again goes up every
    `interval_seconds`, and its last state on `close`. A failed push is tried again, and nothing after it goes first.
    Files pushed here and deleted here are removed from the store once everything else is up.
    """

    def __init__(self, storage: Storage, interval_seconds: float = 5.0, retry_seconds: float = 5.0) -> None:
        self.storage, self.interval_seconds, self.retry_seconds = storage, interval_seconds, retry_seconds
        self.failure = ""
        """Why the last push failed; empty when it did not."""
        self._queue: list[Entry] = []
        self._sent: dict[Path, float] = {}
        self._pause_until = 0.0
        self._closing = False
        self._changed = Condition()
        self._thread: Thread | None = None

    def __call__(self, path: Path) -> None:
        if not self.storage.remote:
            return
        path = self.storage.root / self.storage.inside(path)
        try:
            small = path.stat().st_size <= SMALL_BYTES
            entry = Entry(path, path.read_bytes() if small else None)
        except FileNotFoundError:
            return
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{path} was told of after close")
            if self._queue and self._queue[-1].path == path:
                self._queue.pop()
            elif time.monotonic() < self._due(path):
                self._queue = [other for other in self._queue if other.path != path]
            self._queue.append(entry)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_seconds: float = 60.0) -> bool:
        """Push what is left, for so long; whether all of it is up. The end of the process still waits for a request
        that a silent store has not answered (46 s measured)."""
        with self._changed:
            self._closing, self._pause_until = True, 0.0
            self.retry_seconds = min(self.retry_seconds, 1.0)
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            return not self._thread.is_alive()
        return True

    def _due(self, path: Path) -> float:
        return self._sent.get(path, -self.interval_seconds) + self.interval_seconds

    def _take(self) -> Entry | None:
        """The next entry whose time has come; None when closing and done."""
        with self._changed:
            while True:
                now = time.monotonic()
                times = [0.0 if self._closing else self._due(entry.path) for entry in self._queue]
                ready = [entry for entry, due in zip(self._queue, times, strict=True) if due <= now]
                if ready and now >= self._pause_until:
                    self._queue.remove(ready[0])
                    return ready[0]
                if self._closing and not self._queue:
                    return None
                self._changed.wait(max(self._pause_until, min(times)) - now if times else None)

    def _run(self) -> None:
        while (entry := self._take()) is not None:
            try:
                if entry.data is None:
                    self.storage.push(entry.path)
                else:
                    self.storage.write_bytes(entry.path, entry.data)
                self._sent[entry.path] = time.monotonic()
                self.failure = ""
                self._sweep()
            except Exception as error:
                with self._changed:
                    if entry.path.exists():
                        self.failure = f"{type(error).__name__}: {error}"
                        self._pause_until = time.monotonic() + self.retry_seconds
                        self._queue.insert(0, entry)
                    self._compact()

    def _compact(self) -> None:
        """What was deleted meanwhile goes, and all but the last state of each file: a list may go up only after the
        files it names, and after a failure, or a file passed over, only the last one surely does."""
        last: dict[Path, Entry] = {}
        for entry in self._queue:
            last.pop(entry.path, None)
            if entry.path.exists():
                last[entry.path] = entry
        self._queue = list(last.values())

    def _sweep(self) -> None:
        with self._changed:
            if self._queue:
                return
        for path in list(self._sent):
            if path.parent.is_dir() and not path.exists():
                self.storage.remove(path)
                del self._sent[path]
