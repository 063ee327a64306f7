"""The `hedgemix` command with what reads a record's table: the library's commands, and those of this package."""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from rich.console import Console

from hedgemix import cli


@dataclass(frozen=True)
class Report:
    """Write the report of a record: a page that opens anywhere, and its markdown twin."""

    run: tyro.conf.Positional[str]
    """The record's parquet file (also s3:// or gs://), or a runs folder with one record."""
    against: float | None = None
    """A published score of the same text, in bits per byte, to test the record against."""


@dataclass(frozen=True)
class Compare:
    """Two records beside each other: every seed, a test of the difference, the settings that differ."""

    run: tyro.conf.Positional[str]
    """The record's parquet file."""
    other: tyro.conf.Positional[str]
    """The parquet file of the one it is compared with."""


def _report(command: Report) -> None:
    from pipeline import records, report  # seconds to import, and matplotlib

    record = records.load(command.run)
    path = report.write(record, command.against)
    console = Console(highlight=False)
    for line in report.verdict.lead(record, command.against):
        console.print(line.replace("`", ""), markup=False, soft_wrap=True)
    console.print(f"report: {record.storage.where(path)}", markup=False, soft_wrap=True)


def _compare(command: Compare) -> None:
    from pipeline import comparison, records

    comparison.show(records.load(command.run), records.load(command.other), Console(highlight=False))


COMMANDS: cli.Commands = {**cli.COMMANDS, Report: _report, Compare: _compare}


def main() -> None:
    """Entry point; exits with 2 after a user's mistake."""
    cli.main(COMMANDS)


if __name__ == "__main__":
    main()
