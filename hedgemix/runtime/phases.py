"""How long the phases of a work take, without waiting for the device at each of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Phases:
    """Adds up the seconds of each phase. A GPU is behind its host: there the device's own events take the time, and
    `settle` waits for them."""

    def __init__(self, seconds: dict[str, float], device: torch.device, event: Callable[[], Any] | None = None) -> None:
        """seconds: what is added to, by phase. event: makes a torch.cuda.Event, or what is like it."""
        self.seconds = seconds
        self.event = event or (partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else None)
        self.running: list[tuple[str, Any, Any]] = []

    def timed(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do the work, its time taken, and return what it gives."""
        if self.event is None:
            start = time.monotonic()
            value = work()
            self.seconds[phase] += time.monotonic() - start
            return value
        began, ended = self.event(), self.event()
        began.record()
        value = work()
        ended.record()
        self.running.append((phase, began, ended))
        return value

    def settle(self) -> None:
        """Add the seconds of what was timed since the last call, once the device has done it."""
        for phase, began, ended in self.running:
            ended.synchronize()
            self.seconds[phase] += began.elapsed_time(ended) / 1000
        self.running = []
