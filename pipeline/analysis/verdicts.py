"""What a study found: every variant beside the base, seed by seed, with an interval, a p for being one of many, a word.

A variant is compared under the conditions of `hedgemix compare`, and on the base's limits; where they do not hold it
is shown, and why it is not compared. The word is "better" or "worse" where the two-sided p of its pairs, corrected by
Holm for the number of variants, is below LEVEL. A variant whose seeds were added until it was decided has been looked
at again and again, which that p does not know: its word is the sequential test's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hedgemix.config import RecipeError
from pipeline.analysis import comparison, sequential, significance
from pipeline.analysis.records import Record
from pipeline.analysis.significance import RULES, Summary
from pipeline.analysis.study import Study, Variant
from pipeline.results.table import mean_and_deviation

LEVEL = 0.05
NOT_COMPARED, NOT_DECIDED = "not compared", "not decided"


@dataclass(frozen=True)
class Finding:
    """Holds what a study found of one variant, or of its base; NaN where nothing is known."""

    variant: Variant
    why_not: str = ""
    """Why it is not compared with the base; empty when it is."""
    differences: dict[int, float] = field(default_factory=dict)
    """Bits per byte more than the base needs, by the seeds that both finished."""
    p: float = math.nan
    """Of the differences' mean being 0, two-sided."""
    p_holm: float = math.nan
    """The same for being one of the study's variants; NaN also where seeds were added until decided."""
    holds: tuple[bool, ...] = ()
    """Whether the field's RULES hold against the base."""
    needed: int | None = None
    """Seeds that would decide it in four cases of five, if mean and spread stay; None: decided, or not known."""

    @property
    def sample(self) -> Summary | None:
        """Summarise the differences: None without any."""
        return significance.summary(list(self.differences.values())) if self.differences else None

    @property
    def word(self) -> str:
        """Tell better, worse, not decided, or not compared."""
        sample = self.sample
        if sample is None:
            return NOT_COMPARED
        if asked := sequential.verdict(self.variant.why_stopped):
            return asked
        if not self.p_holm < LEVEL:
            return NOT_DECIDED
        return "better" if sample.mean < 0 else "worse"

    def mean(self, column: str) -> float:
        """Average a column over the finished seeds; NaN when none has it."""
        return mean_and_deviation([row[column] for row in self.variant.record.done if row[column] is not None])[0]

    def seeds(self) -> str:
        """Tell how many seeds are done, and of how many."""
        done, rows = len(self.variant.record.done), len(self.variant.record.rows)
        return str(done) if done == rows else f"{done} of {rows}"


def findings(study: Study) -> list[Finding]:
    """Compare every variant with the base; the best first, those not compared last."""
    found = [compared(variant, study.base.record) for variant in study.variants]
    asked = [sequential.verdict(each.variant.why_stopped) is not None for each in found]
    ps = significance.holm([math.nan if skip else each.p for each, skip in zip(found, asked, strict=True)])
    told = [
        Finding(
            each.variant, each.why_not, each.differences, each.p, p_holm, each.holds, needed(each, LEVEL / len(found))
        )
        for each, p_holm in zip(found, ps, strict=True)
    ]
    return sorted(told, key=lambda each: (each.sample.mean if each.sample else math.inf, each.variant.name))


def compared(variant: Variant, base: Record) -> Finding:
    """Compare a variant with the base by the seeds that both finished."""
    if why := obstacle(variant.record, base):
        return Finding(variant, why)
    pairs = comparison.paired_scores(variant.record, base)
    if not pairs:
        return Finding(variant, "no seed is done of both it and the base")
    differences = {seed: mine - its for seed, (mine, its) in pairs.items()}
    scale = significance.nats_per_bit(base.done[0])
    tests = [significance.against_pairs(list(pairs.values()), rule.margin_nats / scale) for rule in RULES]
    holds = tuple(rule.holds(test) for rule, test in zip(RULES, tests, strict=True))
    return Finding(variant, "", differences, significance.two_sided_p(list(differences.values())), holds=holds)


def obstacle(record: Record, base: Record) -> str:
    """Say why a record cannot be compared with the base; empty when it can."""
    if not record.rows:
        return "it has no table yet"
    try:
        for each in (base, record):
            comparison.scores(each)
    except RecipeError as error:
        return str(error)
    if why := comparison.same_text(record, base):
        return why
    settings = comparison.settings(record, base)
    limits = [f"{name} {mine}, of the base {its}" for name, mine, its in settings if name.startswith("limits.")]
    return f"it has other limits: {'; '.join(limits)}" if limits else ""


def needed(finding: Finding, level: float) -> int | None:
    """Count the seeds with which a two-sided test at this level would find a difference in four cases of five, if mean
    and spread are what they look like now; None without a spread, and when no number would."""
    sample = finding.sample
    if sample is None or not sample.deviation > 0:
        return None
    below = Summary(sample.count, -abs(sample.mean), sample.deviation, math.nan, math.nan)
    return significance.seeds_needed(below, 0.0, level / 2)


def sentence(finding: Finding) -> str:
    """Say in a sentence what was found of a variant."""
    sample, name = finding.sample, f"`{finding.variant.name}`"
    if sample is None:
        return f"{name} is not compared: {finding.why_not}."
    count = sample.count
    interval = f", 95 % interval {sample.low:+.4f} to {sample.high:+.4f}" if count > 1 else ""
    told = f"{sample.mean:+.4f} bits per byte in {count} seed{'s' * (count > 1)}{interval}"
    rule = f"; seeds were added until: {finding.variant.why_stopped}" if finding.variant.why_stopped else ""
    if sequential.verdict(finding.variant.why_stopped):
        return f"{name} is {finding.word}: {told}{rule}."
    if finding.p != finding.p:
        ps = "; one pair tells no spread" if count == 1 else "; no spread, so no p"
    else:
        ps = f"; p = {format_p(finding.p)}, as one of these variants {format_p(finding.p_holm)}"
    more = finding.needed if finding.word == NOT_DECIDED else None
    hope = f"; about {more:,} seeds would decide it, if mean and spread stay" if more else ""
    return f"{name} is {finding.word}: {told}{ps}{hope}{rule}."


def format_p(p: float) -> str:
    """Write a p; empty for NaN."""
    if p != p:
        return ""
    return f"{p:.1g}" if p < 0.001 else f"{p:.3f}"


def format_fields(fields: dict[str, Any]) -> str:
    """Write the fields that a variant changes, each with its value."""
    values = {name: str(value).lower() if isinstance(value, bool | None) else value for name, value in fields.items()}
    return ", ".join(f"{name} {comparison.format_setting(value)}" for name, value in values.items())


def gaps(study: Study) -> list[str]:
    """List the declared seeds that are not done, of base and variants, with what ended them; alike ones in a line."""
    lines = []
    for variant in (study.base, *study.variants):
        if not variant.record.rows:
            lines.append(f"{variant.name}: no table yet")
        alike: dict[str, list[str]] = {}
        for row in variant.record.rows:
            if row["status"] != "done":
                alike.setdefault(f"{row['status']}: {row['error'] or 'not finished'}", []).append(str(row["seed"]))
        for what, seeds in alike.items():
            lines.append(f"{variant.name}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} {what}")
    return lines


def remarks(study: Study, found: Sequence[Finding]) -> list[str]:
    """Tell what differs between a compared variant and the base beside the settings, and may explain a difference."""
    return [
        f"{each.variant.name}: {note} of the base"
        for each in found
        if each.differences
        for note in comparison.conditions(each.variant.record, study.base.record)
    ]


def headline(study: Study, found: Sequence[Finding]) -> list[str]:
    """Say what a hurried reader wants to know, the best variant first."""
    words = [each.word for each in found]
    better = [each for each in found if each.word == "better"]
    verdicts = [
        f"{words.count(word)} {word}" for word in ("better", "worse", NOT_DECIDED, NOT_COMPARED) if word in words
    ]
    lead = sentence(better[0]) if better else f"No variant is found better than the base `{study.base.record.name}`."
    many = f"{len(found)} variant{'s' * (len(found) != 1)}"
    lines = [lead, f"{many}: {', '.join(verdicts)}." if verdicts else "No variants."]
    if missing := gaps(study):
        more = f", and {len(missing) - 1} more" if missing[1:] else ""
        lines.append(f"Not all of it is done: {missing[0]}{more}.")
    return lines
