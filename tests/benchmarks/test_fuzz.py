"""Damaged artifacts with right checksums are refused, in bounded memory and time; `benchmarks/faults/fuzz.py` does
more."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

MUTATIONS = int(os.environ.get("HEDGEMIX_MUTATIONS", "300"))


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "faults" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_damaged_files_are_refused_or_read_as_what_they_declare(fuzz: ModuleType, tmp_path: Path) -> None:
    outcome = fuzz.run(fuzz.small(), MUTATIONS, 0, tmp_path)
    assert sum(outcome.counts.values()) == MUTATIONS
    assert outcome.counts["read"] < 0.2 * MUTATIONS  # weights or numbers that a right checksum vouches for
    assert outcome.longest_seconds < 5 and outcome.peak_bytes < outcome.before_bytes + 2**30
