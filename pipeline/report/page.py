"""A page of sections, as HTML in one file and as its markdown twin: the same words and tables in both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Table:
    """Holds a table of text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()
    """Columns that matter most."""
    apart: int = 0
    """So many last rows sum up the others."""

    @property
    def right(self) -> list[bool]:
        """Say which columns hold numbers."""
        return [all(numeric(row[n]) for row in self.rows) for n in range(len(self.heads))]


@dataclass(frozen=True)
class Plot:
    """Holds a figure with its caption."""

    name: str
    """Of its file, beside the markdown."""
    svg: str
    caption: str


@dataclass(frozen=True)
class Points:
    """Holds a list; `good` says of each item whether it is well (None: neither), for a mark in front of it."""

    items: Sequence[str]
    good: Sequence[bool | None] = ()

    def marked(self) -> list[tuple[str, bool | None]]:
        """Pair each item with whether it is well."""
        return list(zip(self.items, self.good or [None] * len(self.items), strict=True))


@dataclass(frozen=True)
class Section:
    """Holds blocks under a heading."""

    title: str
    blocks: Sequence[str | Table | Plot | Points] = field(default_factory=tuple)
    """In order; a string is a paragraph. `code` in backticks."""


@dataclass(frozen=True)
class Page:
    """Holds what a report says, whatever it is written as."""

    title: str
    lead: Sequence[str]
    """What a hurried reader is told."""
    sections: Sequence[Section]


def html(page: Page, foot: str) -> str:
    """Write one file that needs no other, nor a network; nothing in it can run."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["inline"] = inline
    environment.filters["drawn"] = Markup  # our own figures; all text goes through autoescape
    environment.filters["kind"] = lambda block: type(block).__name__
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(page=page, foot=foot, grouped=grouped)


def inline(text: str) -> Markup:
    """Escape text, and mark `code` in it."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def grouped(blocks: Sequence[object]) -> list[list[object]]:
    """Group plots that follow each other, to stand beside each other where there is room."""
    groups: list[list[object]] = []
    for block in blocks:
        if isinstance(block, Plot) and groups and isinstance(groups[-1][0], Plot):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def numeric(cell: str) -> bool:
    """Say whether a cell is a number with its unit, empty, or n/a."""
    return bool(re.match(r"^[-+−]?[\d.,]+( ?(%|s|kB|B))?$|^$|^n/a$", cell))


def markdown(page: Page, foot: str, figures: str) -> str:
    """Write the page as markdown. figures: the folder of the plots' files, relative to the markdown's own."""
    parts = [f"# {page.title}", *(f"**{line}**" if n == 0 else line for n, line in enumerate(page.lead))]
    for section in page.sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(rows_of(block))
            elif isinstance(block, Plot):
                parts.append(f"![{block.caption}]({figures}/{block.name}.svg)\n\n*{block.caption}*")
            elif isinstance(block, Points):
                marks = {True: "✓ ", False: "✗ ", None: ""}
                parts.append("\n".join(f"- {marks[good]}{text}" for text, good in block.marked()))
            else:
                parts.append(block)
    return "\n\n".join([*parts, f"*{foot}*"]) + "\n"


def rows_of(table: Table) -> str:
    """Write a table's lines in markdown."""
    lines = [table.heads, ["---:" if right else "---" for right in table.right], *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
