"""What a command finds where it is started: standard streams, a terminal's width, the folder it is in."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


def settle() -> None:
    """Open standard streams that are closed, outlive a terminal that closes, and forget a terminal's width of 0, for
    which nothing would be printed. Ends the process, with exit code 2, in a folder that was removed: libraries that
    look for themselves from there end it with messages that nobody understands."""
    open_closed_streams()
    outlive_terminal()
    if os.environ.get("COLUMNS", "").strip() == "0":
        del os.environ["COLUMNS"]
    try:
        os.getcwd()
    except FileNotFoundError:
        print("error: the folder this shell is in was removed; change to one that is there", file=sys.stderr)
        raise SystemExit(2) from None


def open_closed_streams() -> None:
    """Open what is closed of stdin, stdout and stderr on nothing: the next file opened would get its number, and what
    is printed would be in that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest number free, which is this one
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


class Terminal(io.FileIO):
    """Writes to a terminal, and to nowhere once that is closed."""

    def write(self, data: Any) -> int:
        """Write bytes; says that all were written when nobody can see them any more."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """Let stdout and stderr fail no more when their terminal closes: a command that goes on then was told to, by nohup,
    disown or setsid."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.isatty():
            stream.flush()
            raw = Terminal(stream.fileno(), "w", closefd=False)
            buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
            lasting = io.TextIOWrapper(
                buffer, stream.encoding, stream.errors, line_buffering=True, write_through=stream.write_through
            )
            setattr(sys, name, lasting)
