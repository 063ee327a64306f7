"""One record at a time on a machine, whatever folder it writes to."""

from __future__ import annotations

import fcntl
import os
import pwd
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hedgemix.config import RecipeError

FOLDER = Path("/tmp")
"""The same for all commands of a machine: TMPDIR may differ between two shells, or two jobs of a scheduler."""


def lock_folder() -> Path:
    """Return the folder of machines' locks: HEDGEMIX_LOCKS, else FOLDER, else the temporary folder."""
    if named := os.environ.get("HEDGEMIX_LOCKS"):
        return Path(named)
    return FOLDER if os.access(FOLDER, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


@contextmanager
def machine_to_itself(waiting: Callable[[], None], beside: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold this machine among this user's records that each start a Ray of their own: timed training shares it with
    none of them. Calls `waiting` when there is another to wait for, and `beside` with the names of other users whose
    records are at work, which are not waited for. Raises RecipeError when another user made the lock."""
    folder = lock_folder()
    path = folder / f"hedgemix-{os.getuid()}.lock"
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; remove it, or set HEDGEMIX_LOCKS to a folder of yours") from None
    try:
        with suppress(OSError):
            os.fchmod(held, 0o644)  # others look at it, whatever this user's umask is
        if others := working_users(folder):
            beside(", ".join(others))
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror}; set HEDGEMIX_LOCKS to a folder that takes locks") from None
        yield
    finally:
        os.close(held)


def working_users(folder: Path) -> list[str]:
    """Name the other users who hold their lock in the folder now."""
    names = []
    for path in sorted(folder.glob("hedgemix-*.lock")):
        with suppress(OSError):  # gone meanwhile, or nobody else's to read
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(file)
                if stat.S_ISREG(status.st_mode) and status.st_uid != os.getuid() and is_held(file):
                    names.append(name_of(status.st_uid))
            finally:
                os.close(file)
    return names


def is_held(file: int) -> bool:
    """Say whether somebody holds the lock, by trying it for an instant."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def name_of(uid: int) -> str:
    """Return the user's name; the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
