"""Seconds of two ways to do the same, measured side by side in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch


@dataclass(frozen=True)
class Comparison:
    """Medians in seconds with quartiles, and how often b goes into a."""

    a_seconds: float
    a_quartiles: tuple[float, float]
    b_seconds: float
    b_quartiles: tuple[float, float]
    ratio: float
    """Median of a over median of b: above 1, b is faster."""
    ratio_range: tuple[float, float]
    """Least and largest a / b of the pairs that ran one after the other."""
    repeats: int
    results: tuple[Any, Any]
    """What the last a and the last b returned."""

    def scaled(self, factor: float) -> Self:
        """The same with a's seconds times `factor`, for an a that did 1 / factor of b's work."""
        low, high = self.a_quartiles
        least, most = self.ratio_range
        return replace(
            self,
            a_seconds=factor * self.a_seconds,
            a_quartiles=(factor * low, factor * high),
            ratio=factor * self.ratio,
            ratio_range=(factor * least, factor * most),
        )


def synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def once(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Seconds of one call, the device's queue included, and what it returned."""
    synchronise()
    began = clock()
    value = work()
    synchronise()
    return clock() - began, value


def compare(
    a: Callable[[], Any],
    b: Callable[[], Any],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """`repeats` calls of each in the order a b b a a b ..., after `warmup` calls of each that are not counted.

    The collector of garbage runs before, and not in between.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    seconds: dict[str, list[float]] = {"a": [], "b": []}
    results: dict[str, Any] = {}
    work = {"a": a, "b": b}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, repeats):
            for name in ("ab", "ba")[turn % 2]:
                elapsed, results[name] = once(work[name], clock)
                if turn >= 0:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return summary(seconds["a"], seconds["b"], (results["a"], results["b"]))


def summary(a: Sequence[float], b: Sequence[float], results: tuple[Any, Any] = (None, None)) -> Comparison:
    """Of the seconds of pairs."""
    pairs = [each / other for each, other in zip(a, b, strict=True)]
    (a_low, a_mid, a_high), (b_low, b_mid, b_high) = (np.quantile(part, (0.25, 0.5, 0.75)).tolist() for part in (a, b))
    return Comparison(
        a_mid, (a_low, a_high), b_mid, (b_low, b_high), a_mid / b_mid, (min(pairs), max(pairs)), len(pairs), results
    )
