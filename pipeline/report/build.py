"""The report of a record: one HTML page that needs no other file, and its markdown twin, from the table and the files
behind it. Nothing is computed again; what is not there is said."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hedgemix import __version__
from pipeline.analysis import significance
from pipeline.analysis.records import Record
from pipeline.report import figures, page, sections, summary
from pipeline.report.page import Page, Plot
from pipeline.storage.store import Storage

PAGE, TWIN, FIGURES = "report.html", "report.md", "figures"


def compose(record: Record, against: float | None = None) -> Page:
    """Compose the report's page. against: a published score in bits per byte to test against, on the same text. What
    averages over seeds is left out where they must not be averaged."""
    averages = [] if significance.mixed(record.done) else [sections.ladder(record), sections.parts(record)]
    along = [] if significance.mixed(record.done) else [sections.along_text(record), sections.gains_and_losses(record)]
    parts = [
        summary.seeds(record),
        summary.statistical_tests(record, against),
        *averages,
        summary.handed_in(record),
        *along,
        sections.training(record),
        sections.inside(record),
        sections.time(record),
        sections.audits(record),
        sections.origin(record),
    ]
    return Page(f"Record {record.name}", summary.key_findings(record, against), parts)


def write(record: Record, against: float | None = None) -> Path:
    """Write report.html, report.md and its figures in the record's folder, on the store too; returns the page's
    path."""
    source = f"{record.name}.parquet and the files of its steps"
    write_page(record.storage, record.folder, compose(record, against), source, PAGE, TWIN)
    return record.folder / PAGE


def write_page(storage: Storage, folder: Path, composed: Page, source: str, html: str, markdown: str) -> None:
    """Write a page and its markdown twin under these names, and the twin's figures. source: what it was made from."""
    written = datetime.now(UTC).isoformat(timespec="seconds")
    foot = f"Written {written} by hedgemix {__version__} from {source}."
    contents = {html: page.html(composed, foot), markdown: page.markdown(composed, foot, FIGURES)}
    for section in composed.sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                contents[f"{FIGURES}/{block.name}.svg"] = figures.standalone_svg(block.svg)
    for name, content in contents.items():
        storage.write_bytes(folder / name, content.encode())
