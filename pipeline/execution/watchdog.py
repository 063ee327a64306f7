"""A watch over what a record's Ray cannot do without: a command that has lost it ends, and never stands still.

Ray itself waits for ever for a raylet that is gone, as a node may always come; the process that loses Ray's head it
ends after a minute, without a word to the person who gave the command.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

LOOK_SECONDS = 1.0
HEAD_SECONDS, OWN_HEAD_SECONDS = 45.0, 5.0
"""Seconds without an answer after which the head counts as lost: of a cluster, which may restart it (Ray gives up after
60), and of a Ray of this machine alone."""
GRACE_SECONDS = 10.0
"""For the main thread to end what it does; a question to a head that is gone it cannot leave."""
SIGNAL = signal.SIGUSR2


class RayLost(KeyboardInterrupt):
    """Ends the command as Ctrl-C does, with another word: nothing that retries may catch it."""


@contextmanager
def watched(look: Callable[[], str], give_up: Callable[[str], None], grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise RayLost in the main thread once `look` names what is lost (until then it returns an empty text); where that
    does not end the context within the grace, in seconds, call `give_up` with the same words from another thread. A
    context for the main thread."""
    ended, lost = Event(), ""

    def message() -> str:
        return f"{lost} was lost; give the same command again: it goes on from here"

    def watch() -> None:
        nonlocal lost
        while not ended.wait(LOOK_SECONDS):
            if lost := look():
                os.kill(os.getpid(), SIGNAL)
                if not ended.wait(grace):
                    give_up(message())
                return

    def stop(number: object, frame: object) -> None:
        if not ended.is_set():
            raise KeyboardInterrupt

    before = signal.signal(SIGNAL, stop)
    thread = Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:  # Ray's own calls raise a new one, of no other kind
        if lost:
            raise RayLost(message()) from None
        raise
    finally:
        ended.set()
        thread.join()
        signal.signal(SIGNAL, before)


class Parts:
    """Looks whether this machine's raylet runs, and whether the head answers."""

    def __init__(self, raylet_socket: str, head: str, head_seconds: float) -> None:
        """raylet_socket: the path that the raylet was started with. head: host:port. head_seconds: how long it may be
        silent."""
        self.raylet, self.head_seconds = raylet_process(raylet_socket), head_seconds
        host, _, port = head.rpartition(":")
        self.head, self.heard = (host.strip("[]"), int(port)), time.monotonic()

    def __call__(self) -> str:
        """Name what is lost, nothing otherwise."""
        if self.raylet and started(self.raylet[0]) != self.raylet[1]:
            return "this machine's raylet"
        with suppress(OSError), socket.create_connection(self.head, timeout=LOOK_SECONDS):
            self.heard = time.monotonic()
        return "Ray's head" if time.monotonic() - self.heard > self.head_seconds else ""


def raylet_process(raylet_socket: str) -> tuple[int, str] | None:
    """Find the process that was started with this socket: its number and when it started; None where it cannot be seen,
    as from another container."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[0].endswith("/raylet") and any(word.endswith(f"={raylet_socket}") for word in words):
                return int(folder.name), started(int(folder.name))
    return None


def started(pid: int) -> str:
    """Return when the process started, in the kernel's ticks; empty when it has ended, collected or not."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
