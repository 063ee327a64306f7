"""`record.py --status DIR`: how far the records of a runs folder are, on one screen. It needs no Ray."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hedgemix.config import RecipeError
from hedgemix.options import READER_GONE, output_is_unread
from hedgemix.runtime.layout import LOCK, RECIPE, STEP_NAMES
from pipeline.analysis.narrow_table import print_in_parts
from pipeline.monitor import status
from pipeline.monitor.status import DamagedError, State
from pipeline.storage.store import Storage, open_existing

STYLES = {"done": "green", "failed": "bold red", "damaged": "bold red", "at work": "bold", "stopped": "yellow"}
HEADINGS = ("state", "seconds", "starts", "")
"""Of a step, behind its seed and its name; the last is a note."""


class Parser(argparse.ArgumentParser):
    """Parses options as argparse does, and raises RecipeError, in one line, for what it cannot."""

    def error(self, message: str) -> NoReturn:
        """Refuse the options."""
        raise RecipeError(f"{message}; {self.format_usage().strip()}")


def main(arguments: list[str]) -> int:
    """Run `--status DIR [--record NAME]`; returns the exit code."""
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    parser = Parser(prog="pipeline/record.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--status", required=True, metavar="DIR", help="the runs folder: what --out names")
    parser.add_argument("--record", metavar="NAME", help="only this record")
    try:
        options = parser.parse_args(arguments)
        storage = open_existing(options.status)
        for name in status.names(storage, options.record):
            show(storage, name, console)
    except RecipeError as error:
        errors.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output_is_unread():
            return READER_GONE
        errors.print(f"error: {type(error).__name__}: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1
    return 0


def show(storage: Storage, record: str, console: Console) -> None:
    """Print one record: its driver, its steps' states, its failed seeds and its table."""

    def line(text: str) -> None:
        console.print(strip_control_characters(text), markup=False, soft_wrap=True)

    folder = storage.record_folder(record)
    line(f"{record}: {status.driver(storage, folder / LOCK)}")
    try:
        steps_json = status.read(storage, folder / STEP_NAMES)
        recipe = status.read(storage, folder / RECIPE) or {}
        if steps_json is None:
            line("  no steps.json yet: its data are being prepared, or an older hedgemix began it")
        else:
            states = list(status.states(storage, steps_json, recipe))
            print_in_parts(lambda columns: table(states, columns), len(HEADINGS), console)
    except DamagedError as error:
        line(f"  {error}; the record's command writes it again, or says what to do")
    path = storage.root / f"{record}.parquet"
    for row in status.rows(storage, path):
        if row.get("status") == "failed":
            line(f"seed {row.get('seed')} failed: {row.get('error')}")
    line(f"table: {storage.where(path)}{'' if storage.modified(path) else ' (not yet)'}\n")


def table(states: list[tuple[str, State]], columns: Sequence[int] = range(len(HEADINGS))) -> Table:
    """Draw the steps' states, a line each; of HEADINGS these columns alone."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("seed", "step", *(HEADINGS[column] for column in columns)):
        right = heading in ("seed", "seconds", "starts")
        shown.add_column(heading, justify="right" if right else "left", no_wrap=bool(heading), overflow="fold")
    for seed, each in states:
        style = STYLES.get(each.state, "dim")
        seconds = "" if each.seconds is None else f"{each.seconds:,.1f}"
        starts = "" if each.starts is None else f"{each.starts:.0f}"
        told = (each.state, style), (seconds, ""), (starts, ""), (each.note, "")
        cells = (seed, ""), (each.step, ""), *(told[column] for column in columns)
        shown.add_row(*(Text(strip_control_characters(cell), style) for cell, style in cells))
    return shown


def strip_control_characters(text: str) -> str:
    """Remove colours and control characters: a terminal obeys those."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text)))
