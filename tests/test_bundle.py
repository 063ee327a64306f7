"""The bundle holds what an entry module imports, and only that."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import zstandard

from hedgemix import bundle
from hedgemix.artifact import ArtifactError


def unpacked(packed: bundle.CodeBundle) -> dict[str, str]:
    is_zstd = packed.data.startswith(b"\x28\xb5\x2f\xfd")
    plain = zstandard.decompress(packed.data) if is_zstd else lzma.decompress(packed.data, lzma.FORMAT_ALONE)
    parts = plain.decode().split("\0")
    return dict(zip(parts[:-1:2], parts[1::2], strict=True))


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
    return root


def test_follows_imports_inside_the_package(package: Path) -> None:
    result = bundle.code_bytes("bundled_example.entry")
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
    assert result.modules == ("bundled_example", *(f"bundled_example.{name}" for name in names))
    assert result.n_bytes == len(result.data)


def test_holds_the_sources(package: Path) -> None:
    result = bundle.code_bytes("bundled_example.entry")
    sources = unpacked(result)
    assert tuple(sources) == result.modules
    assert sources["bundled_example.parent"] == "# é\n"
    assert sources["bundled_example.plain"] == (package / "plain.py").read_text()


def test_repeats(package: Path) -> None:
    assert bundle.code_bytes("bundled_example.entry") == bundle.code_bytes("bundled_example.entry")


def test_faults_are_named(package: Path) -> None:
    with pytest.raises(ArtifactError, match="bundled_example.missing"):
        bundle.code_bytes("bundled_example.missing")
    with pytest.raises(ArtifactError, match="bundled_example.nowhere is imported but"):
        bundle.code_bytes("bundled_example.dangling")
    with pytest.raises(ArtifactError, match="broken.py cannot be bundled"):
        bundle.code_bytes("bundled_example.broken")
    with pytest.raises(ArtifactError, match="no_such_package"):
        bundle.code_bytes("no_such_package.entry")


def test_reading_an_artifact_needs_neither_quantizer_nor_trainer() -> None:
    parts = ("artifact", "files", "matrices", "rans", "stored", "vectors", "widths")
    assert bundle.code_bytes("hedgemix.artifact").modules == ("hedgemix", *(f"hedgemix.{part}" for part in parts))
