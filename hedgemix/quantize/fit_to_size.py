"""The search for the finest steps whose artifact fits a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from hedgemix.config import RecipeError

CLOSE_ENOUGH = 0.005
"""Share of the target that may stay unused."""
MOST_TRIES = 12
LONGEST_MOVE = 4.0
"""Octaves of theta that one try may go beyond the last."""

Tensors = TypeVar("Tensors")


def fit_to_size(
    theta: float, tensors_at: Callable[[float], tuple[Tensors, int]], target_bytes: int, weights: int
) -> tuple[float, Tensors, int]:
    """Find the least theta, from this one on, whose tensors take at most `target_bytes`: it, its tensors, the tries.

    tensors_at: the tensors of a theta, and the bytes of the artifact with them. weights: how many are quantized.

    Unless the first try fits, the file leaves at most CLOSE_ENOUGH of the target unused (as long as MOST_TRIES allow).
    Bytes fall and flatten out as log2(theta) grows, by up to a bit a weight for each unit: the first move goes along
    that line, the others along the secant of the last two points, kept between the points on both sides of the target.
    Raises RecipeError when nothing fits.
    """
    here, aim, slope = math.log2(theta), (1 - CLOSE_ENOUGH / 2) * target_bytes, -weights / 8
    before: tuple[float, int] | None = None
    below: tuple[float, Tensors] | None = None
    above = last = -math.inf
    for tries in range(1, MOST_TRIES + 1):
        tensors, size = tensors_at(2.0**here)
        if size <= target_bytes:
            if tries == 1 or size >= (1 - CLOSE_ENOUGH) * target_bytes:
                return 2.0**here, tensors, tries
            below = here, tensors
        else:
            above = here
        if before is not None:
            slope = (size - before[1]) / (here - before[0])
        before = here, size
        if below is None:
            if slope >= 0 and here >= last + LONGEST_MOVE:
                break  # nothing gained by the longest move
            last = here
            here += min((aim - size) / slope, LONGEST_MOVE) if slope < 0 else LONGEST_MOVE
        else:
            towards = here + (aim - size) / slope if slope < 0 else math.inf
            here = towards if above < towards < below[0] else (above + below[0]) / 2
    if below is None:
        raise RecipeError(
            f"{weights:,} weights and what goes with them do not fit {target_bytes:,} bytes at any step; raise "
            "quantize.target_bytes or limits.total_bytes, or train a smaller model"
        )
    return 2.0 ** below[0], below[1], MOST_TRIES
