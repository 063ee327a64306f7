"""What is printed after a record, in terminals of any width: each number whole, and each in its column."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pipeline.analysis.console import COLUMNS, cell, print_results
from pipeline.results.schema import Row


def rows(largest: bool) -> list[Row]:
    """Two finished seeds; with `largest`, numbers that are as long as any may be."""
    seeds = ((1 << 63) - 1, 7) if largest else (1337, 42)
    numbers = {name: 123456.78901 if largest else 1.23456 for _, name, _ in COLUMNS}
    numbers |= (
        {"steps": 1_234_567, "total_bytes": 15_999_999_999} if largest else {"steps": 1000, "total_bytes": 15_484_405}
    )
    return [Row("tiny", "laptop", "0", seed, "done", valid_bytes=7, **numbers) for seed in seeds]


def printed(told: list[Row], width: int) -> list[str]:
    out = io.StringIO()
    print_results(told, "/runs/tiny.parquet", Console(file=out, width=width, highlight=False))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 120, 400])
def test_no_number_is_cut(width: int, largest: bool) -> None:
    told = rows(largest)
    lines = printed(told, width)
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("table:"))]
    text = "\n".join(table)
    assert all(len(line) <= width for line in table[2:] if not line.startswith(("*", "over")))
    assert "…" not in text
    for row in told:
        of_seed = [line.split()[1:] for line in table if line.split()[:1] == [str(row.seed)]]
        assert [word for words in of_seed for word in words] == [
            cell(getattr(row, name), form) for _, name, form in COLUMNS
        ]
    parts = [line for line in table if line.split()[:1] == ["mean"]]
    assert len(parts) == len([line for line in table if line.split()[:1] == ["seed"] and "over" not in line])
    assert len(parts) == 1 or width < 400
    if not largest and width >= 80:
        assert len(parts) == 1


def test_a_terminal_of_a_few_columns_still_gets_whole_numbers() -> None:
    assert re.search(rf"^ *{(1 << 63) - 1} +1234567", "\n".join(printed(rows(True), 10)), re.M)
