"""The table that the command prints after a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.analysis.narrow_table import print_in_parts
from pipeline.results.schema import Row
from pipeline.results.table import mean_and_deviation

Column = tuple[str, str, str]
"""Heading, column of the table, format."""
COLUMNS: tuple[Column, ...] = (
    ("steps", "steps", ".0f"),
    ("full", "bpb_full", ".4f"),
    ("quant", "bpb_quantized", ".4f"),
    ("mixed", "bpb_mixed", ".4f"),
    ("TTT", "bpb_ttt", ".4f"),
    ("final", "bpb_final", ".4f"),
    ("publ.*", "bpb_published", ".4f"),
    ("bytes", "total_bytes", ",.0f"),
    ("train s", "train_seconds", ".1f"),
    ("eval s", "evaluate_seconds", ".1f"),
)


def print_results(rows: list[Row], parquet: str, console: Console) -> None:
    """Print one line a seed, mean and sample standard deviation over the finished ones, and how to load the table."""
    done = [row for row in rows if row.status == "done"]

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"\n{rows[0].record}: bits per byte of {rows[0].valid_bytes:,} bytes of held-out text")
    print_seeds(lambda columns: results_table(rows, columns), console)
    if done:
        masses = [row.published_mass for row in done if row.published_mass is not None]
        mass = sum(masses) / max(1, len(masses))
        line(f"* no code length: the published rule's probabilities sum to {mass:.2f} on average")
        over = [str(row.seed) for row in done if not row.within_limits]
        if over:
            line(f"over the recipe's limits of bytes or seconds: seeds {', '.join(over)}")
    for row in rows:
        if row.status != "done":
            line(f"seed {row.seed} {row.status}: {row.error or 'not finished'}")
    line(f"table: {parquet}")
    line(f"load:  pandas.read_parquet({parquet.rpartition('/')[0]!r})")


def results_table(rows: list[Row], columns: Sequence[Column]) -> Table:
    """Make the table of some of COLUMNS: a line a seed, then mean and deviation of the finished ones."""
    table = seed_table(columns)
    done = [row for row in rows if row.status == "done"]
    for row in rows:
        table.add_row(str(row.seed), *(cell(getattr(row, column), form) for _, column, form in columns))
    if done:
        table.add_section()
        spread = [
            mean_and_deviation([x for row in done if (x := getattr(row, column)) is not None])
            for _, column, _ in columns
        ]
        table.add_row("mean", *(cell(mean, form) for (mean, _), (_, _, form) in zip(spread, columns, strict=True)))
        if len(done) > 1:
            table.add_row("std", *(cell(std, form) for (_, std), (_, _, form) in zip(spread, columns, strict=True)))
    return table


def print_seeds(make: Callable[[Sequence[Column]], Table], console: Console) -> None:
    """Print the table that `make` builds of COLUMNS; in a narrow terminal, or of long numbers, in parts."""
    print_in_parts(lambda numbers: make([COLUMNS[number] for number in numbers]), len(COLUMNS), console)


def seed_table(columns: Sequence[Column]) -> Table:
    """Make a table with the heads of some of COLUMNS; of usual numbers all take 80 columns. Its lines are to come."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("seed", justify="right", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", style="bold" if heading == "final" else None, no_wrap=True)
    return table


def cell(value: float | None, form: str) -> str:
    """Format a value; None and NaN as an empty cell."""
    return "" if value is None or math.isnan(value) else format(value, form)
