"""A file of JSON lines, one for each number from 0 on, that a reader finds whole and in order.

A write that storage refuses is made up for with the next one, and what it left of a line is cut off: a disk that is
full for a moment costs nothing. Only `flush` raises, when all is done or a checkpoint is about to rely on it.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class Lines:
    """Holds the lines of the chunks of one evaluation. The first write replaces the file, unless `take_up` kept
    some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written_bytes = 0
        """Up to here the file is ours."""
        self.waiting = b""

    def take_up(self, count: int) -> bool:
        """Keep the first `count` lines that an earlier start wrote, whatever comes after them; False when they are not
        all there."""
        try:
            kept = self.path.read_bytes().splitlines(keepends=True)[:count]
        except FileNotFoundError:
            kept = []
        if [chunk_of(line) for line in kept] != list(range(count)):
            return False
        self.written_bytes = sum(map(len, kept))
        return True

    def add(self, line: dict[str, Any]) -> None:
        """Add a chunk's line."""
        self.waiting += json.dumps(line).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Write what waits; sync: also survive a power cut. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if os.fstat(file.fileno()).st_size < self.written_bytes:
                raise OSError(f"{self.path} was cut short by another program; run again")
            file.truncate(self.written_bytes)
            file.write(self.waiting)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self.written_bytes += len(self.waiting)
        self.waiting = b""


def chunk_of(line: bytes) -> int | None:
    """Read the line's number; None for one that was cut off or damaged."""
    try:
        return int(json.loads(line)["chunk"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
