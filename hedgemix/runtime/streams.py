"""Standard streams that whoever started the process has closed."""

from __future__ import annotations

import os
import sys


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
