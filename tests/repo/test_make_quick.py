"""`make quick` runs many tests, and none that starts Ray or a process."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SLOW = {
    "ray",
    "subprocess",
    "multiprocessing",
    "torch.multiprocessing",
    "support.tiny_record",
    "support.rank_processes",
}
"""Modules whose import says that a test starts Ray or a process."""
STARTS = {"ray_session", "undisturbed", "undisturbed_long"}
"""Fixtures that do."""
FEWEST = 150


def selected() -> list[Path]:
    """Return the test files of the Makefile's QUICK; raises AssertionError for a path that is not there."""
    [paths] = re.findall(r"^QUICK := (.*(?:\\\\\n.*)*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = []
    for path in [ROOT / name for name in paths.replace("\\", " ").split()]:
        files = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        assert files and all(file.is_file() for file in files), f"{path} has no tests"
        found += files
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def modules(tree: ast.AST) -> set[str]:
    """Return what is imported anywhere in the file: modules, and names of modules as if they were modules too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found | {name.partition(".")[0] for name in found}


def reasons(source: str) -> set[str]:
    """Return why a test file is not for `make quick`."""
    tree = ast.parse(source)
    wanted = {argument.arg for function in functions(tree) for argument in function.args.args}
    return modules(tree) & SLOW | wanted & STARTS


def test_many_tests_are_selected() -> None:
    tests = [each for file in selected() for each in functions(ast.parse(file.read_text()))]
    assert sum(each.name.startswith("test_") for each in tests) >= FEWEST


@pytest.mark.parametrize("file", selected(), ids=lambda file: file.name)
def test_no_selected_file_starts_ray_or_a_process(file: Path) -> None:
    assert not reasons(file.read_text())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import ray.train", "ray"),
        ("from ray import train", "ray"),
        ("def f():\n    import subprocess", "subprocess"),
        ("from torch import multiprocessing", "torch.multiprocessing"),
        ("import torch.multiprocessing as mp", "torch.multiprocessing"),
        ("from support import tiny_model, tiny_record", "support.tiny_record"),
        ("def test_x(text, undisturbed): ...", "undisturbed"),
    ],
)
def test_the_check_sees_each_way(source: str, reason: str) -> None:
    assert reasons(source) == {reason}
