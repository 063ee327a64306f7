"""How many CPUs this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

QUOTA_FILES = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
"""Of control groups of version 2 and 1: microseconds a period, and the period; without a limit max or -1."""


def available_cpus(root: Path = Path("/")) -> int:
    """Count the CPUs that this process may use, at least one: those that its affinity names, no more than the quotas of
    its control groups. root: of /proc and /sys."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(count, *quotas(root), count)))


def quotas(root: Path) -> Iterator[float]:
    """Give the CPUs' worth of time that each control group grants which this process is in, and those above it."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                # In a container the path may be the host's, of which only the container's own end is mounted.
                group = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / path.strip("/")
                for folder in (group, *group.parents):
                    for names in QUOTA_FILES:
                        with suppress(OSError, ValueError):
                            words = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
                            granted, period = map(int, words)
                            if granted > 0:
                                yield granted / period
