"""What code took part in an audit, and which of it nobody accounts for."""

from __future__ import annotations

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
    assert own_code.unaccounted(confined.loaded) == sorted(planted)
    found = checks.self_contained(confined, "", 1, 0.0)
    assert not found.passed and "unknown code" in found.headline
    confined.loaded = [name for name in confined.loaded if name not in planted]
    assert checks.self_contained(confined, "", 1, 0.0).passed


def test_a_package_that_was_changed_after_it_was_installed_is_not_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    (site / "thing-1.0.dist-info").mkdir(parents=True)
    (site / "thing.py").write_text("value = 1")
    (site / "other.py").write_text("value = 1")
    line = f"thing.py,sha256={own_code.digest(str(site / 'thing.py'))},9"
    (site / "thing-1.0.dist-info" / "RECORD").write_text(line)
    (site / "thing-1.0.dist-info" / "METADATA").write_text("Name: thing\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(site)
    own_code.recorded.cache_clear()
    try:
        assert own_code.unaccounted([str(site / "thing.py"), numpy.__file__, own_code.__file__, json_file()]) == []
        assert own_code.unaccounted([str(site / "other.py")]) == [str(site / "other.py")], "in no RECORD"
        (site / "thing.py").write_text("value = 2")
        assert own_code.unaccounted([str(site / "thing.py")]) == [str(site / "thing.py")]
    finally:
        own_code.recorded.cache_clear()


def json_file() -> str:
    import json

    return json.__file__
