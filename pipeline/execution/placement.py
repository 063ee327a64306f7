"""Places of processes that start together, by name."""

from __future__ import annotations

import contextlib

from ray.util.placement_group import get_placement_group, remove_placement_group


def remove_group(name: str) -> None:
    """Remove the placement group of this name, if there is one: Ray itself keeps one that a task made until the job
    ends, and with it the CPUs."""
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(name))
