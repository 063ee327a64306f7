"""The suite's results as files and as text: parquet, markdown, and the parts of documents that are made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.suite.machine import Limits
from benchmarks.suite.setup import Row
from pipeline.forecast.gpu_plan import Rates, Stage, evaluation_seconds

COLUMNS = {
    "stage": "stage", "what": "what", "size": "size", "baseline": "baseline", "baseline_seconds": "baseline s",
    "seconds": "hedgemix s", "ratio": "faster", "spread": "pairs", "rate": "rate", "limit_share": "of the limit",
    "agreement": "largest difference", "bits": "bits per byte, baseline and ours", "note": "note",
}  # fmt: skip
SHORT = ("stage", "what", "baseline", "baseline_seconds", "seconds", "ratio", "rate")


def cells(row: Row) -> dict[str, str]:
    return {
        "stage": row.stage,
        "what": row.what,
        "size": row.size,
        "baseline": row.baseline,
        "baseline_seconds": number(row.baseline_seconds),
        "seconds": number(row.seconds),
        "ratio": f"{row.ratio:.2f}x",
        "spread": f"{row.ratio_low:.2f} to {row.ratio_high:.2f}, {row.repeats}",
        "rate": f"{row.units_per_second:,.0f} {row.unit}/s",
        "limit_share": f"{row.limit_share:.1%}",
        "agreement": f"{number(row.agreement)} {row.agreement_of}" + ("" if row.agrees else " (TOO MUCH)"),
        "bits": f"{row.baseline_bpb:.4f}, {row.bpb:.4f}" if row.bpb == row.bpb else "",
        "note": row.note,
    }


def number(value: float) -> str:
    """Three digits."""
    return (
        "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    )


def table(rows: Sequence[Row], names: Sequence[str] = tuple(COLUMNS)) -> str:
    """Markdown, a line a row."""
    right = {"baseline_seconds", "seconds", "ratio", "rate", "limit_share"}
    lines = [[COLUMNS[name] for name in names], ["---:" if name in right else "---" for name in names]]
    lines += [[cells(row)[name] for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse(markdown: str) -> list[dict[str, str]]:
    """The cells of a markdown table by its head."""
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


def machine_text(machine: dict[str, Any], limits: Limits, minutes: float) -> str:
    gpu = f"{machine['gpu']} ({machine['gpu_gib']} GiB), " if machine["gpu"] else ""
    half = f", {limits.bfloat16 / 1e12:.0f} in bfloat16" if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB, "
        f"load {machine['load']} at the start; torch {machine['torch']}, Python {machine['python']}. Measured limits: "
        f"{limits.float32 / 1e12:.3g} TFLOP/s in float32{half}, {limits.bandwidth / 1e9:.1f} GB/s of memory. "
        f"{minutes:.1f} minutes in all."
    )


def plan_text(stages: Sequence[Stage], rates: Rates, weak: tuple[str, float], cuda: bool) -> str:
    """The plan as markdown: its rates, which of them are assumed, and its stages."""
    origin = "From rates measured on one GPU." if cuda else "No GPU figure was measured: every GPU rate is assumed."
    lines = [origin, "", "| rate of one device | value | measured here |", "|---|---:|---|"]
    for each in fields(rates):
        if each.name != "measured":
            value = getattr(rates, each.name)
            lines.append(f"| {each.name} | {value:.3g} | {'yes' if each.name in rates.measured else 'assumed'} |")
    lines += [
        "",
        "| stage, 8 GPUs | operations | bytes | launches in a row | seconds | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for stage in stages:
        lines.append(
            f"| {stage.name} | {stage.operations:.2e} | {stage.n_bytes:.2e} | {stage.launches:,.0f} | "
            f"{number(stage.seconds)} | {stage.what} |"
        )
    name, seconds = weak
    lines += ["", f"Evaluation: {evaluation_seconds(stages):,.0f} s. It rests most on `{name}`: twice as bad, and it "
              f"takes {seconds:,.0f} s more."]  # fmt: skip
    return "\n".join(lines)


def save(rows: Sequence[Row], machine: dict[str, Any], limits: Limits, folder: Path) -> None:
    """results.parquet: a line a row, and what the machine is in every line."""
    described = {"machine": json.dumps(machine), **{f"limit_{name}": value for name, value in asdict(limits).items()}}
    frame = pd.DataFrame([{**asdict(row), "agrees": row.agrees, **described} for row in rows])
    frame.to_parquet(folder / "results.parquet", index=False)


def update(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- bench:name -->` and `<!-- /bench:name -->`; ValueError without the markers."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    old = path.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{path} has no part between {begin} and {end}; put both markers where the text shall be")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old))
