"""What the command prints: the plan before a record, the table after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hedgemix.config import Recipe
from hedgemix.model import Model, parameter_count
from pipeline.results import Row, mean_and_deviation

COLUMNS: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("train s", lambda row: row.train_seconds, ".1f"),
    ("steps", lambda row: row.steps, ",.0f"),
    ("full", lambda row: row.bpb_full, ".4f"),
    ("quantized", lambda row: row.bpb_quantized, ".4f"),
    ("mixed", lambda row: row.bpb_mixed, ".4f"),
    ("TTT", lambda row: row.bpb_ttt, ".4f"),
    ("final", lambda row: row.bpb_final, ".4f"),
    ("published*", lambda row: row.bpb_published, ".4f"),
    ("bytes", lambda row: row.total_bytes, ",.0f"),
    ("eval s", lambda row: row.evaluate_seconds, ".1f"),
)


def print_results(rows: list[Row], parquet: Path, console: Console) -> None:
    """One line a seed, mean and sample standard deviation over the finished ones, and how to load the table."""
    table = Table(title=f"{rows[0].record}: bits per byte of {rows[0].valid_bytes:,} bytes of held-out text")
    table.add_column("seed", justify="right")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", style="bold" if heading == "final" else None)
    done = [row for row in rows if row.status == "done"]
    for row in rows:
        table.add_row(str(row.seed), *(cell(value(row), form) for _, value, form in COLUMNS))
    if done:
        table.add_section()
        pairs = [mean_and_deviation([value(row) or 0.0 for row in done]) for _, value, _ in COLUMNS]
        table.add_row("mean", *(cell(mean, form) for (mean, _), (_, _, form) in zip(pairs, COLUMNS, strict=True)))
        if len(done) > 1:
            table.add_row("std", *(cell(std, form) for (_, std), (_, _, form) in zip(pairs, COLUMNS, strict=True)))
    console.print(table)
    if done:
        masses = [row.published_mass for row in done if row.published_mass is not None]
        mass = f"its probabilities sum to {sum(masses) / len(masses):.1f} on average" if masses else "not normalised"
        console.print(f"* the published five-expert rule, not a code length: {mass}")
        over = [str(row.seed) for row in done if not row.within_limits]
        if over:
            console.print(f"over the recipe's limits (limit_bytes, seconds): seeds {', '.join(over)}")
    for row in rows:
        if row.status != "done":
            console.print(f"seed {row.seed} {row.status}: {row.error or 'not finished'}", markup=False)
    console.print(f"table: {parquet}", soft_wrap=True)
    console.print(f'load:  python -c "import pandas; print(pandas.read_parquet({str(parquet.parent)!r}))"', soft_wrap=True)


def cell(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def print_plan(recipe: Recipe, seeds: tuple[int, ...], console: Console) -> None:
    """The resources, batch arithmetic and sizes of a record, from the same code that will run it."""
    for name, value in plan(recipe, seeds).items():
        console.print(f"{name:28} {value}", markup=False)


def plan(recipe: Recipe, seeds: tuple[int, ...]) -> dict[str, str]:
    compute, train, evaluate = recipe.compute, recipe.train, recipe.evaluate
    with torch.device("meta"):
        model = Model(recipe.model, recipe.data.vocab_size, train.sequence_tokens)
    sequences = train.batch_tokens // train.sequence_tokens
    share = sequences // compute.workers
    cpus = f"{compute.cpus_per_worker:g}" if compute.cpus_per_worker else "all"
    loop = train.budget_seconds - train.reserve_seconds
    budget = f"{train.steps} steps" if train.steps else f"{loop:g} s of {train.budget_seconds:g} s (rest: EMA, calibration)"
    return {
        "seeds": ", ".join(map(str, seeds)),
        "parameters": f"{parameter_count(model):,}",
        "training job": f"{compute.workers} workers on one node, {compute.gpus_per_worker:g} GPU and {cpus} CPU each",
        "node needs": f"{compute.workers * compute.gpus_per_worker:g} GPU, {compute.workers * compute.cpus_per_worker:g} CPU",
        "training loop": budget,
        "step": f"{train.batch_tokens:,} tokens = {sequences} sequences of {train.sequence_tokens:,}",
        "each worker": f"{share} sequences in {-(-share // train.microbatch_sequences)} microbatches of at most "
        f"{train.microbatch_sequences} = {share * train.sequence_tokens:,} tokens",
        "evaluation": f"{compute.evaluate_workers} ranks, {evaluate.order}, context {evaluate.window_tokens:,}, "
        f"chunks of {evaluate.chunk_tokens:,} tokens",
        "limits": f"{recipe.limits.total_bytes:,} bytes, {recipe.limits.train_seconds:g} s training, "
        f"{recipe.limits.evaluate_seconds:g} s evaluation",
    }
