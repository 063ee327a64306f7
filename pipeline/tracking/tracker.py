"""What a service that tracks records has to do."""

from __future__ import annotations

import os
from typing import Protocol


class Tracker(Protocol):
    """One service. `position` rises while a stage runs, and falls when lost work is done again: what then was told from
    there on must not stand twice. Called by one thread."""

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None: ...

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        """The seed is finished, well or not."""

    def flush(self) -> None:
        """Pass on what came since."""

    def close(self) -> None:
        """The driver ends; seeds without a row are not finished."""


def variable(name: str, otherwise: str) -> str:
    return os.environ.get(name) or otherwise
