"""Where the files of a record outlive the machine that makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hedgemix.checkpoint import Kept, nothing


@dataclass(frozen=True)
class Storage:
    uri: str
    root: Path

    def push(self, path: Path) -> None: ...

    def pull(self, path: Path) -> bool:
        return path.exists()

    def read_bytes(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except OSError:
            return None

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def names(self, folder: Path) -> dict[str, int]:
        return {}

    @contextmanager
    def mirror(self) -> Iterator[Kept]:
        yield nothing
