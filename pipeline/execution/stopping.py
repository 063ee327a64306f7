"""Ctrl-C, SIGTERM and the end of the terminal: from a command's first line to its last they end it with exit code 130
and no traceback.

Imports next to nothing: it is there before the imports that take seconds.
"""

from __future__ import annotations

import os
import signal
import sys

CODE = 130
STOPPED = "stopped; the same command goes on from here"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_on_signals(message: str = STOPPED) -> None:
    """End the process at once, with this message, when a signal comes; nothing that needs care has begun yet. A
    KeyboardInterrupt that nobody catches later ends it as quietly. A signal that is ignored, as of a job in a shell's
    background or under nohup, stays so."""

    def end(number: object, frame: object) -> None:
        try:
            os.write(2, f"{message}\n".encode())
        finally:
            os._exit(CODE)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    sys.excepthook = _hook


def raise_on_signals() -> None:
    """Raise KeyboardInterrupt in the main thread when a signal comes, from now on: what was begun is ended with
    care."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _hook(kind, error, trace) -> None:  # type: ignore[no-untyped-def]
    if issubclass(kind, KeyboardInterrupt):
        os._exit(CODE)  # who caught the first has said so
    sys.__excepthook__(kind, error, trace)
