"""Copies of files to an object store while work goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread

from pipeline.storage.store import Storage

SMALL_BYTES = 2**20


@dataclass(frozen=True)
class PendingUpload:
    """Holds a file whose turn is to come."""

    path: Path
    data: bytes | None
    """A small file as it was when the uploader was called; None for one that is read when its turn comes."""


class Uploader:
    """Push files in the order in which they are named: a
    `hedgemix.runtime.files.OnFileWritten`, which any thread may call with a file and which returns at once.

    Small files go up as they were at the call, so a list of checkpoints is never up before the checkpoints it names; a
    file that was deleted before its turn is passed over. A file named again and again goes up every
    `interval_seconds`, and its last state on `close`. A failed push is tried again, and nothing after it goes first.
    Files pushed here and deleted here are removed from the store once everything else is up.
    """

    def __init__(self, storage: Storage, interval_seconds: float = 5.0, retry_seconds: float = 5.0) -> None:
        self.storage, self.interval_seconds, self.retry_seconds = storage, interval_seconds, retry_seconds
        self.failure = ""
        """Why the last push failed; empty when it did not."""
        self._queue: list[PendingUpload] = []
        self._uploaded_seconds: dict[Path, float] = {}
        """When each file went up last, by the monotonic clock."""
        self._pause_until = 0.0
        self._closing = False
        self._changed = Condition()
        self._thread: Thread | None = None

    def __call__(self, path: Path) -> None:
        if not self.storage.remote:
            return
        path = self.storage.local_path(path)
        try:
            small = path.stat().st_size <= SMALL_BYTES
            entry = PendingUpload(path, path.read_bytes() if small else None)
        except FileNotFoundError:
            return
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{path} was handed over after close")
            if self._queue and self._queue[-1].path == path:
                self._queue.pop()
            elif time.monotonic() < self._due_seconds(path):
                self._queue = [other for other in self._queue if other.path != path]
            self._queue.append(entry)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="uploader", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_seconds: float = 60.0) -> bool:
        """Push what is left, for so long, and say whether all of it is up. The end of the process still waits for a
        request that a silent store has not answered (46 s measured)."""
        with self._changed:
            self._closing, self._pause_until = True, 0.0
            self.retry_seconds = min(self.retry_seconds, 1.0)
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            return not self._thread.is_alive()
        return True

    def _due_seconds(self, path: Path) -> float:
        return self._uploaded_seconds.get(path, -self.interval_seconds) + self.interval_seconds

    def _next_due(self) -> PendingUpload | None:
        """Wait for the next entry whose time has come; None when closing and done."""
        with self._changed:
            while True:
                now = time.monotonic()
                due_seconds = [0.0 if self._closing else self._due_seconds(entry.path) for entry in self._queue]
                ready = [entry for entry, due in zip(self._queue, due_seconds, strict=True) if due <= now]
                if ready and now >= self._pause_until:
                    self._queue.remove(ready[0])
                    return ready[0]
                if self._closing and not self._queue:
                    return None
                self._changed.wait(max(self._pause_until, min(due_seconds)) - now if due_seconds else None)

    def _run(self) -> None:
        while (entry := self._next_due()) is not None:
            try:
                if entry.data is None:
                    self.storage.push(entry.path)
                else:
                    self.storage.write_bytes(entry.path, entry.data)
                self._uploaded_seconds[entry.path] = time.monotonic()
                self.failure = ""
                self._remove_deleted()
            except Exception as error:
                with self._changed:
                    if entry.path.exists():
                        self.failure = f"{type(error).__name__}: {error}"
                        self._pause_until = time.monotonic() + self.retry_seconds
                        self._queue.insert(0, entry)
                    self._drop_superseded()

    def _drop_superseded(self) -> None:
        """Drop what was deleted meanwhile, and all but the last state of each file: a list may go up only after the
        files it names, and after a failure, or a file passed over, only the last one surely does."""
        last: dict[Path, PendingUpload] = {}
        for entry in self._queue:
            last.pop(entry.path, None)
            if entry.path.exists():
                last[entry.path] = entry
        self._queue = list(last.values())

    def _remove_deleted(self) -> None:
        with self._changed:
            if self._queue:
                return
        for path in list(self._uploaded_seconds):
            if path.parent.is_dir() and not path.exists():
                self.storage.remove(path)
                del self._uploaded_seconds[path]
