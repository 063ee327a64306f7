"""When a study has seeds enough: a rule that is asked after every seed more.

Who tests at 5 % after each new seed until it holds finds something in 17 % of studies of 3 to 10 seeds in which there
is nothing. So the levels here are those of a group-sequential test: all looks together err in 5 % of such studies. The
usual boundaries stand on the normal distribution and do not hold with so few seeds. But without a difference the t
statistics of all looks depend on no spread, so their levels are read off simulated studies, at the very numbers of
seeds that are looked at. The level grows with the number of seeds: against one level for every look (Pocock's), at 3 to
10 seeds, that finds a difference of one standard deviation in 68 % of studies in place of 62 %, and takes 0.3 seeds
more to find one of four. Levels as the cube of the seeds, nearer to O'Brien and Fleming's, find 75 %, and take 1 more.

The interval's half-width is another matter: it tells no variant from its base, but to stop as soon as it is small picks
samples whose spread came out small. Simulated, 95 % intervals of such studies hold the true difference in 90 to 95 %.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from scipy import special

from pipeline.analysis import significance

ERROR_RATE = 0.05
"""Of a whole study: how often it may call a variant better or worse that is neither."""
FEWEST = 3
"""Seeds before which nothing is decided."""
STUDIES = 200_000
"""That are simulated for the levels."""

Until = float | Literal["decided"]
"""A half-width of the 95 % interval, in bits per byte, or a verdict."""


@dataclass(frozen=True)
class Decision:
    """Says whether a variant needs no more seeds, and why."""

    stop: bool
    why: str


def decide(differences: Sequence[float], *, look: int, looks: int, rule: Until, variants: int = 1) -> Decision:
    """Decide whether these seeds are enough for a variant, after look `look` (from 1) of at most `looks`.

    differences: bits per byte of the variant less the base's, a pair a seed; below 0 is better. rule: stop once the
    half-width of the mean's 95 % interval (Student) is at most so many bits per byte, or "decided": once a two-sided
    test tells better from worse, at an error rate of 5 % over all looks, shared by so many `variants` (Bonferroni).
    Each look is taken to have one seed more than the one before; a seed that is missing leaves the error rate.
    Raises ValueError for a look, a rule, a number or a difference that is none."""
    if not 1 <= look <= looks or variants < 1:
        raise ValueError(f"look {look} of {looks} for {variants} variants: count from 1")
    if not all(map(math.isfinite, differences)):
        raise ValueError("a difference is not finite")
    if rule != "decided" and not rule > 0:
        raise ValueError(f'{rule} is no half-width: give bits per byte above 0, or "decided"')
    last, count = look == looks, len(differences)
    if count < FEWEST:
        return Decision(last, f"undecided: {count} seeds in common with the base, and {FEWEST} are needed")
    if rule == "decided":
        return by_verdict(differences, look, looks, variants)
    sample = significance.summary(differences)
    half = sample.high - sample.mean
    told = f"half-width {half:.4f} bits per byte after {count} seeds"
    if half <= rule:
        return Decision(True, f"{told}, at most {rule:g}")
    return Decision(last, f"{'undecided: ' if last else ''}{told}, above {rule:g}")


def by_verdict(differences: Sequence[float], look: int, looks: int, variants: int) -> Decision:
    """Decide as `decide` does for "decided", of FEWEST differences or more."""
    count, last = len(differences), look == looks
    if not any(differences):
        return Decision(True, f"undecided: {count} seeds scored as the base's to the last digit")
    sample, p = significance.summary(differences), significance.two_sided_p(differences)
    level = levels(count - look + 1, looks, ERROR_RATE / variants)[look - 1]
    told = f"p = {p:.2g} after {count} seeds"
    if p <= level:
        how = "better" if sample.mean < 0 else "worse"
        return Decision(True, f"decided: {abs(sample.mean):.4f} bits per byte {how}, {told}, at most {level:.2g}")
    return Decision(last, f"{'undecided: ' if last else ''}{told}, above {level:.2g}")


def verdict(why: str) -> str | None:
    """Read the verdict of a rule "decided" back from what it said: better, worse or not decided; None of what was said
    of an interval's half-width, and of nothing."""
    if decided := re.match(r"decided: .* bits per byte (better|worse), ", why):
        return decided[1]
    return "not decided" if re.match(r"p = |undecided: (?!half-width)", why) else None


@cache
def levels(first: int, looks: int, error_rate: float) -> tuple[float, ...]:
    """Compute the level of p at each of `looks` looks, at `first`, first + 1, ... seeds, whose tests together err with
    this rate; 0 for a look at fewer than FEWEST seeds. A level is proportional to the seeds of its look. The rate is
    met from below, by two standard errors of the simulation."""
    generator = np.random.default_rng(0)
    mean, squares = np.zeros(STUDIES), np.zeros(STUDIES)
    lowest = np.full(STUDIES, np.inf)
    counts = range(first, first + looks)
    for count in range(1, counts.stop):
        away = generator.standard_normal(STUDIES) - mean
        mean += away / count
        squares += away**2 * (count - 1) / count
        if count >= max(first, FEWEST):
            t = np.abs(mean) / np.sqrt(squares / (count - 1) / count)
            np.minimum(lowest, 2 * special.stdtr(count - 1, -t) / count, out=lowest)
    wrong = error_rate * STUDIES
    slope = float(np.sort(lowest)[max(0, int(wrong - 2 * math.sqrt(wrong)))])
    return tuple(slope * count if count >= FEWEST else 0.0 for count in counts)
