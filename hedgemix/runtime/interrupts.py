"""Work inside a library's call, during which Python answers no signal."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Value = TypeVar("Value")


def interruptible(work: Callable[[], Value]) -> Value:
    """Do the work in a thread of its own and return its value, or raise what it raises. The main thread, which alone
    hears of signals and only between two of its own instructions, waits meanwhile, and a wait a signal ends at once.
    The work then goes on until it is done or the process ends."""
    return ThreadPoolExecutor(1).submit(work).result()
