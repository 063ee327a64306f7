"""The table of docs/faults.md from what tests measured: python -m benchmarks.faults.table LINES [docs/faults.md]

LINES is the file that FAULTS_TABLE named when the tests ran. Of a fault measured twice the last line counts; a row of
the table that was not measured this time goes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- faults:table -->", "<!-- /faults:table -->"
HEAD = ["fault", "where it comes", "work goes on after", "work repeated", "same numbers", "test", "in"]


def read(path: Path) -> list[dict[str, Any]]:
    """The last line of each fault, in the table's order."""
    found = {line["fault"]: line for line in map(json.loads, path.read_text().splitlines())}
    return sorted(found.values(), key=lambda line: line["order"])


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, under the day, cores and load average it was measured at."""
    rows = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for line in lines:
        seconds = "-" if line["seconds"] is None else f"{line['seconds']:.1f} s"
        equal = "yes" if line["equal"] else "-"
        test, kind = f"`{line['test']}`", "`make soak`" if line["kind"] == "soak" else "`make test`"
        rows.append(
            f"| {line['fault']} | {line['where']} | {seconds} | {line['repeated']} | {equal} | {test} | {kind} |"
        )
    loads = [line["load"] for line in lines]
    days = sorted({line["date"] for line in lines})
    cores = "/".join(sorted({str(line["cores"]) for line in lines}))
    told = (
        f"Measured on {' and '.join(days)} with {cores} CPU cores, load average {min(loads):.1f} to {max(loads):.1f} "
        "(the tests' own processes, and whatever else the machine did)."
    )
    return "\n".join([told, "", *rows])


def write(page: Path, lines: list[dict[str, Any]]) -> None:
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{table(lines)}\n{END}{after}")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    write(Path(arguments[1]) if len(arguments) == 2 else PAGE, read(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
