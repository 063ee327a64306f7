"""The finished record that is handed in, or contradicts itself once it is spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import tiny_seed

CLOCKED = ["--train.steps", "0", "--train.budget-seconds", "1", "--train.reserve-seconds", "0.4"]


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of two seeds ended by the clock, as if their audits had passed; not to be changed."""
    recipe = tiny_seed.recipe(text, tmp_path_factory.mktemp("shards"), *CLOCKED)
    table = tiny_seed.make_record(recipe, tmp_path_factory.mktemp("runs"), (1, 2))
    tiny_seed.passed(table)
    return table


@pytest.fixture
def table(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil; its rows name the folder it was copied from."""
    return shutil.copytree(finished.parent, tmp_path / "runs") / finished.name
