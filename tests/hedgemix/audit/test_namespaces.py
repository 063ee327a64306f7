"""What a process in namespaces of its own can find: what it was given, and no message left for it anywhere."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hedgemix.audit import namespaces, sandbox

MESSAGE = "the-next-token-is-42"
ASK = """
import json, sys
sys.path[:0] = {path!r}
from hedgemix.audit import sandbox
from pathlib import Path
name, file, more = {given!r}
outcome = sandbox.run("support.sandbox_work:" + name, dict(path=file, **more), [Path(file)])
print(json.dumps([outcome.value, vars(outcome.confined), outcome.confined.weakness()]))
"""


def asked(name: str, file: Path, before: tuple[str, ...] = (), **more: Any) -> tuple[Any, dict[str, Any], str]:
    """The work's answer, from a process that is started by another command: answer, guards, weakness."""
    root = Path(__file__).resolve().parent.parent.parent
    code = ASK.format(path=[str(root), str(root.parent)], given=(name, str(file), more))
    empty = tempfile.mkdtemp(dir=file.parent.parent)  # it is on the import path
    done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, cwd=empty)
    assert done.returncode == 0, done.stderr
    value, confined, weakness = json.loads(done.stdout.splitlines()[-1])
    return value, confined, weakness


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "given"
    path.write_text("what is in it")
    os.utime(path, (1_000_042, 1_000_042))
    with suppress(OSError):  # a file system without them
        os.setxattr(path, "user.message", MESSAGE.encode())
    (tmp_path / "beside").write_text(MESSAGE)
    (tmp_path / "link").symlink_to(MESSAGE)
    return path


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Messages in the environment, in shared memory, in a queue, behind a socket and in a process's command line."""
    monkeypatch.setenv("MESSAGE", MESSAGE)
    monkeypatch.setenv("PYTHONHASHSEED", "42")
    name = f"{MESSAGE}-{os.getpid()}"
    teller = subprocess.Popen([sys.executable, "-c", "input()", MESSAGE], stdin=subprocess.PIPE)
    libc = ctypes.CDLL(None)
    queue = libc.msgget(4711, 0o1666)
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix=MESSAGE), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        try:
            yield name
        finally:
            libc.msgctl(queue, 0, None)
            assert teller.stdin
            teller.stdin.close()
            teller.wait()


@pytest.fixture
def inside(file: Path) -> None:
    outcome = sandbox.run("support.sandbox_work:read", {"path": str(file)}, [file])
    if not outcome.confined.namespaces:
        pytest.skip("this system lets nobody have namespaces")


def test_no_message_left_anywhere_is_found(file: Path, left: str, inside: None) -> None:
    seen, confined, weakness = asked("look", file, socket_name=left)
    assert seen["content"] == "what is in it" and confined["namespaces"] and weakness == ""
    assert MESSAGE not in json.dumps(seen)
    assert set(seen["environment"]) <= {*sandbox.KEPT, "LANG", "LC_CTYPE", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert (
        seen["beside"] in (["given"], f"error {errno.EACCES}")
        and seen["size of what is beside"] == f"error {errno.ENOENT}"
    )
    assert seen["link"] == f"error {errno.ENOENT}" and seen["attribute"].startswith("error") and seen["changed"] == 0
    assert seen["shared memory"] == f"error {errno.ENOENT}"
    assert seen["devices"] == ["null", "zero", "urandom"] and "/var" not in seen["root"]
    assert seen["processes"] == [1] and seen["socket"] != 0 and seen["queue"] == errno.ENOENT
    assert seen["host"] is None and seen["interfaces"] in ([], ["lo"])


def test_the_same_messages_are_there_without_the_guards(file: Path, left: str) -> None:
    """So that the test above cannot pass because they were never left."""
    arguments = {"path": str(file), "socket_name": left}
    seen = sandbox.run("support.sandbox_work:look", arguments, None).value
    assert seen["beside"] == ["beside", "given", "link"] and seen["size of what is beside"] == len(MESSAGE)
    assert seen["link"] == MESSAGE and seen["changed"] == 1_000_042
    assert any(name.startswith(MESSAGE) for name in seen["shared memory"])
    assert os.getpid() in seen["processes"] and seen["socket"] == 0 and seen["queue"] >= 0
    assert "MESSAGE" not in seen["environment"], "the environment is named for every process"


def test_it_cannot_get_out_again(file: Path, inside: None) -> None:
    tried, _, _ = asked("undo", file)
    assert all(tried.values()), tried
    assert file.read_text() == "what is in it"


def test_the_folder_to_write_to_is_in_memory_and_nothing_of_it_is_left(
    file: Path, inside: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    outcome = sandbox.run("support.sandbox_work:keep", {"path": str(file)}, [file])
    assert outcome.value == "kept" and not list(place.iterdir())


UNSHARE = shutil.which("unshare") or ""


@pytest.mark.skipif(not UNSHARE, reason="no command unshare")
def test_a_user_without_privileges_has_them_too(file: Path, left: str, inside: None) -> None:
    seen, confined, _ = asked("look", file, (UNSHARE, "-U", "--map-user=1000", "--map-group=1000"), socket_name=left)
    assert confined["namespaces"] and MESSAGE not in json.dumps(seen) and seen["processes"] == [1]


@pytest.mark.skipif(not UNSHARE, reason="no command unshare")
def test_where_they_are_forbidden_the_other_guards_are_up_and_it_is_said(file: Path, inside: None) -> None:
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    error, confined, weakness = asked("read_in_c", file, (UNSHARE, "-Ur", "sh", "-c", forbid, "sh"))
    assert error == 0 and not confined["namespaces"] and weakness.startswith("weaker, without namespaces")
    error, confined, _ = asked("read_in_c_beside", file, (UNSHARE, "-Ur", "sh", "-c", forbid, "sh"))
    assert error == (errno.EACCES if confined["landlock"] else 0)


def test_of_a_folder_of_source_code_only_code_is_there(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "module.py").touch()
    (tmp_path / "text.txt").touch()
    (tmp_path / "site-packages").mkdir()
    assert [Path(name).name for name in namespaces.code(str(tmp_path))] == ["module.py", "package"]
    assert namespaces.code(str(tmp_path / "site-packages")) == [str(tmp_path / "site-packages")]
    assert namespaces.code(str(tmp_path / "nowhere")) == []


def test_what_was_not_in_force_is_told() -> None:
    full = sandbox.Confined(landlock=7, namespaces=True)
    assert full.guarded_by() == "namespaces, Landlock 7, an audit hook" and full.weakness() == ""
    assert "C code" not in sandbox.Confined(landlock=7).weakness() and "C code" in sandbox.Confined().weakness()
    assert sandbox.Confined().guarded_by() == "an audit hook"
