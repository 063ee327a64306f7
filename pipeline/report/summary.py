"""What a finished record answers first: is it better, by how much, how sure, at what cost, can it be handed in?"""

from __future__ import annotations

from typing import Any

from hedgemix.config import RecipeError
from hedgemix.standalone import script
from pipeline.analysis import comparison, records, significance
from pipeline.analysis.comparison import HEADS
from pipeline.analysis.console import cell
from pipeline.analysis.records import Record
from pipeline.analysis.significance import RULES
from pipeline.report.page import Points, Section, Table
from pipeline.results.table import mean_and_deviation
from pipeline.submission import eligibility

SEED_COLUMNS = (
    ("final", "bpb_final", ".4f"),
    ("nats a token", "nats_per_token", ".4f"),
    ("full", "bpb_full", ".4f"),
    ("quantized", "bpb_quantized", ".4f"),
    ("mixed", "bpb_mixed", ".4f"),
    ("TTT", "bpb_ttt", ".4f"),
    ("published*", "bpb_published", ".4f"),
    ("steps", "steps", ",.0f"),
    ("bytes", "total_bytes", ",.0f"),
    ("train s", "train_seconds", ",.1f"),
    ("evaluate s", "evaluate_seconds", ",.1f"),
    ("retries", "retries", ".0f"),
)


def rivals(record: Record) -> list[Record]:
    """Load the other records of its folder that are finished, scored the same text and can be averaged; the best
    first."""
    found = []
    for other in records.load_all(record.storage):
        try:
            finished = len(other.done) == len(other.rows)
            if finished and other.name != record.name and not comparison.same_text(record, other):
                found.append((significance.summary(comparison.scores(other)).mean, other))
        except (RecipeError, IndexError):
            continue
    return [other for _, other in sorted(found, key=lambda pair: (pair[0], pair[1].name))]


def key_findings(record: Record, against: float | None) -> list[str]:
    """Write the answers, a line each."""
    if not record.done:
        return ["No seed has finished yet.", *handing_in(record)]
    if why := significance.mixed(record.done):
        return [f"These seeds are not one record: they have {'; '.join(why)}.", *cost(record), *handing_in(record)]
    row, found = record.done[0], significance.summary(comparison.scores(record))
    lines = [comparison.format_summary(found, significance.nats_per_bit(row)) + "."]
    if len(record.done) < len(record.rows):
        lines.append(f"{len(record.done)} of {len(record.rows)} seeds are done: this is no final figure.")
    return [*lines, better(record, against), *cost(record), *handing_in(record)]


def better(record: Record, against: float | None) -> str:
    """Compare with the published score, or the best other record on the text, in a sentence."""
    rule = RULES[0]
    if against is not None:
        scores = comparison.scores(record)
        test = significance.against_score(scores, against, rule.margin_nats / significance.nats_per_bit(record.done[0]))
        name = f"the published {against:g}"
    elif others := rivals(record):
        test, name = comparison.test(record, others[0], rule.margin_nats), f"record `{others[0].name}`"
    else:
        return "No other record of this folder scored the same text, so there is nothing to be better than."
    how = "better" if test.difference > 0 else "worse"
    verdict = f"a new record by the field's rule ({rule.text})" if rule.holds(test) else f"no new record ({rule.text})"
    return (
        f"{abs(test.difference):.4f} bits per byte {how} than {name}; p = {comparison.format_p_value(test)} "
        f"({test.name}): {verdict}."
    )


def cost(record: Record) -> list[str]:
    """Say what a seed takes, in seconds and bytes; nothing before one is done."""
    if not record.done:
        return []
    row, names = record.done[0], ("train_seconds", "quantize_seconds", "evaluate_seconds", "total_bytes")
    train, quantize, evaluate, total = (mean_and_deviation([row[n] for row in record.done])[0] for n in names)
    return [
        f"A seed takes {train:,.1f} s of training, {quantize:,.1f} s of quantization and {evaluate:,.1f} s of "
        f"evaluation on {row['workers']} x {row['hardware']}, and {total:,.0f} of {row['limit_bytes']:,} bytes."
    ]


def handing_in(record: Record) -> list[str]:
    """Say whether the record can be handed in, or why not."""
    why = eligibility.obstacles(record)
    return [f"Cannot be handed in yet: {'; '.join(why)}." if why else "Can be handed in: `hedgemix submit`."]


def seeds(record: Record) -> Section:
    """Show every declared seed, failures too, and the mean of the finished when they may be averaged."""
    rows = [[str(row["seed"]), *(cell(row[c], form) for _, c, form in SEED_COLUMNS)] for row in record.rows]
    averaged = bool(record.done) and not significance.mixed(record.done)
    if averaged:
        spread = [mean_and_deviation([row[c] for row in record.done if row[c] is not None]) for _, c, _ in SEED_COLUMNS]
        for n, name in enumerate(("mean", "std")[: len(record.done)]):
            rows.append([name, *(cell(pair[n], form) for pair, (_, _, form) in zip(spread, SEED_COLUMNS, strict=True))])
    heads = ["seed", *(head for head, _, _ in SEED_COLUMNS)]
    table = Table(heads, rows, (heads.index("final"),), min(2, len(record.done)) if averaged else 0)
    blocks: list[Any] = [table]
    failed = [row for row in record.rows if row["status"] != "done"]
    if failed:
        blocks.append(
            Points([f"seed {row['seed']} {row['status']}: {row['error'] or 'not finished'}" for row in failed])
        )
    blocks.append(
        "Bits per byte of text that nothing was tuned on, lower is better. * what the published rule reports is no "
        "code length: its probabilities do not sum to 1."
    )
    return Section("Every seed", blocks)


def statistical_tests(record: Record, against: float | None) -> Section:
    """Show the tests, and how many seeds would settle them."""
    title = "Is it better, and how sure is that?"
    if not record.done:
        return Section(title, ["No seed has finished."])
    if why := significance.mixed(record.done):
        return Section(title, [f"Not averaged: the seeds have {'; '.join(why)}."])
    scores, scale = comparison.scores(record), significance.nats_per_bit(record.done[0])
    found = significance.summary(scores)
    rows: list[list[str]] = []
    needed: list[str] = []
    if against is not None:
        tests = [significance.against_score(scores, against, rule.margin_nats / scale) for rule in RULES]
        rows += comparison.verdicts(f"published {against:g} ({tests[0].name})", tests, scale)
        needed = more_seeds(found, against, scale)
    others = rivals(record)
    for other in others:
        tests = [comparison.test(record, other, rule.margin_nats) for rule in RULES]
        rows += comparison.verdicts(f"{other.name} ({tests[0].name})", tests, scale)
    blocks: list[Any] = [comparison.format_summary(found, scale) + "."]
    if rows:
        blocks += [
            Table(HEADS, rows),
            "p: one-sided; how likely a difference this large is if the true one is the margin.",
        ]
    else:
        blocks.append(
            "Nothing to test against: no other record of this folder scored the same text, and no `--against`."
        )
    if not needed and others:
        needed = more_seeds_against(record, others[0], scale)
    notes = [
        f"{other.name}: {note}"
        for other in others
        for note in (comparison.chosen_test(record, other), *comparison.notes(record, other))
    ]
    return Section(title, [*blocks, *([Points(needed)] if needed else []), *([Points(notes)] if notes else [])])


def more_seeds_against(record: Record, other: Record, scale: float) -> list[str]:
    """Say with how many seeds the record would be better than the other: by their pairs, or by the other's mean."""
    mine, theirs = comparison.scores(record), significance.summary(comparison.scores(other)).mean
    pairs = comparison.paired_scores(record, other)
    if len(pairs) < comparison.FEWEST_PAIRS:
        return more_seeds(significance.summary(mine), theirs, scale)
    differences = significance.summary([score - its for score, its in pairs.values()])
    return more_seeds(differences, 0.0, scale, f"{other.name}, seed by seed,")


def more_seeds(sample: significance.Summary, score: float, scale: float, against: str = "") -> list[str]:
    """Say for each rule with how many seeds its one-sample test against this score, called `against`, would hold in
    four cases of five."""
    against = against or f"{score:.4f}"
    if not sample.deviation > 0:
        return ["No spread is known: how many more seeds would settle it cannot be said."]
    lines = []
    for rule in RULES:
        needed = significance.seeds_needed(sample, score - rule.margin_nats / scale, rule.level)
        if needed is None:
            lines.append(f"{rule.text}: no number of seeds would show it against {against} at this mean.")
        else:
            more = max(0, needed - sample.count)
            lines.append(
                f"{rule.text}: {needed} seeds in all, {more or 'no'} more, would show it against {against} in "
                f"{significance.POWER:.0%} of cases, if mean and spread are what they look like now."
            )
    return lines


def handed_in(record: Record) -> Section:
    """Show what a submission needs, and which of it is there."""
    limits, code_bytes = record.recipe.limits, script.n_bytes(record.recipe)
    facts = [
        (f"{len(record.done)} of {len(record.rows)} seeds done", eligibility.unfinished(record)),
        ("one configuration, text and kind of machine", significance.mixed(record.done)),
        ("the code that ran is the code that is installed here", eligibility.code_mismatches(record, code_bytes)),
        (
            f"at most {limits.total_bytes:,} bytes, {limits.train_seconds:g} s of training, "
            f"{limits.evaluate_seconds:g} s of evaluation",
            eligibility.over_limits(record, code_bytes),
        ),
        ("every check of the audit passed", eligibility.unaudited(record)),
        (
            "every seed's logs are whole",
            [why for seed in eligibility.logs(record) for why in eligibility.cut_short(seed)],
        ),
        ("the table says what the files of every seed do", eligibility.contradictions(record)),
    ]
    marked = Points([text for text, _ in facts], [not why for _, why in facts])
    reasons = [reason for _, why in facts for reason in why]
    return Section("Can it be handed in?", [marked, *([Points(reasons)] if reasons else ["Yes: `hedgemix submit`."])])
