"""The report of a record: one HTML page that needs no other file, and its markdown twin, from the table and the files
behind it. Nothing is computed again; what is not there is said."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hedgemix import __version__
from pipeline import evidence, figures, page, significance, verdict
from pipeline.page import Page, Plot
from pipeline.records import Record

PAGE, TWIN, FIGURES = "report.html", "report.md", "figures"


def compose(record: Record, against: float | None = None) -> Page:
    """against: a published score in bits per byte to test against, on the same text. What averages over seeds is left
    out where they must not be averaged."""
    averages = [] if significance.mixed(record.done) else [evidence.ladder(record)]
    along = [] if significance.mixed(record.done) else [evidence.along(record), evidence.helped(record)]
    sections = [
        verdict.seeds(record),
        verdict.sure(record, against),
        *averages,
        verdict.handed_in(record),
        *along,
        evidence.training(record),
        evidence.inside(record),
        evidence.time(record),
        evidence.audits(record),
        evidence.origin(record),
    ]
    return Page(f"Record {record.name}", verdict.lead(record, against), sections)


def write(record: Record, against: float | None = None) -> Path:
    """report.html, report.md and its figures in the record's folder, on the store too; returns the page's path."""
    composed = compose(record, against)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    foot = f"Written {written} by hedgemix {__version__} from {record.name}.parquet and the files of its steps."
    contents = {
        PAGE: page.html(composed, foot),
        TWIN: page.markdown(composed, foot, FIGURES),
    }
    for section in composed.sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                contents[f"{FIGURES}/{block.name}.svg"] = figures.plain(block.svg)
    for name, content in contents.items():
        record.storage.write_bytes(record.folder / name, content.encode())
    return record.folder / PAGE
