"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """Count the CPUs that this process may use, at least one: those that its affinity names, no more than the quotas of
    its control groups. root: of /proc and /sys."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(count, *quotas(root))))


def quotas(root: Path) -> list[float]:
    """List the CPUs' worth of time a period that this process's control groups grant, of version 2 or 1; an infinite
    one is always there."""
    found = [float("inf")]
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # In a container the path may be the host's, of which only the container's own end is mounted.
        group = mounted / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mounted):
                found += quota(folder)
    return found


def quota(folder: Path) -> list[float]:
    """Read a group's quota in CPUs; none when it has no limit."""
    try:
        if (folder / "cpu.max").is_file():
            used, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            used, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return [int(used) / int(period)] if used.strip() != "max" and int(used) > 0 else []
    except (OSError, ValueError):
        return []
