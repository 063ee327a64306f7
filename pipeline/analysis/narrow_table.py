"""Tables in a terminal that is too narrow for them: in parts one below the other, so that no number is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDE = 10_000


def print_in_parts(make: Callable[[Sequence[int]], Table], columns: int, console: Console) -> None:
    """Print a table of so many columns in as few parts as the console's width asks for. make: what builds the table of
    these columns alone, behind those that every part begins with. A part of one column that is still too wide is
    printed as wide as it is."""
    begin = 0
    while begin < columns:
        end = columns
        while end - begin > 1 and least_width(make(range(begin, end)), console) > console.width:
            end -= 1
        table = make(range(begin, end))
        if (least := least_width(table, console)) > console.width:
            table.width = least
        console.print(table, crop=False)
        begin = end


def least_width(table: Table, console: Console) -> int:
    """Return the fewest columns of the console in which every word of the table is whole, and every cell of a column
    that does not wrap."""
    wide = console.options.update(width=WIDE)
    for column in table.columns:
        if column.no_wrap:
            cells = (column.header, *column.cells)
            column.min_width = max(Measurement.get(console, wide, cell).maximum for cell in cells)
    return Measurement.get(console, wide, table).minimum
