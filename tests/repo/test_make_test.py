"""`make test` runs every test file once, whichever of its processes has it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_file_of_tests_is_run_by_one_process() -> None:
    told = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = [path for line in told.splitlines() if '-m "not cluster' in line for path in re.findall(r"tests/\S+", line)]
    files = [
        file
        for path in named
        for file in (sorted((ROOT / path).rglob("test_*.py")) if path.endswith("/") else [ROOT / path])
    ]
    assert Counter(files) == Counter(sorted((ROOT / "tests").rglob("test_*.py")))
