"""The report of a study: study.html, study.md with its figures and study.parquet, from the tables and the step logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hedgemix.runtime.layout import LOG
from pipeline.analysis import significance, study_table, verdicts
from pipeline.analysis.console import cell
from pipeline.analysis.significance import RULES
from pipeline.analysis.study import Study, Variant
from pipeline.analysis.verdicts import Finding, format_p
from pipeline.report import build, study_figures
from pipeline.report.page import Page, Plot, Points, Section, Table

PAGE, TWIN, TABLE = "study.html", "study.md", "study.parquet"
HEADS = ("variant", "difference", "95 % interval", "p", "Holm", *(r.name for r in RULES), "seeds", "final", "changes")
COSTS = {
    "training, s": ("train_seconds", ",.1f"),
    "quantization, s": ("quantize_seconds", ",.1f"),
    "evaluation, s": ("evaluate_seconds", ",.1f"),
    "bytes": ("total_bytes", ",.0f"),
    "artifact, bytes": ("artifact_bytes", ",.0f"),
}
"""Heads and columns: what a seed takes."""
GOOD = {"better": True, "worse": False}


def compose(study: Study, found: Sequence[Finding]) -> Page:
    """Compose the page of a study with these findings."""
    good = [GOOD.get(each.word) for each in found]
    said: list[Any] = [Points([verdicts.sentence(each) for each in found], good if {True, False} & set(good) else ())]
    if remarks := verdicts.remarks(study, found):
        said += ["What else differs from the base:", Points(remarks)]
    parts = [
        Section("Every variant", [table(study, found), *explanations(found)]),
        Section("Better, worse, or not decided", said if found else ["The study has no variants."]),
        *differences(study, found),
        costs(study, found),
        *training(study),
        *missing(study),
        origin(study),
    ]
    return Page(f"Study {study.name}", verdicts.headline(study, found), parts)


def write(study: Study, found: Sequence[Finding]) -> Path:
    """Write the page, its twin with figures and the table in the study's folder, on the store too; returns the page's
    path."""
    study.storage.write_bytes(study.folder / TABLE, study_table.parquet(study, found))
    source = f"the tables of {1 + len(study.variants)} records and the files of their steps"
    build.write_page(study.storage, study.folder, compose(study, found), source, PAGE, TWIN)
    return study.folder / PAGE


def table(study: Study, found: Sequence[Finding]) -> Table:
    """Show a row a variant, the best first, and the base last."""
    rows = [line(each) for each in (*found, Finding(study.base))]
    return Table(HEADS, rows, (HEADS.index("difference"),), 1)


def line(finding: Finding) -> list[str]:
    """Make a row of HEADS."""
    sample = finding.sample
    spread = ["", ""]
    if sample is not None:
        interval = f"{sample.low:+.4f} to {sample.high:+.4f}" if sample.count > 1 else ""
        spread = [f"{sample.mean:+.4f}", interval]
    holds = ["yes" if so else "no" for so in finding.holds] or [""] * len(RULES)
    score = cell(finding.mean("bpb_final"), ".4f")
    changes = verdicts.format_fields(finding.variant.fields)
    ps = [format_p(finding.p), format_p(finding.p_holm)]
    return [finding.variant.name, *spread, *ps, *holds, finding.seeds(), score, changes]


def explanations(found: Sequence[Finding]) -> list[str]:
    """Say what the columns mean."""
    rules = "; ".join(f"`{rule.name}`: {rule.text}" for rule in RULES)
    lines = [
        "`difference`: bits per byte more than the base needs, each seed beside the base's own of that number, so "
        "what is luck of a seed is in both; mean of those that both finished, and Student's interval. `p`: "
        "two-sided, of no difference. `Holm`: the same p for being one of "
        f"{len(found)} variants, those without one counted too; a variant is called better or worse below "
        f"{verdicts.LEVEL:g}. `final`: mean score of all finished seeds, lower is better.",
        f"The field's rules, one-sided and not corrected for the number of variants: {rules}.",
    ]
    if any(each.variant.why_stopped for each in found):
        lines.append(
            "Where seeds were added by a rule, a p does not know how often it was looked at. Seeds that were added "
            "until decided have no corrected p: the word is the sequential test's, which errs in 5 % over all its "
            "looks. Intervals that were narrowed by adding seeds hold the true difference in 90 to 95 % of cases."
        )
    return lines


def differences(study: Study, found: Sequence[Finding]) -> list[Section]:
    """Show the differences with their intervals; no section without any."""
    samples = {each.variant.name: each.sample for each in found if each.sample is not None}
    if not samples:
        return []
    margin = RULES[0].margin_nats / significance.nats_per_bit(study.base.record.done[0])
    drawn = study_figures.differences(samples, {each.variant.name: each.word for each in found}, margin)
    caption = (
        "Difference to the base and its 95 % interval: green better, red worse, grey not decided. A ring is one pair, "
        f"an arrow an interval that goes on. Dashed: {RULES[0].margin_nats:g} nats a token, what a record asks for."
    )
    seeds = [row["seed"] for row in study.base.record.done]
    rows = [
        [each.variant.name, *(f"{each.differences[seed]:+.4f}" if seed in each.differences else "" for seed in seeds)]
        for each in found
        if each.differences
    ]
    by_seed = Table(["difference by seed", *map(str, seeds)], rows)
    return [Section("How far from the base", [Plot("differences", drawn, caption), by_seed])]


def costs(study: Study, found: Sequence[Finding]) -> Section:
    """Show what a seed takes in seconds and bytes, and whether every finished seed keeps the limits."""
    rows = []
    for each in (*found, Finding(study.base)):
        within = [row["within_limits"] for row in each.variant.record.done if row["within_limits"] is not None]
        kept = "" if not within else "yes" if all(within) else "no"
        rows.append([each.variant.name, *(cell(each.mean(column), form) for column, form in COSTS.values()), kept])
    table = Table(["variant", *COSTS, "within limits"], rows, (), 1)
    return Section("What a seed takes", [table, "Means over the finished seeds."])


def training(study: Study) -> list[Section]:
    """Show learning curves over one another where a variant was trained otherwise than the base; else no section."""
    title, base = "Training", trained(study.base)
    apart = [each for each in study.variants if differs(trained(each), base)]
    if not apart:
        return []
    curves = {each.name: logs for each in (study.base, *apart) if (logs := logs_of(each))}
    lost = [each.name for each in (study.base, *apart) if each.name not in curves]
    blocks: list[Any] = []
    if curves:
        caption = (
            "Training loss by the clock, mean over seeds (each: mean of the last fiftieth of its steps), and how far "
            "each lies above the first; the axes leave out the first tenth."
        )
        blocks.append(Plot("learning", study_figures.learning(curves), caption))
    if same := [f"`{each.name}`" for each in study.variants if each not in apart and each.record.done]:
        blocks.append(f"Trained as the base: {', '.join(same)}.")
    if lost:
        blocks.append(f"No {LOG} is there of {', '.join(lost)}: copy the runs folder as a whole, or finish the study.")
    return [Section(title, blocks)]


def trained(variant: Variant) -> dict[int, str]:
    """Name the training step of each seed."""
    return {row["seed"]: Path(row["train_path"]).name for row in variant.record.rows if row["train_path"]}


def differs(mine: dict[int, str], base: dict[int, str]) -> bool:
    """Say whether seeds were trained in other steps than the base's; without a seed in common, whether any was."""
    shared = mine.keys() & base.keys()
    return any(mine[seed] != base[seed] for seed in shared) or (not shared and bool(mine))


def logs_of(variant: Variant) -> list[list[dict[str, Any]]]:
    """Read the step log of each seed that has one."""
    logs = [variant.record.lines(row, "train_path", LOG) for row in variant.record.rows]
    return [lines for lines in logs if lines]


def missing(study: Study) -> list[Section]:
    """Show what is not done; no section when all is."""
    gaps = verdicts.gaps(study)
    return [Section("What is not done", [Points(gaps), "The study's command again goes on with it."])] if gaps else []


def origin(study: Study) -> Section:
    """Show where each variant's own table lies, and what all of them were run from."""
    rows = [[each.name, each.record.name, each.record.table] for each in (study.base, *study.variants)]
    said = f"Recipe `{study.recipe}`. Each variant is a record with a report of its own: `hedgemix report TABLE`."
    return Section("The records", [Table(["variant", "record", "table"], rows), said])
