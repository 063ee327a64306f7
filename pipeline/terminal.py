"""What the command prints: the plan before a record, the table after it."""

from __future__ import annotations

import math

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hedgemix.config import Recipe
from hedgemix.model import Model, parameter_count
from pipeline.results import Row, mean_and_deviation

# Heading, column of the table, format.
COLUMNS = (
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
    """One line a seed, mean and sample standard deviation over the finished ones, and how to load the table."""
    table = seed_table()
    done = [row for row in rows if row.status == "done"]
    for row in rows:
        table.add_row(str(row.seed), *(cell(getattr(row, column), form) for _, column, form in COLUMNS))
    if done:
        table.add_section()
        spread = [
            mean_and_deviation([x for row in done if (x := getattr(row, column)) is not None])
            for _, column, _ in COLUMNS
        ]
        table.add_row("mean", *(cell(mean, form) for (mean, _), (_, _, form) in zip(spread, COLUMNS, strict=True)))
        if len(done) > 1:
            table.add_row("std", *(cell(std, form) for (_, std), (_, _, form) in zip(spread, COLUMNS, strict=True)))

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"\n{rows[0].record}: bits per byte of {rows[0].valid_bytes:,} bytes of held-out text")
    console.print(table)
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


def seed_table() -> Table:
    """With the heads of COLUMNS, in 80 columns; its lines are to come."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("seed", justify="right")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", style="bold" if heading == "final" else None, no_wrap=True)
    return table


def cell(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def print_plan(recipe: Recipe, seeds: tuple[int, ...], console: Console) -> None:
    """The resources, batch arithmetic and sizes of a record, from the same configuration that will run it."""
    for name, value in plan(recipe, seeds).items():
        console.print(f"{name:14} {value}", markup=False, soft_wrap=True)


def plan(recipe: Recipe, seeds: tuple[int, ...]) -> dict[str, str]:
    compute, train, evaluate, limits = recipe.compute, recipe.train, recipe.evaluate, recipe.limits
    with torch.device("meta"):
        model = Model(recipe.model, recipe.data.vocab_size, train.sequence_tokens)
    sequences = train.batch_tokens // train.sequence_tokens
    share = sequences // compute.workers
    pieces = -(-share // train.microbatch_sequences)
    cpus = f"{compute.workers * compute.cpus_per_worker:g}" if compute.cpus_per_worker else "all"
    loop = f"{train.budget_seconds - train.reserve_seconds:g} s, then {train.reserve_seconds:g} s for EMA, calibration"
    return {
        "seeds": ", ".join(map(str, seeds)),
        "parameters": f"{parameter_count(model):,}",
        "training job": f"{compute.workers} workers on one node: {compute.workers * compute.gpus_per_worker:g} GPU, "
        f"{cpus} CPU",
        "training loop": f"{train.steps} steps" if train.steps else loop,
        "step": f"{train.batch_tokens:,} tokens = {sequences} sequences of {train.sequence_tokens:,}",
        "each worker": f"{share * train.sequence_tokens:,} tokens a step = {share} sequences in "
        f"{pieces} microbatch{'es' if pieces > 1 else ''}",
        "evaluation": f"{compute.evaluate_workers} ranks, {evaluate.order}, context {evaluate.window_tokens:,}, "
        f"chunks of {evaluate.chunk_tokens:,} tokens",
        "limits": f"{limits.total_bytes:,} bytes, {limits.train_seconds:g} s training, "
        f"{limits.evaluate_seconds:g} s evaluation",
    }
