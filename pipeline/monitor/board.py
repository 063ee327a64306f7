"""Where workers tell their progress: one actor, which sets Ray's metrics by it and which the driver polls."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.monitor.metrics import ROW, progress_numbers
from pipeline.monitor.ray_metrics import Gauges

UNREAD = 10_000
"""Records the board keeps for a driver that does not ask; the oldest go first."""


@dataclass(frozen=True)
class ProgressRecord:
    """Holds a progress record as it came to the board."""

    at_ns: int
    """When, by the board's clock; no two are equal."""
    seed: int
    stage: str
    record: dict[str, Any]
    name: str
    """Of the seed's record."""


class Board:
    """Keeps the last progress record of every seed of every record, and those that the driver has not read."""

    def __init__(self, meanings: dict[str, str]) -> None:
        self.seeds: dict[tuple[str, int], dict[str, Any]] = {}
        self.unread: deque[ProgressRecord] = deque(maxlen=UNREAD)
        self.at_ns = 0
        self.gauges = Gauges(meanings)

    def put(self, name: str, seed: int, stage: str, record: dict[str, Any]) -> None:
        """Take a progress record of a seed of the record of this name, and set Ray's metrics by it."""
        self.seeds[name, seed] = {"stage": stage, **record}
        self.at_ns = max(self.at_ns + 1, time.time_ns())
        self.unread.append(ProgressRecord(self.at_ns, seed, stage, record, name))
        self.gauges.set(name, seed, stage, progress_numbers(stage, record))

    def row(self, name: str, seed: int, values: dict[str, float]) -> None:
        """Set Ray's metrics by what the seed's row holds by now."""
        self.gauges.set(name, seed, ROW, values)

    def read(self, after_ns: int = 0) -> tuple[dict[tuple[str, int], dict[str, Any]], list[ProgressRecord]]:
        """Return the last progress by record and seed, and all that came after this time; earlier is forgotten. An
        answer that is lost on its way is given again."""
        while self.unread and self.unread[0].at_ns <= after_ns:
            self.unread.popleft()
        return self.seeds, list(self.unread)


BoardActor = ray.remote(num_cpus=0, max_restarts=-1, resources={"node:__internal_head__": 0.001})(Board)
