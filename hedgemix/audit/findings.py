"""What an audit found, and how it is told: a line a check, a table, a report in markdown."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HEADLINE = 66
"""Most characters of a headline, so that a check's line fits 100 columns."""


@dataclass(frozen=True)
class Finding:
    """Holds what one check found."""

    name: str
    passed: bool
    headline: str
    """The figure that decides, in a few words."""
    statement: str
    """One sentence: what was found."""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def timed(check: Callable[[], Finding]) -> Finding:
    """Make a check, and add the seconds that it took to its finding."""
    began = time.monotonic()
    finding = check()
    return replace(finding, seconds=finding.seconds + time.monotonic() - began)


def failed(findings: Sequence[Finding]) -> list[str]:
    """List the names of the checks that failed."""
    return [finding.name for finding in findings if not finding.passed]


def print_finding(finding: Finding, console: Console) -> None:
    """Print one line: name, pass or FAIL, the figure, seconds."""
    from rich.text import Text  # what only compares does without: a GPU's benchmark runs where no rich is

    verdict = Text("pass", "green") if finding.passed else Text("FAIL", "bold red")
    line = Text.assemble(f"  {finding.name:17}", verdict, f"  {finding.headline[:HEADLINE]:{HEADLINE}}")
    console.print(line + Text(f" {finding.seconds:5.1f} s"), soft_wrap=True)


def markdown(title: str, facts: dict[str, Any], findings: Sequence[Finding]) -> str:
    """Write a report: what was audited, a table of the checks, and a sentence and the figures of each."""
    bad, verdict = failed(findings), "**Every check passed.**"
    if bad:
        verdict = f"**{len(bad)} of {len(findings)} checks FAILED: {', '.join(bad)}.**"
    lines = [f"# {title}", "", verdict, ""]
    lines += [f"- {name}: {number(value)}" for name, value in facts.items()]
    lines += ["", "| check | result | figure | seconds |", "|---|---|---|---|"]
    for finding in findings:
        cells = finding.name, "pass" if finding.passed else "**FAIL**", finding.headline.replace("|", "\\|")
        lines.append(f"| {' | '.join(cells)} | {finding.seconds:.1f} |")
    for finding in findings:
        lines += ["", f"## {finding.name}: {'pass' if finding.passed else 'FAIL'}", "", finding.statement, ""]
        lines += [f"- {name.replace('_', ' ')}: {number(value)}" for name, value in finding.figures.items()]
    return "\n".join(lines) + "\n"


def number(value: Any) -> str:
    """Show a value as a reader wants it: thousands with commas, fractions in six digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1e5 else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(number, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(part)}" for name, part in value.items()) or "none"
    return str(value)
