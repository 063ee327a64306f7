"""What a Ray of this machine alone is told of a machine that leaves it no choice."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hedgemix.config import RecipeError
from pipeline.execution import own_ray


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Folders that nothing can be written to, whoever runs the tests."""
    closed: set[str] = set()
    real = os.access
    monkeypatch.setattr(
        own_ray.os, "access", lambda path, mode: not (str(path) in closed and mode & os.W_OK) and real(path, mode)
    )
    return closed


def test_sockets_lie_in_a_short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = own_ray.SOCKET_CHARACTERS - len(own_ray.BELOW)
    short, long = tmp_path / "s", tmp_path / ("l" * 107)
    short.mkdir()
    long.mkdir()
    monkeypatch.setattr(own_ray, "SOCKET_CHARACTERS", len(str(short)) + len(own_ray.BELOW))
    for environment in ({}, {"TMPDIR": ""}, {"TMPDIR": str(short)}, {"RAY_TMPDIR": str(short), "TMPDIR": str(long)}):
        before = dict(environment)
        own_ray.choose_folder(environment)
        assert environment == before
    for folder in (long, tmp_path / "missing"):
        environment = {"TMPDIR": str(folder)}
        own_ray.choose_folder(environment)
        assert environment == {"TMPDIR": str(folder), "RAY_TMPDIR": "/tmp"}
    with pytest.raises(RecipeError, match=f"RAY_TMPDIR {long} is too long.*set RAY_TMPDIR"):
        own_ray.choose_folder({"RAY_TMPDIR": str(long)})
    with pytest.raises(RecipeError, match="missing is no folder that can be written to; set RAY_TMPDIR"):
        own_ray.choose_folder({"RAY_TMPDIR": str(tmp_path / "missing")})
    monkeypatch.setattr(own_ray, "SHORT", str(tmp_path / "missing"))
    with pytest.raises(RecipeError, match=f"TMPDIR {long} is too long.*set RAY_TMPDIR"):
        own_ray.choose_folder({"TMPDIR": str(long)})
    assert most >= 30


def test_a_folder_that_another_user_s_ray_has_to_itself_is_left_to_it(
    tmp_path: Path, read_only: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_ray, "SHORT", str(tmp_path))
    monkeypatch.setattr(own_ray, "SOCKET_CHARACTERS", 1000)
    own = tmp_path / f"hedgemix-{os.getuid()}"
    (tmp_path / "ray").mkdir()
    for given in ({"TMPDIR": str(tmp_path)}, {"TMPDIR": str(tmp_path / "missing")}):
        environment = dict(given)
        own_ray.choose_folder(environment)
        assert environment.get("RAY_TMPDIR", str(tmp_path)) == str(tmp_path) and not own.exists()
    read_only.add(str(tmp_path / "ray"))
    for given in ({"TMPDIR": str(tmp_path)}, {"TMPDIR": str(tmp_path / "missing")}):
        environment = dict(given)
        own_ray.choose_folder(environment)
        assert environment["RAY_TMPDIR"] == str(own) and own.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_name_has_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home(**environment: str) -> str | None:
        own_ray.choose_home(environment)
        return environment.get("HOME")

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(own_ray, "SHORT", str(tmp_path))
    assert home() is None and not list(tmp_path.iterdir())
    monkeypatch.setattr(own_ray.pwd, "getpwuid", nobody)
    assert home(HOME="/mine") == "/mine"
    assert home() == home(HOME="") == str(tmp_path / f"hedgemix-{os.getuid()}")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("PYTHONOPTIMIZE", "2", "1"),
        ("PYTHONOPTIMIZE", "1", "1"),
        ("PYTHONOPTIMIZE", "", ""),
        ("PYTHONWARNINGS", "error", "default"),
        ("PYTHONWARNINGS", "ignore,error::DeprecationWarning", "default"),
        ("PYTHONWARNINGS", "always", "always"),
    ],
)
def test_ray_s_processes_have_docstrings_and_do_not_end_with_warnings(
    name: str, given: str, kept: str, home: Path
) -> None:
    environment = {"HOME": str(home), name: given}
    own_ray.prepare(environment)
    assert environment[name] == kept
    environment = {"HOME": str(home)}
    own_ray.prepare(environment)
    assert name not in environment


def test_too_few_open_files_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(64, -1), (64, own_ray.FEWEST_FILES), (64, 64)]
    monkeypatch.setattr(own_ray.resource, "getrlimit", lambda name: limits.pop(0))
    own_ray.prepare({"HOME": str(home)})
    own_ray.prepare({"HOME": str(home)})
    with pytest.raises(RecipeError, match="may open 64 files here, and Ray takes 96; raise it with ulimit -n"):
        own_ray.prepare({"HOME": str(home)})


def test_a_full_disk_is_told_before_ray_meets_it(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [own_ray.LEAST_BYTES, own_ray.LEAST_BYTES - 2**20]
    asked: list[Path | str] = []
    monkeypatch.setattr(
        own_ray.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[len(asked)], told=asked.append(path))
    )
    monkeypatch.setattr(own_ray, "SOCKET_CHARACTERS", 1000)
    environment = {"HOME": str(home), "RAY_TMPDIR": str(tmp_path)}
    own_ray.prepare(environment)
    (tmp_path / "ray").mkdir()
    with pytest.raises(RecipeError, match=f"{tmp_path} has 31 MiB left, and Ray takes 32; make room there"):
        own_ray.prepare(environment)
    assert asked == [str(tmp_path), tmp_path / "ray"]


def test_what_ray_puts_below_its_folder_is_as_long_as_supposed() -> None:
    from ray._private import node, ray_constants

    source = Path(node.__file__).read_text(encoding="utf-8")
    assert 'default_prefix="plasma_store"' in source and 'f"session_{date_str}_{os.getpid()}"' in source
    assert '"%Y-%m-%d_%H-%M-%S_%f"' in source and '"sockets"' in source and ray_constants


def test_a_home_that_takes_no_token_leaves_it_in_the_environment(home: Path, read_only: set[str]) -> None:
    def token(**environment: str) -> str | None:
        own_ray.choose_token(environment)
        return environment.get("RAY_AUTH_TOKEN")

    assert token(HOME=str(home)) is None  # Ray makes ~/.ray/auth_token
    first, second = token(HOME=str(home / "missing")), token()
    assert first and second and len(first) == 64 and first != second
    read_only.add(str(home))
    assert token(HOME=str(home))
    assert token(HOME=str(home), RAY_AUTH_MODE="disabled") is None
    assert token(HOME=str(home), RAY_AUTH_TOKEN="mine") == "mine"
    assert token(HOME=str(home), RAY_AUTH_TOKEN_PATH="/a/file") is None
    (home / ".ray").mkdir()
    assert token(HOME=str(home)) is None
    read_only.add(str(home / ".ray"))
    assert token(HOME=str(home))
    (home / ".ray" / "auth_token").write_text("there", encoding="utf-8")
    assert token(HOME=str(home)) is None
