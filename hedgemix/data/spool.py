"""Documents on disk: written once, read as often as needed, in memory while they are few."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile

HELD_BYTES = 1 << 26
"""More than this goes to a file."""
LENGTH_BYTES = 8


class Spool:
    """Holds documents in order. Those of more than `held_bytes` lie in a file without a name in `folder` (the system's
    temporary one by default): it is gone with this object, however the process ends."""

    def __init__(self, folder: str | Path | None = None, held_bytes: int = HELD_BYTES) -> None:
        self._file = SpooledTemporaryFile(held_bytes, dir=str(folder) if folder else None)  # noqa: SIM115
        self._end = self._count = 0

    def add(self, document: bytes) -> None:
        """Append a document; all are added before one is read. Raises OSError, naming the file, when the disk is
        full."""
        self._file.write(len(document).to_bytes(LENGTH_BYTES, "little") + document)
        self._end += LENGTH_BYTES + len(document)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all documents."""
        return self._end - LENGTH_BYTES * self._count

    def read(self) -> Iterator[bytes]:
        """Give the documents back, in order."""
        at = 0
        while at < self._end:
            self._file.seek(at)  # another may read at the same time
            size = int.from_bytes(self._file.read(LENGTH_BYTES), "little")
            yield self._file.read(size)
            at += LENGTH_BYTES + size

    def __iter__(self) -> Iterator[str]:
        return (document.decode() for document in self.read())
