"""Two records beside each other: whether their scores may be compared, by how much they differ, in which settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from hedgemix.config import RecipeError
from pipeline.analysis import significance
from pipeline.analysis.console import Column, cell, print_seeds, seed_table
from pipeline.analysis.records import Record
from pipeline.analysis.significance import RULES, Test
from pipeline.results.settings import flatten

NOT_SETTINGS = ("recipe",)
"""Of a configuration: names that change nothing."""
FEWEST_PAIRS = 2
"""Seeds that two records must share to be paired by them: one pair has no spread."""


def scores(record: Record) -> list[float]:
    """Collect bpb_final of the finished seeds. Raises RecipeError, saying why, when they are not one record's: then no
    mean of them means anything."""
    if not record.done:
        raise RecipeError(f"record {record.name} has no finished seed")
    if why := significance.mixed(record.done):
        raise RecipeError(f"record {record.name} cannot be averaged: its seeds have {'; '.join(why)}")
    return [float(row["bpb_final"]) for row in record.done]


def same_text(candidate: Record, baseline: Record) -> str:
    """Say why scores of the two cannot be compared; empty when they can. Other tokenizers may cut one text differently:
    its bytes, and the documents it comes from, must then be the same."""
    mine, theirs = candidate.done[0], baseline.done[0]
    if mine["valid_sha256"] == theirs["valid_sha256"]:
        return ""
    if mine["text_sha256"] and all(mine[name] == theirs[name] for name in ("text_sha256", "valid_bytes")):
        return ""
    return (
        f"they scored different texts: {mine['valid_bytes']:,} bytes ({mine['valid_sha256'][:12]}…) and "
        f"{theirs['valid_bytes']:,} bytes ({theirs['valid_sha256'][:12]}…)"
    )


def notes(candidate: Record, baseline: Record) -> list[str]:
    """Tell what differs beside the settings and may explain a difference of scores, and whether both scored the same
    artifacts, one sentence each."""
    found = conditions(candidate, baseline)
    if gains := same_artifacts(candidate, baseline):
        told = ", ".join(f"{gain:+.4f}" for gain in gains)
        found.append(f"both scored the same artifacts, by seed {told} bits per byte better")
    return found


def conditions(candidate: Record, baseline: Record) -> list[str]:
    """Tell what differs of the conditions under which the two ran, one sentence each."""
    found = []
    for column, name in significance.SAME.items():
        mine, theirs = candidate.done[0][column], baseline.done[0][column]
        if mine != theirs and column not in ("config_hash", "valid_sha256"):
            found.append(f"different {name}: {significance.brief(mine)} and {significance.brief(theirs)}")
    return found


def same_artifacts(candidate: Record, baseline: Record) -> list[float]:
    """Compute by how many bits per byte `candidate` is better, seed by seed, where both scored the same artifacts; else
    empty."""
    theirs = {row["seed"]: row for row in baseline.done}
    pairs = [(row, theirs.get(row["seed"], {})) for row in candidate.done]
    if not all(mine["artifact_sha256"] == its.get("artifact_sha256") for mine, its in pairs):
        return []
    return [its["bpb_final"] - mine["bpb_final"] for mine, its in pairs]


def settings(candidate: Record, baseline: Record) -> list[tuple[str, str, str]]:
    """List every field of the configurations whose values differ: its dotted name, and both values."""
    mine, theirs = (dict(flatten(json.loads(record.rows[0]["config"]))) for record in (candidate, baseline))
    names = [*mine, *(name for name in theirs if name not in mine)]
    pairs = [
        (name, format_setting(mine.get(name)), format_setting(theirs.get(name)))
        for name in names
        if name not in NOT_SETTINGS
    ]
    return [(name, a, b) for name, a, b in pairs if a != b]


def format_setting(value: Any) -> str:
    """Write a setting's value as text; a list's items are separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def test(candidate: Record, baseline: Record, margin_nats: float = 0.0) -> Test:
    """Test whether `candidate` is better by more than the margin, one-sided, in bits per byte: paired by seed where
    both finished two seeds or more, on those; else Welch's test of all. Raises RecipeError when they cannot be
    compared."""
    mine, theirs = scores(candidate), scores(baseline)
    if why := same_text(candidate, baseline):
        raise RecipeError(f"records {candidate.name} and {baseline.name} cannot be compared: {why}")
    margin = margin_nats / significance.nats_per_bit(candidate.done[0])
    pairs = paired_scores(candidate, baseline)
    if len(pairs) < FEWEST_PAIRS:
        return significance.against_values(mine, theirs, margin)
    return significance.against_pairs(list(pairs.values()), margin)


def paired_scores(candidate: Record, baseline: Record) -> dict[int, tuple[float, float]]:
    """Collect bpb_final of both by the seeds that both finished."""
    theirs = {row["seed"]: float(row["bpb_final"]) for row in baseline.done}
    return {
        row["seed"]: (float(row["bpb_final"]), theirs[row["seed"]]) for row in candidate.done if row["seed"] in theirs
    }


def chosen_test(candidate: Record, baseline: Record) -> str:
    """Say which test `test` makes of the two, and why."""
    shared, counts = len(paired_scores(candidate, baseline)), (len(candidate.done), len(baseline.done))
    if shared < FEWEST_PAIRS:
        return f"Welch's t-test of {counts[0]} and {counts[1]} seeds: they share {'one alone' if shared else 'none'}"
    mine, theirs = (count - shared for count in counts)
    if not mine + theirs:
        return f"paired t-test of {shared} seeds: both ran them, so what is luck of a seed is in both"
    return (
        f"paired t-test of the {shared} seeds that both ran; left out for want of a pair: {mine} of {candidate.name}, "
        f"{theirs} of {baseline.name}"
    )


HEADS = ("against", "better by, bits per byte", "better by, nats a token", "rule", "p", "holds")


def verdicts(against: str, tests: list[Test], nats_per_bit: float) -> list[list[str]]:
    """Make a table row for each of RULES, whose tests these are in order."""
    return [
        [
            against,
            f"{test.difference:+.4f}",
            f"{test.difference * nats_per_bit:+.4f}",
            rule.text,
            format_p_value(test),
            yes_or_no(rule.holds(test)),
        ]
        for rule, test in zip(RULES, tests, strict=True)
    ]


def yes_or_no(holds: bool) -> str:
    """Write whether a rule holds as yes or no."""
    return "yes" if holds else "no"


def format_p_value(test: Test) -> str:
    """Write a test's p, or say that there was no spread to compute it from."""
    if test.p != test.p:
        return "no spread"
    return f"{test.p:.2g}" if test.p < 0.001 else f"{test.p:.3f}"


def show(candidate: Record, baseline: Record, console: Console) -> None:
    """Print every seed of both, the means, the tests and what differs. Raises RecipeError when they cannot be
    compared."""
    tests = [test(candidate, baseline, rule.margin_nats) for rule in RULES]

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    scale = significance.nats_per_bit(candidate.done[0])
    for record in (candidate, baseline):
        line(f"{record.name}: {format_summary(significance.summary(scores(record)), scale)}")
        print_seeds(partial(rows_table, record), console)
        line("")
    better, by = tests[-1].difference > 0, abs(tests[-1].difference)
    how = f"{by:.4f} bits per byte ({by * scale:.4f} nats a token) {'better' if better else 'worse'}"
    line(f"{candidate.name} is {how} than {baseline.name}")
    line(f"  {chosen_test(candidate, baseline)}")
    for rule, found_test in zip(RULES, tests, strict=True):
        told = f"p = {format_p_value(found_test)} ({found_test.name}, one-sided)"
        line(f"  {rule.text}: {yes_or_no(rule.holds(found_test))}, {told}")
    for note in notes(candidate, baseline):
        line(f"note: {note}")
    differing = settings(candidate, baseline)
    line("no setting differs" if not differing else f"settings that differ ({candidate.name} | {baseline.name}):")
    for name, mine, theirs in differing:
        line(f"  {name}: {mine} | {theirs}")


def rows_table(record: Record, columns: Sequence[Column]) -> Table:
    """Make the table of a record's seeds, of some columns."""
    table = seed_table(columns)
    for row in record.rows:
        table.add_row(str(row["seed"]), *(cell(row[column], form) for _, column, form in columns))
    return table


def format_summary(sample: significance.Summary, nats_per_bit: float) -> str:
    """Write a summary in one line."""
    line = f"{sample.mean:.4f} bits per byte, {sample.mean * nats_per_bit:.4f} nats a token"
    if sample.count < 2:
        return f"{line}; one seed, so no spread"
    return (
        f"{line}; {sample.count} seeds, std {sample.deviation:.4f}, 95 % interval {sample.low:.4f} to {sample.high:.4f}"
    )
