"""How sure a record is: means with their spread, t-tests one-sided towards fewer bits, and how many seeds settle it.

All numbers are lower-is-better scores, one a seed. A record's seeds are a small sample: the tests are Student's, paired
where two records ran the same seeds, and Welch's where not (scipy.stats). They allow for few values, and take seeds for
independent and scores, or their differences, for roughly normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from pipeline.results.table import mean_and_deviation

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Summary:
    """Holds what a sample tells of its mean, in the sample's unit."""

    count: int
    mean: float
    deviation: float
    """Sample standard deviation (n - 1); NaN for one value."""
    low: float
    high: float
    """Student's confidence interval of the mean; NaN for one value."""


@dataclass(frozen=True)
class Test:
    """Tells whether a mean lies below a bar, or below another mean, by more than a margin; all in the sample's unit."""

    difference: float
    """How far below; negative: above. Without the margin."""
    margin: float
    statistic: float
    degrees: float
    p: float
    """Of a difference this large or larger if the true one were the margin. NaN without a spread."""
    name: str = "one-sample t"
    """Of the test, as a report calls it."""


@dataclass(frozen=True)
class Rule:
    """Says what the field asks of a new record."""

    name: str
    margin_nats: float
    """By how much, in nats a token, the old score must be beaten."""
    level: float
    """p must be below it."""
    text: str

    def holds(self, test: Test) -> bool:
        """Say whether the test, made with this rule's margin, is below its level."""
        return test.p < self.level


RULES = (
    Rule("record", 0.005, 0.01, "at least 0.005 nats a token better at p < 0.01"),
    Rule("row", 0.0, 0.25, "better than the previous row at p < 0.25"),
)


def summary(values: Sequence[float], confidence: float = CONFIDENCE) -> Summary:
    """Summarise values with Student's confidence interval of their mean. Raises ValueError for no values."""
    if not len(values):
        raise ValueError("no seed has finished: there is nothing to average")
    count, (mean, deviation) = len(values), mean_and_deviation(list(values))
    if count < 2:
        return Summary(count, mean, math.nan, math.nan, math.nan)
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count)
    return Summary(count, mean, deviation, mean - half, mean + half)


def against_score(values: Sequence[float], published: float, margin: float = 0.0) -> Test:
    """Test whether the mean is below `published` by more than `margin` (one-sample t-test, one-sided). Raises
    ValueError for no values."""
    found = summary(values)
    difference = published - found.mean
    if not found.deviation > 0:
        return Test(difference, margin, math.nan, found.count - 1, math.nan)
    told = stats.ttest_1samp(values, published - margin, alternative="less")
    return Test(difference, margin, float(told.statistic), float(told.df), float(told.pvalue))


def against_values(values: Sequence[float], others: Sequence[float], margin: float = 0.0) -> Test:
    """Test whether the mean is below the others' mean by more than `margin` (Welch's t-test: unequal variances;
    one-sided). Raises ValueError for no values."""
    mine, theirs = summary(values), summary(others)
    difference = theirs.mean - mine.mean
    if math.isnan(mine.deviation) or math.isnan(theirs.deviation) or not mine.deviation + theirs.deviation > 0:
        return Test(difference, margin, math.nan, math.nan, math.nan, "Welch")
    told = stats.ttest_ind(values, [value - margin for value in others], equal_var=False, alternative="less")
    return Test(difference, margin, float(told.statistic), float(told.df), float(told.pvalue), "Welch")


def against_pairs(pairs: Sequence[tuple[float, float]], margin: float = 0.0) -> Test:
    """Test whether the first of each pair, of one seed, is below the second by more than `margin` in the mean
    (Student's t of the differences; one-sided). Raises ValueError for no pairs."""
    return replace(against_score([mine - theirs for mine, theirs in pairs], 0.0, margin), name="paired t")


def two_sided_p(values: Sequence[float]) -> float:
    """Compute the p of Student's two-sided test that the values' mean is 0. NaN without a spread. Raises ValueError for
    no values."""
    test = against_score(values, 0.0)
    return 2 * float(stats.t.sf(abs(test.statistic), test.degrees))


def holm(ps: Sequence[float]) -> list[float]:
    """Correct ps for being so many (Holm): however many tests have no effect, the chance that any of them comes out
    below a level is at most that level. A NaN stays NaN, and counts: a test that is still to come."""
    corrected, highest = [math.nan] * len(ps), 0.0
    for rank, place in enumerate(sorted((n for n, p in enumerate(ps) if p == p), key=lambda n: ps[n])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = highest
    return corrected


def seeds_needed(sample: Summary, bar: float, level: float, power: float = POWER) -> int | None:
    """Count the seeds with which a one-sample t-test at `level` would find the mean below `bar` with this probability,
    if mean and deviation are what they look like now (noncentral t distribution). None when no number would, or over
    MOST_SEEDS. Raises ValueError without a spread."""
    if not sample.deviation > 0:
        raise ValueError("one seed, or seeds that all scored the same, tell no spread")
    effect = (bar - sample.mean) / sample.deviation
    if effect <= 0:
        return None
    counts = np.arange(2, MOST_SEEDS + 1)
    critical = stats.t.ppf(1 - level, counts - 1)
    reached = stats.nct.sf(critical, counts - 1, effect * np.sqrt(counts)) >= power
    return int(counts[reached][0]) if reached.any() else None


def nats_per_bit(row: dict[str, Any]) -> float:
    """Convert: what one bit per byte of the row's text is in nats a token."""
    return math.log(2) * row["valid_bytes"] / row["valid_tokens"]


SAME = {
    "config_hash": "configurations",
    "valid_sha256": "scored texts",
    "train_sha256": "training texts",
    "tokenizer_sha256": "tokenizers",
    "hardware": "hardware",
    "workers": "numbers of workers",
    "hedgemix_version": "versions of hedgemix",
    "torch_version": "versions of PyTorch",
}
"""Columns that must be equal in rows that are averaged, and what to call their values."""


def mixed(rows: Sequence[dict[str, Any]], columns: Sequence[str] = tuple(SAME)) -> list[str]:
    """Say why these rows must not be averaged, one sentence a column; empty when they may."""
    why = []
    for column in columns:
        seeds: dict[Any, list[str]] = {}
        for row in rows:
            seeds.setdefault(row[column], []).append(str(row["seed"]))
        if len(seeds) > 1:
            told = "; ".join(f"{brief(value)}: seed {', '.join(which)}" for value, which in seeds.items())
            why.append(f"different {SAME[column]} ({column}: {told})")
    return why


def brief(value: Any) -> str:
    """Write a value in at most 40 characters; of a longer one the first 12."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
