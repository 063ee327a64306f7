"""What code took part in an audit, and which of it nobody accounts for."""

from __future__ import annotations

import marshal
import os
import py_compile
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy
import pytest

from hedgemix.audit import checks, own_code, sandbox
from support import sandbox_work


def test_what_a_process_loads_is_accounted_for_but_for_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "given").touch()
    arguments = {"path": str(tmp_path / "given")}
    confined = sandbox.run("support.sandbox_work:load", arguments, [tmp_path / "given"]).confined
    assert {Path(name).name for name in confined.loaded} >= {"replay.py", "sandbox_work.py", "libtorch_cpu.so"}
    planted = [sandbox_work.__file__, str(Path(sandbox_work.__file__).with_name("__init__.py"))]
    assert own_code.unaccounted(confined.loaded) == [f"{name} (no RECORD names it)" for name in sorted(planted)]
    found = checks.self_contained(confined, "", 1, 0.0)
    assert not found.passed and "unknown code" in found.headline
    confined.loaded = [name for name in confined.loaded if name not in planted]
    assert checks.self_contained(confined, "", 1, 0.0).passed


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a package, its RECORD, and a module of no package."""
    site = tmp_path / "site-packages"
    (site / "thing-1.0.dist-info").mkdir(parents=True)
    (site / "thing.py").write_text("value = 1")
    (site / "table.txt").write_text("0 1 2")
    (site / "other.py").write_text("value = 1")
    lines = [f"{name},sha256={own_code.digest(str(site / name))},9" for name in ("thing.py", "table.txt")]
    (site / "thing-1.0.dist-info" / "RECORD").write_text("\n".join([*lines, "thing-1.0.dist-info/RECORD,,"]))
    (site / "thing-1.0.dist-info" / "METADATA").write_text("Name: thing\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    own_code.recorded.cache_clear()
    yield site
    own_code.recorded.cache_clear()


def test_a_package_as_it_was_installed_is_accounted_for(site: Path) -> None:
    installed = [str(site / name) for name in ("thing.py", "table.txt", "thing-1.0.dist-info/RECORD")]
    assert own_code.unaccounted([*installed, numpy.__file__, own_code.__file__, json_file()]) == []
    unknown = str(site / "other.py")
    assert own_code.unaccounted([unknown]) == [f"{unknown} (no RECORD names it)"]


@pytest.mark.parametrize("name", ["thing.py", "table.txt"])
def test_code_or_data_that_was_changed_after_it_was_installed_is_not(site: Path, name: str) -> None:
    (site / name).write_text("value = 2")
    assert own_code.unaccounted([str(site / name)]) == [f"{site / name} (its RECORD has another hash)"]


def test_beside_hedgemix_s_sources_nothing_is_its_own() -> None:
    """Its sources are what an audit names the hash of: neither a library nor bytecode without a source is one."""
    package = Path(own_code.__file__).parent
    for name in ("planted.so", "planted.pyc", "planted.txt"):
        assert own_code.unaccounted([str(package / name)]) == [f"{package / name} (no RECORD names it)"]


def test_notes_beside_sources_are_those_that_an_installer_noted_too(tmp_path: Path) -> None:
    distribution = metadata.distribution("hedgemix")
    notes = tmp_path / "hedgemix.egg-info"
    notes.mkdir()
    (notes / "entry_points.txt").write_text(distribution.read_text("entry_points.txt") or "")
    (notes / "top_level.txt").write_text("0.95 bits per byte\n")
    altered = os.path.realpath(notes / "top_level.txt")
    found = own_code.unaccounted(map(str, notes.iterdir()))
    assert found == [f"{altered} (no RECORD names it)"]


@pytest.mark.parametrize("mode", list(py_compile.PycInvalidationMode))
def test_bytecode_that_is_another_program_s_is_not_accounted_for(
    site: Path, mode: py_compile.PycInvalidationMode
) -> None:
    """Python runs it, and the source is as it was installed."""
    source, before = site / "thing.py", (site / "thing.py").stat().st_mtime_ns
    bytecode = Path(py_compile.compile(str(source), invalidation_mode=mode) or "")
    own_code.other_bytecode.cache_clear()
    assert own_code.unaccounted([str(source)]) == []
    header, planted = bytecode.read_bytes()[:16], marshal.dumps(compile("value = 7", str(source), "exec"))
    bytecode.write_bytes(header + planted)
    own_code.other_bytecode.cache_clear()
    assert own_code.unaccounted([str(source)]) == [f"{bytecode} (not the bytecode of its source)"]
    ran = subprocess.run([sys.executable, "-c", "import thing; print(thing.value)"], cwd=site, capture_output=True)
    assert ran.stdout == b"7\n"
    if mode is py_compile.PycInvalidationMode.TIMESTAMP:
        os.utime(source, ns=(before, before + 10**10))
        own_code.other_bytecode.cache_clear()
        assert own_code.unaccounted([str(source)]) == [], "stale: Python passes it over"
    bytecode.write_bytes(header + b"no code")
    os.utime(source, ns=(before, before))
    own_code.other_bytecode.cache_clear()
    assert own_code.unaccounted([str(source)]) != []


def test_what_no_record_names_is_told_why(site: Path) -> None:
    found = checks.self_contained(sandbox.Confined(loaded=[str(site / "other.py")]), "", 1, 0.0)
    assert not found.passed and "other.py (no RECORD names it)" in found.headline
    assert "have to be installed by pip" in found.statement


def json_file() -> str:
    import json

    return json.__file__
