"""The table of docs/faults.md: made from measurements, and true of the tests that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import table as fault_table

LINE: dict[str, Any] = {
    "order": 2,
    "fault": "worker killed",
    "where": "in training",
    "repeated": "1 step, 0.2 s",
    "equal": True,
    "seconds": 12.34,
    "test": "test_faults.py::test_worker",
    "kind": "soak",
    "date": "2026-01-02",
    "load": 1.25,
    "cores": 2,
}


def test_the_last_measurement_of_each_fault_is_in_order(tmp_path: Path) -> None:
    lines = [LINE | {"seconds": 99.0}, LINE | {"order": 1, "fault": "disk full", "seconds": None, "load": 3.0}, LINE]
    measured, page = tmp_path / "lines", tmp_path / "faults.md"
    measured.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_text(f"before\n{fault_table.BEGIN}\nold\n{fault_table.END}\nafter\n")
    assert fault_table.main([str(measured), str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{fault_table.BEGIN}\n") and text.endswith(f"{fault_table.END}\nafter\n")
    assert "old" not in text and "99" not in text and "load average 1.2 to 3.0" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| fault", "| disk full", "| worker killed"]
    assert rows[2] == (
        "| worker killed | in training | 12.3 s | 1 step, 0.2 s | yes | `test_faults.py::test_worker` | `make soak` |"
    )
    assert fault_table.main([str(measured), str(page)]) == 0 and page.read_text() == text


def test_without_a_file_it_tells_its_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert fault_table.main([]) == 2 and "FAULTS_TABLE" in capsys.readouterr().err
    assert fault_table.main(["--help"]) == 0 and "FAULTS_TABLE" in capsys.readouterr().out


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", fault_table.PAGE.read_text())
    assert len(named) >= 18
    for file, name in named:
        found = [path.read_text() for path in Path(__file__).parent.parent.rglob(file)]
        assert any(f"def {name}(" in text for text in found), f"{file}::{name}"
