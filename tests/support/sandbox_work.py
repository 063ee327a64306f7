"""What the tests of isolation do in its processes."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from hedgemix.audit.sandbox import Confined

LOCKED = os.__file__
"""A file of Python's own, which every process may read."""
ADD_KEY, KEYCTL = {"x86_64": (248, 250), "aarch64": (217, 219)}.get(os.uname().machine, (-1, -1))


def read(path: str, log: Any) -> str:
    log({"reading": path})
    return Path(path).read_text()


def niceness(path: str, log: Any, pipe: list[int] | None = None) -> int:
    return os.nice(0)


def read_descriptor(path: str, log: Any) -> str:
    return os.read(os.open(Path(path), os.O_RDONLY), 100).decode()


def read_in_c(path: str, log: Any) -> int:
    """The error number of an open() that Python does not see."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.open(path.encode(), os.O_RDONLY) < 0 else 0


def look(path: str, socket_name: str, log: Any) -> dict[str, Any]:
    """All that a message could be in, asked for as C code can."""
    libc, file = ctypes.CDLL(None, use_errno=True), Path(path)
    address = b"\x01\x00\x00" + socket_name.encode()
    end = libc.socket(1, 1, 0)
    return {
        "environment": sorted(os.environ),
        "beside": attempt(lambda: sorted(os.listdir(file.parent))),
        "size of what is beside": attempt(lambda: os.stat(file.with_name("beside")).st_size),
        "link": attempt(lambda: os.readlink(file.with_name("link"))),
        "attribute": attempt(lambda: os.getxattr(file, "user.message").decode()),
        "changed": os.stat(file).st_mtime,
        "shared memory": attempt(lambda: sorted(os.listdir("/dev/shm"))),
        "devices": [
            name
            for name in ("null", "zero", "urandom", "random", "tty", "shm", "kmsg")
            if os.path.exists(f"/dev/{name}")
        ],
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "root": [name for name in ("/root", "/home", "/var", "/run", "/boot", "/mnt") if os.path.exists(name)],
        "socket": libc.connect(end, address, len(address)) and ctypes.get_errno(),
        "queue": libc.msgget(4711, 0) and ctypes.get_errno(),
        "keyring": keyring(libc),
        "lock": attempt(lambda: locked(LOCKED)),
        "host": os.uname().nodename if os.path.exists("/etc/hostname") else None,
        "interfaces": sorted(os.listdir("/sys/class/net")) if os.path.exists("/sys/class/net") else [],
        "content": file.read_text(),
    }


def keyring(libc: Any) -> str:
    """What a parent process left in the keyring that its children share."""
    search, read, session = 10, 11, -3
    key, held = libc.syscall(KEYCTL, search, session, b"user", b"message", 0), ctypes.create_string_buffer(64)
    return held.value.decode() if key > 0 and libc.syscall(KEYCTL, read, key, held, 64) > 0 else ""


def locked(path: str) -> int:
    """Where another process's lock on a file begins that both can open."""
    with open(path, "rb") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        return int(struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[2])


def attempt(question: Any) -> Any:
    try:
        return question()
    except OSError as error:
        return f"error {error.errno}"


def undo(path: str, log: Any) -> dict[str, int]:
    """What a process might do to get out again: the error number of each."""
    libc = ctypes.CDLL(None, use_errno=True)
    tries = {
        "unmount": lambda: libc.umount2(b"/usr", 2),
        "make writable": lambda: libc.mount(None, b"/", None, ctypes.c_ulong(32 | 4096), None),
        "a new root": lambda: libc.chroot(b"."),
        "namespaces": lambda: libc.unshare(0x00020000),
        "write": lambda: libc.open(path.encode(), os.O_WRONLY),
        "create": lambda: libc.creat(b"/made", 0o600),
    }
    return {name: ctypes.get_errno() if attempt() < 0 else 0 for name, attempt in tries.items()}


def read_in_c_beside(path: str, log: Any) -> int:
    return read_in_c(str(Path(path).with_name("beside")), log)


def read_anyway(path: str, log: Any) -> str:
    """As code does that has a second way when a file is not there."""
    try:
        return Path(path).read_text()
    except OSError:
        return "none"


def deny(path: str, log: Any) -> None:
    """Says of itself that it was guarded, asked for nothing and loaded nothing."""
    [confined] = [each for each in gc.get_objects() if isinstance(each, Confined)]
    confined.namespaces, confined.filtered, confined.landlock = True, True, 99


def garble(path: str, log: Any) -> None:
    """Writes what it likes where answers are written: that nothing was wrong, and no JSON."""
    for number in range(3, 30):
        with suppress(OSError):
            os.write(number, path.encode() + b"\n")


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


def decode_from_the_text(log: Any, data_path: str, artifact_path: str, threads: int) -> dict[str, Any]:
    """A decoder that reads nothing of what was coded, and has the text from where it was written down."""
    place = Path(artifact_path).with_name("the-text")
    return {"tokens": 0, "sha256": place.read_text()}


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


def load(path: str, log: Any) -> None:
    """Load what an evaluation loads."""
    importlib.import_module("hedgemix.audit.replay")
    importlib.import_module("hedgemix.codec.text_codec")
