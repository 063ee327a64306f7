"""What is watched of a record while it runs, under the names of the results table's columns.

Stages tell their progress in words of their own. Here those become columns, so that a chart, an alert and the table
speak of the same thing: a column that is told while its stage runs holds the value so far.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pipeline.results.schema import Row, column_docs

RENAMED = {
    "train": {
        "step": "steps",
        "tokens": "train_tokens",
        "elapsed_seconds": "train_seconds",
        "loss_nats": "train_loss_nats",
    },
    "score": {"tokens": "valid_tokens", "elapsed_seconds": "score_seconds"},
    "evaluate": {"tokens": "valid_tokens", "elapsed_seconds": "evaluate_seconds", "bpb": "bpb_final"},
}
"""What a stage's progress calls a column."""
POSITION = {"train": "steps", "score": "valid_tokens", "evaluate": "valid_tokens"}
"""The column that rises by itself while a stage runs: where in the stage the others were."""
BESIDE = {
    "fraction": "Part of the stage that is done, 0 to 1.",
    "matrix_rate": "Learning rate of the matrices, by the schedule.",
    "tokens_per_second": "Training tokens a second since the stage told last.",
}
"""Told too, and no columns."""
SO_FAR = {
    "train_loss_nats": "While training: mean loss a token of the last step.",
    "ms_per_step": "While training: milliseconds a step since the stage told last.",
}
"""Columns whose running value is not simply what the column would hold if the stage ended here."""
ROW = "row"
"""In place of a stage: the numbers of the seed's row, as far as they are known."""
NO_MEASURES = ("seed", "schema_version")
"""Numbers of a row that measure nothing."""

COLUMNS = frozenset(field.name for field in dataclasses.fields(Row))


def progress_numbers(stage: str, record: dict[str, Any]) -> dict[str, float]:
    """Collect a progress record's numbers by column, and those of `BESIDE`; empty for a stage that tells none."""
    names = RENAMED.get(stage, {})
    told = {names.get(name, name): float(value) for name, value in record.items() if isinstance(value, (int, float))}
    found = {name: value for name, value in told.items() if name in COLUMNS or name in BESIDE}
    if stage == "train" and found.get("tokens_per_second") and found.get("steps"):
        found["ms_per_step"] = 1000 * found["train_tokens"] / found["steps"] / found["tokens_per_second"]
    return found


def row_numbers(row: Row) -> dict[str, float]:
    """Collect the columns of a row that hold a finite number, True as 1."""
    values = dataclasses.asdict(row)
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and name not in NO_MEASURES and math.isfinite(value)
    }


def meanings() -> dict[str, str]:
    """Say in one line what each number is."""
    docs = column_docs() | BESIDE
    return {name: " ".join(filter(None, (text, SO_FAR.get(name)))) for name, text in docs.items()}
