"""The bundle holds what an entry module imports, and only that."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from hedgemix.config import RecipeError
from hedgemix.runtime import source_bundle


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "bundled_example"
    for name, source in {
        "__init__": "VERSION = 1\n",
        "entry": "import os\nimport bundled_example.plain\nfrom bundled_example import attribute, VERSION\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bundled_example.typed\n"
        "else:\n    import bundled_example.untyped\n",
        "plain": "def f():\n    from . import lazy\n",
        "attribute": "from .deep.inner import value\nfrom .deep import other\n",
        "lazy": "raise RuntimeError('bundling must not import')\n",
        "typed": "",
        "untyped": "import bundled_example_of_another",
        "deep/__init__": "from .beside import x\n",
        "deep/inner": "from ..parent import y\nimport bundled_example.entry\n",
        "deep/other": "",
        "deep/beside": "",
        "parent": "# é\n",
        "unused": "",
        "broken": "def",
        "dangling": "import bundled_example.nowhere\n",
    }.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    source_bundle.sources.cache_clear()
    return root


def test_follows_imports_inside_the_package(package: Path) -> None:
    names = (
        "attribute",
        "deep",
        "deep.beside",
        "deep.inner",
        "deep.other",
        "entry",
        "lazy",
        "parent",
        "plain",
        "untyped",
    )
    expected = ("bundled_example", *(f"bundled_example.{name}" for name in names))
    assert tuple(source_bundle.sources("bundled_example.entry")) == expected


def test_holds_the_sources(package: Path) -> None:
    found = source_bundle.sources("bundled_example.entry")
    assert found["bundled_example.parent"] == "" and found["bundled_example.entry"].startswith("import os\n")
    before = source_bundle.digest("bundled_example.entry")
    (package / "parent.py").write_text("# another comment\n\n")
    source_bundle.sources.cache_clear()
    assert source_bundle.digest("bundled_example.entry") == before
    (package / "parent.py").write_text("y = 1\n")
    source_bundle.sources.cache_clear()
    assert source_bundle.digest("bundled_example.entry") != before


SOURCE = '''"""What it is."""

import os  # why


class Error(ValueError):
    """A mistake."""


class Point:
    x: int = 0  # "not" a string
    """How far."""

    def text(self) -> str:
        """In words.

        Long ones.
        """
        return """
    # kept, as is

      too"""


def nothing() -> None:
    """Does nothing."""
    # at all


if os.sep == "/":
    "alone"
else:
    names = [
        "a",  # first

        "#b",
    ]
'''
SQUEEZED = '''import os
class Error(ValueError):
 pass
class Point:
 x: int = 0
 def text(self) -> str:
  return """
    # kept, as is

      too"""
def nothing() -> None:
 pass
if os.sep == "/":
 pass
else:
 names = [
  "a",
  "#b",
 ]
'''


def test_what_only_people_read_is_left_out() -> None:
    assert source_bundle.squeezed(SOURCE, ast.parse(SOURCE)) == SQUEEZED


def without_documentation(text: str) -> str:
    """What the source says to Python."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list) and statements:
                left = [each for each in statements if not source_bundle._is_string(each)]
                setattr(node, block, left or [ast.Pass()])
    return ast.dump(tree)


def test_the_library_says_the_same_without() -> None:
    for name, source in source_bundle.sources("hedgemix.standalone.main").items():
        module = __import__(name, fromlist=["x"])
        assert without_documentation(source) == without_documentation(inspect.getsource(module)), name


def test_faults_are_named(package: Path) -> None:
    with pytest.raises(RecipeError, match="bundled_example.missing"):
        source_bundle.sources("bundled_example.missing")
    with pytest.raises(RecipeError, match="bundled_example.nowhere is imported but"):
        source_bundle.sources("bundled_example.dangling")
    with pytest.raises(RecipeError, match="broken.py cannot be bundled"):
        source_bundle.sources("bundled_example.broken")
    with pytest.raises(RecipeError, match="no_such_package"):
        source_bundle.sources("no_such_package.entry")


def test_reading_an_artifact_needs_neither_quantizer_nor_trainer() -> None:
    entropy = {f"hedgemix.entropy.{name}" for name in ("gaussian_tables", "matrices", "rans", "vectors")}
    folders = {"hedgemix", *(f"hedgemix.{name}" for name in ("artifact", "data", "entropy", "runtime"))}
    parts = {"artifact.format", "artifact.sections", "artifact.tensors", "runtime.files"}
    parts |= {"config", "model_config", "train_config"}
    memory = {"data.memory", "data.shards", "data.tokenizer", "data.case_markers"}
    others = {f"hedgemix.{name}" for name in parts | memory}
    assert source_bundle.sources("hedgemix.artifact.format").keys() == folders | entropy | others
