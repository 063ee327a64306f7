"""The finished run that audits are tested on."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny_run import Record, make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A run to be read; tests that spoil one take a copy."""
    return make(tmp_path_factory.mktemp("made") / "runs")


@pytest.fixture
def record(made: Record, tmp_path: Path) -> Record:
    """A copy to spoil. Its paths are those of another folder that is not there, as at a reviewer's."""
    return made.moved(tmp_path / "runs")
