"""The seconds a piece of work has used, over all its starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hedgemix.runtime.files import OnFileWritten, no_copy, read_json, write_json

BEAT_SECONDS = 1.0
FIELDS = ("elapsed_seconds", "starts", "discarded_seconds", "lost_seconds")


def no_notice() -> bool:
    """Say that no notice came."""
    return False


class Clock:
    """Notes on disk every second, on rank 0, what was used, so that a killed run cannot win back the time since its
    last checkpoint. `clock.json`: elapsed_seconds (used, over restarts), starts, discarded_seconds (used before the
    work last began anew), lost_seconds (those, and the time from a checkpoint to the kill after it)."""

    def __init__(
        self,
        path: Path,
        saved_seconds: float | None,
        now: Callable[[], float] = time.monotonic,
        kept: OnFileWritten = no_copy,
        began: float | None = None,
    ) -> None:
        """saved_seconds: what the checkpoint that is taken up had used; None when the work begins anew, and then with
        all of its time, since nothing of the time before is in its result. began: when this start did, by `now`, if
        that was before this call."""
        noted = read(path)
        self.path, self.now, self.kept = path, now, kept
        used = noted["elapsed_seconds"]
        self.used_before = 0.0 if saved_seconds is None else max(used, saved_seconds)
        if saved_seconds is None:
            discarded = lost = noted["discarded_seconds"] + used
        else:
            discarded, lost = noted["discarded_seconds"], noted["lost_seconds"] + max(0.0, used - saved_seconds)
        self.discarded_seconds, self.lost_seconds = discarded, lost
        self.starts = int(noted["starts"]) + 1
        self.began = now() if began is None else began
        self.note()

    def elapsed(self) -> float:
        """Count the seconds used by the work that goes on, over restarts."""
        return self.used_before + self.now() - self.began

    def note(self) -> None:
        """Write the clock down; raises OSError when storage fails."""
        from hedgemix.runtime import collectives  # torch, which who only reads a clock does without

        self.beaten = self.now()
        if collectives.rank() == 0:
            seconds = self.elapsed(), self.starts, self.discarded_seconds, self.lost_seconds
            write_json(self.path, dict(zip(FIELDS, seconds, strict=True)))
            self.kept(self.path)

    def beat(self) -> None:
        """Do as `note`, once a second; storage that fails for a moment does not end the work."""
        if self.now() - self.beaten >= BEAT_SECONDS:
            with contextlib.suppress(OSError):
                self.note()


class Due:
    """Says on rank 0, asked between two pieces of work, whether a checkpoint is due: by the clock, or once on notice
    that the machine is about to be taken away."""

    def __init__(self, clock: Clock, every_seconds: float, notice: Callable[[], bool] = no_notice) -> None:
        self.clock, self.every_seconds, self.notice = clock, every_seconds, notice
        self.saved_at = clock.elapsed()
        self.noticed = False

    def __call__(self) -> bool:
        elapsed = self.clock.elapsed()
        noticed = not self.noticed and self.notice()
        self.noticed |= noticed
        due = noticed or elapsed - self.saved_at >= self.every_seconds
        if due:
            self.saved_at = elapsed
        return due


def read(path: Path) -> dict[str, Any]:
    """Read what a clock noted; zeros when there is none, or none that can be read."""
    try:
        noted = read_json(path)
        return {name: float(noted[name]) for name in FIELDS}
    except (OSError, ValueError, KeyError, TypeError):
        return dict.fromkeys(FIELDS, 0.0)
