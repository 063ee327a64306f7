"""TensorBoard's event files as TensorBoard's own reader sees them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Points = list[tuple[int, float]]


def scalars(folder: Path) -> dict[str, Points]:
    """Position and value of every point, by tag, in the order of the files."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def rising(points: Points) -> bool:
    """Whether no position comes twice or goes back."""
    positions = [position for position, _ in points]
    return all(before < after for before, after in pairwise(positions))
