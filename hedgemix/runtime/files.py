"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

FIXES = {
    errno.ENOENT: "name one that is there",
    errno.EACCES: "permit it, or name another place",
    errno.EPERM: "permit it, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: "make room, and run the same command again",
    errno.EDQUOT: "make room, and run the same command again",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a folder where one is needed",
    errno.EEXIST: "name another place",
    errno.ENAMETOOLONG: "shorten the name",
}
"""What to do about the errors that a person's choice of a place can have."""

OnFileWritten = Callable[[Path], None]
"""Told of every file a restart needs, each time it is whole on disk; on any thread, in the order they are needed."""


def no_copy(path: Path) -> None:
    """Keep no copy."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends well, and leaves no trace when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        with open(beside, "xb") as file:  # never through a link that another left under this name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno:  # a write's: which, nobody would know
            error.filename = str(path)
        raise


def told(error: OSError) -> str:
    """Say what went wrong with which file, and what to do where that is known, in a line."""
    if error.errno not in FIXES:
        return str(error)
    return f"{error.filename or 'a file'}: {error.strerror}; {FIXES[error.errno]}"


def check_new(path: Path) -> None:
    """Raise FileExistsError when a file to be made is there already, and OSError when it cannot be made: before the
    work that it is to hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb"):
        pass
    path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a value of JSON types as a whole file."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a file of JSON; raises OSError, or ValueError for what is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Hash a file's bytes: SHA-256, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, value: Any) -> None:
    """Write nested dicts and lists of tensors and numbers as a whole file."""
    import torch  # seconds, which files of other kinds do without

    with replacing(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # of a write that failed torch only tells where it was
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class DamagedFileError(ValueError):
    """Tells that a file of ours cannot be read back."""


def load_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """Load what `save_tensors` wrote; only tensors and plain containers are ever unpickled. Raises DamagedFileError."""
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file cut short or overwritten
        raise DamagedFileError(f"{path} is damaged ({type(error).__name__}); remove its folder and run again") from None


Log = Callable[[dict[str, Any]], None]
"""Receives one record of progress: plain JSON types."""


def silent(record: dict[str, Any]) -> None:
    """Log nothing."""
