"""A study's findings as a table: a row a variant and one for the base, for the terminal and as study.parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.analysis.console import cell
from pipeline.analysis.significance import RULES
from pipeline.analysis.study import Study
from pipeline.analysis.verdicts import Finding, format_p, gaps, remarks, sentence

COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "study": (pa.string(), "Name of the study."),
    "variant": (pa.string(), "Name of the variant; base: what the others are compared with."),
    "record": (pa.string(), "Name of its record."),
    "fields": (pa.string(), "What it changes of the base, as JSON: dotted name -> value."),
    "seeds_done": (pa.int64(), "Finished seeds."),
    "seeds_declared": (pa.int64(), "Seeds with a row in its table."),
    "seeds_paired": (pa.int64(), "Seeds that it and the base both finished."),
    "bpb_final": (pa.float64(), "Mean score of its finished seeds, bits per byte."),
    "difference_bpb": (pa.float64(), "Mean over the pairs of its score less the base's; below 0 is better."),
    "low_bpb": (pa.float64(), "Lower end of the difference's 95 % interval (Student)."),
    "high_bpb": (pa.float64(), "Upper end."),
    "p": (pa.float64(), "Of no difference: Student's t of the pairs, two-sided."),
    "p_holm": (pa.float64(), "p as one of the study's variants (Holm); empty if seeds were added until decided."),
    "verdict": (pa.string(), "better, worse, not decided or not compared; of the base empty."),
    **{
        f"holds_{rule.name}": (pa.bool_(), f"Whether it is {rule.text}, against the base in pairs, one-sided.")
        for rule in RULES
    },
    "train_seconds": (pa.float64(), "Mean training budget used."),
    "evaluate_seconds": (pa.float64(), "Mean seconds of the evaluation."),
    "total_bytes": (pa.float64(), "Mean of artifact and code together."),
    "note": (pa.string(), "What was found, in a sentence; of the base empty."),
}
"""Of study.parquet: type, and what it is."""


def parquet(study: Study, found: Sequence[Finding]) -> bytes:
    """Write study.parquet: the base first, then the variants, the best first."""
    schema = pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, (kind, doc) in COLUMNS.items()])
    rows = [row(study, Finding(study.base)) | {"verdict": None, "note": None}, *(row(study, each) for each in found)]
    clean = [{name: None if value != value else value for name, value in each.items()} for each in rows]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(clean, schema=schema), content)
    return content.getvalue()


def row(study: Study, finding: Finding) -> dict[str, Any]:
    """Make a row of COLUMNS."""
    sample, record = finding.sample, finding.variant.record
    spread = {
        "difference_bpb": sample and sample.mean, "low_bpb": sample and sample.low, "high_bpb": sample and sample.high,
    }  # fmt: skip
    return {
        "study": study.name,
        "variant": finding.variant.name,
        "record": record.name,
        "fields": json.dumps(finding.variant.fields),
        "seeds_done": len(record.done),
        "seeds_declared": len(record.rows),
        "seeds_paired": len(finding.differences),
        "bpb_final": finding.mean("bpb_final"),
        **spread,
        "p": finding.p,
        "p_holm": finding.p_holm,
        "verdict": finding.word,
        **{f"holds_{rule.name}": so for rule, so in zip(RULES, finding.holds, strict=False)},
        **{name: finding.mean(name) for name in ("train_seconds", "evaluate_seconds", "total_bytes")},
        "note": sentence(finding),
    }


HEADS = ("seeds", "final", "change", "±", "p", "Holm", "train s", "eval s", "bytes")


def show(study: Study, found: Sequence[Finding], console: Console) -> None:
    """Print a line a variant in 80 columns, the best first, then what is significant in words, and what is missing."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("variant", overflow="fold")
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for each in (*found, Finding(study.base)):
        if each.variant is study.base:
            table.add_section()
        sample = each.sample
        spread = ("", "") if sample is None else (f"{sample.mean:+.4f}", cell(sample.high - sample.mean, ".4f"))
        means = [
            cell(each.mean(column), form)
            for column, form in (("train_seconds", ".1f"), ("evaluate_seconds", ".1f"), ("total_bytes", ",.0f"))
        ]
        told = (each.seeds(), cell(each.mean("bpb_final"), ".4f"), *spread, format_p(each.p), format_p(each.p_holm))
        table.add_row(each.variant.name, *told, *means)
    console.print(f"\nstudy {study.name}: bits per byte, change to the base by seed", markup=False, soft_wrap=True)
    console.print(table)
    for line in [*map(sentence, found), *remarks(study, found), *gaps(study)]:
        console.print(line.replace("`", ""), markup=False, soft_wrap=True)
