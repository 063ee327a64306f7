"""What a service that tracks records has to do."""

from __future__ import annotations

import os
from typing import Protocol


class Tracker(Protocol):
    """Passes a record on to one service. `position` rises while a stage runs, and falls when lost work is done again:
    what then was told from there on must not stand twice. Called by one thread."""

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        """Take the values of a seed's stage at a position, told at `at_seconds` since 1970."""

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        """Take the row of a seed that is finished, well or not."""

    def flush(self) -> None:
        """Pass on what came since."""

    def close(self) -> None:
        """End with the driver; seeds without a row are not finished."""


def variable(name: str, otherwise: str) -> str:
    """Read an environment variable; `otherwise` when it is not set, or empty."""
    return os.environ.get(name) or otherwise
