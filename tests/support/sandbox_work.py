"""What the tests of isolation do in its processes."""

from __future__ import annotations

import ctypes
import importlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def read(path: str, log: Any) -> str:
    log({"reading": path})
    return Path(path).read_text()


def read_descriptor(path: str, log: Any) -> str:
    return os.read(os.open(Path(path), os.O_RDONLY), 100).decode()


def read_in_c(path: str, log: Any) -> int:
    """The error number of an open() that Python does not see."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.open(path.encode(), os.O_RDONLY) < 0 else 0


def read_anyway(path: str, log: Any) -> str:
    """As code does that has a second way when a file is not there."""
    try:
        return Path(path).read_text()
    except OSError:
        return "none"


def write(path: str, log: Any) -> None:
    Path(path).write_text("written")


def remove(path: str, log: Any) -> None:
    os.remove(path)


def connect(path: str, log: Any) -> None:
    socket.create_connection(("127.0.0.1", 9), timeout=1)


def start(path: str, log: Any) -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def train(path: str, log: Any) -> None:
    importlib.import_module("hedgemix.train.trainer")


def keep(path: str, log: Any) -> str:
    """Use of the temporary folder."""
    file = Path(tempfile.mkdtemp()) / "note"
    file.write_text("kept")
    return file.read_text()


def die(path: str, log: Any) -> None:
    print("a last word", file=sys.stderr, flush=True)
    os._exit(3)


def talk(path: str, pipe: list[int], log: Any) -> list[str]:
    """Bids twice, and hears an answer to each."""
    heard = []
    for _ in range(2):
        os.write(pipe[0], b"bid")
        heard.append(os.read(pipe[1], 3).decode())
    return heard


def hang_up(path: str, pipe: list[int], log: Any) -> None:
    die(path, log)
