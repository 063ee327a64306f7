"""What a Ray of this machine alone needs of it: a place for its sockets, one for its token, a home folder."""

from __future__ import annotations

import os
import pwd
import resource
import secrets
import shutil
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from hedgemix.config import RecipeError
from pipeline.storage.store import make_private_folder

SOCKET_CHARACTERS = 107
"""Most of the path of a socket in a folder, on Linux."""
BELOW = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray puts below its temporary folder, at its longest."""
SHORT = "/tmp"
FEWEST_FILES = 96
"""Files open at once, of which Ray's raylet had 72 in a record on two cores. With fewer it ends, and says something
else."""


LEAST_BYTES = 32 * 2**20
"""Room for what Ray writes beside its sockets: logs, and what does not fit the memory that processes share."""


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set in the environment what Ray's processes read from it, where this machine leaves them no choice. Raises
    RecipeError where no Ray can run."""
    check_limits()
    choose_folder(environment)
    check_room(temporary_folder(environment))
    choose_token(environment)
    choose_home(environment)
    if environment.get("PYTHONOPTIMIZE", "0") > "1":
        environment["PYTHONOPTIMIZE"] = "1"  # Ray's agent adds to its docstrings, and ends where there are none
    if "error" in environment.get("PYTHONWARNINGS", ""):
        environment["PYTHONWARNINGS"] = "default"  # which it would end with


def choose_folder(environment: MutableMapping[str, str]) -> None:
    """Have Ray's sockets in a short folder when TMPDIR's path is too long for them, or is none, and in one of this user
    when another keeps that one's to himself. Raises RecipeError when RAY_TMPDIR's is too long, or nothing can be
    written to the short one."""
    name = "RAY_TMPDIR" if environment.get("RAY_TMPDIR") else "TMPDIR"
    folder = environment.get(name) or SHORT
    if len(os.fsencode(folder)) + len(BELOW) <= SOCKET_CHARACTERS and writable(folder):
        if not free_for_ray(folder):
            environment["RAY_TMPDIR"] = str(private_folder())
        return
    problem = "is no folder that can be written to" if not writable(folder) else "is too long for the paths of sockets"
    if name == "RAY_TMPDIR" or not writable(SHORT):
        most = SOCKET_CHARACTERS - len(BELOW)
        raise RecipeError(f"{name} {folder} {problem}; set RAY_TMPDIR to a folder whose path has at most {most} bytes")
    environment["RAY_TMPDIR"] = SHORT if free_for_ray(SHORT) else str(private_folder())


def check_limits() -> None:
    """Raise RecipeError where a process may open too few files for Ray."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < FEWEST_FILES:
        raise RecipeError(
            f"a process may open {most} files here, and Ray takes {FEWEST_FILES}; raise it with ulimit -n"
        )


def temporary_folder(environment: Mapping[str, str]) -> str:
    """Return the folder in which Ray makes its own."""
    return environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or SHORT


def check_room(folder: str) -> None:
    """Raise RecipeError when the disk of Ray's folder is full: its processes would end, and not say why."""
    ray = Path(folder, "ray")
    if (left := shutil.disk_usage(ray if ray.exists() else folder).free) < LEAST_BYTES:
        raise RecipeError(
            f"{folder} has {left / 2**20:.0f} MiB left, and Ray takes {LEAST_BYTES / 2**20:.0f}; make room there, or "
            "set RAY_TMPDIR to another folder"
        )


def free_for_ray(folder: str) -> bool:
    """Say whether this user can use what Ray has, or makes, in the folder."""
    mine = Path(folder, "ray")
    return writable(mine) if mine.exists() else True


def private_folder() -> Path:
    """Make, if need be, a folder that nobody else reads and return it. Raises RecipeError."""
    folder = Path(SHORT, f"hedgemix-{os.getuid()}")
    make_private_folder(folder)
    return folder


def choose_token(environment: MutableMapping[str, str]) -> None:
    """Give Ray a token of this command's own where it could not keep one in the home folder. It is in the environment
    of this user's processes, and nowhere else."""
    if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return
    home = environment.get("HOME", "")
    kept = Path(home, ".ray", "auth_token")
    if home and (os.access(kept, os.R_OK) or writable(kept.parent if kept.parent.exists() else home)):
        return
    environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def choose_home(environment: MutableMapping[str, str]) -> None:
    """Give a user who has neither HOME nor a name, as in many containers, a home folder: Ray Train ends without."""
    try:
        named = bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        named = False
    if not environment.get("HOME") and not named:
        environment["HOME"] = str(private_folder())


def writable(folder: str | Path) -> bool:
    """Say whether it is a folder in which this user can make files."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
