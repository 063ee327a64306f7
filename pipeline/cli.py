"""The `hedgemix` command with what reads a record's table: the library's commands, and those of this package."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

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
    """Set two records beside each other: every seed, a test of the difference, the settings that differ."""

    run: tyro.conf.Positional[str]
    """The record's parquet file."""
    other: tyro.conf.Positional[str]
    """The parquet file of the one it is compared with."""


@dataclass(frozen=True)
class Study:
    """Set the variants of a study beside their base: differences by seed with intervals, what is significant, what it
    costs. Prints a table, and writes study.html, study.md and study.parquet beside the study's file."""

    run: tyro.conf.Positional[str]
    """The study.json (also s3:// or gs://), its folder, or a runs folder with one study."""


def _report(command: Report) -> None:
    from pipeline.analysis import records  # seconds to import, and matplotlib
    from pipeline.report import build as report
    from pipeline.report import summary

    record = records.load(command.run)
    path = report.write(record, command.against)
    console = Console(highlight=False, markup=False)
    for line in summary.key_findings(record, command.against):
        console.print(line.replace("`", ""), markup=False, soft_wrap=True)
    console.print(f"report: {record.storage.where(path)}", markup=False, soft_wrap=True)


def _compare(command: Compare) -> None:
    from pipeline.analysis import comparison, records

    comparison.show(records.load(command.run), records.load(command.other), Console(highlight=False, markup=False))


def _study(command: Study) -> None:
    from pipeline.analysis import study, study_table, verdicts
    from pipeline.report import study_page

    loaded = study.load(command.run)
    found = verdicts.findings(loaded)
    console = Console(highlight=False, markup=False)
    study_table.show(loaded, found, console)
    path = study_page.write(loaded, found)
    for name, place in (("table", path.with_name(study_page.TABLE)), ("report", path)):
        console.print(f"{name}: {loaded.storage.where(place)}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Submit:
    """Write a finished and audited record as a folder to hand in: train_gpt.py, which trains and scores a seed by
    itself, requirements.txt, a log a seed, submission.json and README.md. Refused, with every reason, when anything of
    it would not hold."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The record's parquet file, here or in a store, or a folder that holds one record alone."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write; not there yet, or empty."""
    author: str
    github_id: str
    name: str
    """Of the submission."""
    blurb: str
    """What it does, in a sentence or two."""
    track: str = "non-record"
    """The challenge's track that it is for."""
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat())
    """YYYY-MM-DD."""


def _submit(command: Submit) -> None:
    from pipeline.submission.eligibility import About
    from pipeline.submission.folder import submit

    names = ("author", "github_id", "name", "blurb", "track", "date")
    told = submit(command.run, command.out, About(**{name: getattr(command, name) for name in names}))
    print(
        f"{command.out}: val_bpb {told['val_bpb']:.6f} of {len(told['seeds'])} seeds, {told['bytes_total']:,} of "
        f"{told['limits']['total_bytes']:,} bytes, {told['bytes_code']:,} of them train_gpt.py"
    )
    not_so = [fact.replace("_", " ") for fact, so in told["compliance"].items() if not so]
    if not_so:
        print(f"not so: {', '.join(not_so)}")


COMMANDS: cli.Commands = {**cli.COMMANDS, Report: _report, Compare: _compare, Study: _study, Submit: _submit}


def main() -> None:
    """Run the command line; exits with 2 after a user's mistake."""
    cli.main(COMMANDS)


if __name__ == "__main__":
    main()
