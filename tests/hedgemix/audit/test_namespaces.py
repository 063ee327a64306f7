"""What a process in namespaces of its own can find: what it was given, and no message left for it anywhere."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hedgemix.audit import namespaces, sandbox, system_calls
from support import sandbox_work

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
    """Messages in the environment, in shared memory, in a queue, behind a socket, in a process's command line, in the
    keyring that children share, and in where a lock begins."""
    monkeypatch.setenv("MESSAGE", MESSAGE)
    monkeypatch.setenv("PYTHONHASHSEED", "42")
    name = f"{MESSAGE}-{os.getpid()}"
    teller = subprocess.Popen([sys.executable, "-c", "input()", MESSAGE], stdin=subprocess.PIPE)
    libc = ctypes.CDLL(None)
    queue = libc.msgget(4711, 0o1666)
    key = libc.syscall(sandbox_work.ADD_KEY, b"user", b"message", MESSAGE.encode(), len(MESSAGE), -3)
    common = open(sandbox_work.LOCKED, "rb")  # noqa: SIM115
    fcntl.lockf(common, fcntl.LOCK_SH, 1, 42)
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix=MESSAGE), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        try:
            yield name
        finally:
            common.close()
            libc.syscall(sandbox_work.KEYCTL, 21, key)  # invalidate
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
    assert seen["processes"] == [1] and seen["socket"] != 0 and seen["queue"] in (errno.ENOENT, errno.EPERM)
    if confined["filtered"]:
        assert seen["keyring"] == "" and seen["lock"] == f"error {errno.EPERM}"
    assert seen["host"] is None and seen["interfaces"] in ([], ["lo"])


def test_the_same_messages_are_there_without_the_guards(file: Path, left: str) -> None:
    """So that the test above cannot pass because they were never left."""
    arguments = {"path": str(file), "socket_name": left}
    seen = sandbox.run("support.sandbox_work:look", arguments, None).value
    assert seen["beside"] == ["beside", "given", "link"] and seen["size of what is beside"] == len(MESSAGE)
    assert seen["link"] == MESSAGE and seen["changed"] == 1_000_042
    assert any(name.startswith(MESSAGE) for name in seen["shared memory"])
    assert os.getpid() in seen["processes"] and seen["socket"] == 0 and seen["queue"] >= 0
    assert seen["keyring"] in (MESSAGE, "") and seen["lock"] == 42  # "": a container that has no keyrings
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
    assert ("without a filter" in weakness) != confined["filtered"]
    error, confined, _ = asked("read_in_c_beside", file, (UNSHARE, "-Ur", "sh", "-c", forbid, "sh"))
    assert error == (errno.EACCES if confined["landlock"] else 0)


def test_of_a_folder_of_source_code_only_code_is_there(tmp_path: Path) -> None:
    for name in ("package/__init__.py", "package/data.txt", "package/inner/part.py", "package/fast.so",
                 "package/__pycache__/part.cpython-311.pyc", "thing.egg-info/entry_points.txt", "runs/code.py",
                 "module.py", "text.txt", "site-packages/all.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert [str(Path(name).relative_to(tmp_path)) for name in namespaces.code(str(tmp_path))] == [
        "module.py", "package/__init__.py", "package/fast.so", "package/inner/part.py",
        "thing.egg-info/entry_points.txt",
    ]  # fmt: skip
    assert namespaces.code(str(tmp_path / "site-packages")) == [str(tmp_path / "site-packages")]
    assert namespaces.code(str(tmp_path / "nowhere")) == []


@pytest.mark.parametrize(("column", "machine"), system_calls.MACHINES.values())
def test_the_filter_refuses_what_is_named_and_lets_the_rest_pass(column: int, machine: int) -> None:
    """By a plain reading of its instructions."""
    code = system_calls.program(column, machine)
    steps = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]

    def verdict(number: int, command: int = 0, name: int = machine) -> int:
        told, at, held = {0: number, 4: name, 24: command}, 0, 0
        while True:
            operation, holds, fails, value = steps[at]
            if operation == system_calls.RETURN:
                return value
            if operation == system_calls.LOAD:
                held, skip = told[value], 0
            else:
                skip = holds if (held == value if operation == system_calls.EQUAL else held >= value) else fails
            at += 1 + skip

    fcntl_call, refused = system_calls.FCNTL[column], {numbers[column] for numbers in system_calls.CALLS.values()}
    for number in range(470):
        expected = system_calls.REFUSE if number in refused else system_calls.ALLOW
        assert verdict(number) == expected and verdict(number + system_calls.OTHER_NUMBERS) == system_calls.REFUSE
        assert verdict(number, name=0x40000003) == system_calls.REFUSE
    commands = {command for command in range(2000) if verdict(fcntl_call, command) == system_calls.REFUSE}
    assert commands == {fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW, 36, 37, 38}


def test_what_was_not_in_force_is_told() -> None:
    full = sandbox.Confined(landlock=7, namespaces=True, filtered=True)
    assert full.guarded_by() == "namespaces, Landlock 7, a filter of system calls, an audit hook"
    assert full.weakness() == "" and "keyrings" in sandbox.Confined(namespaces=True).weakness()
    assert "C code" not in sandbox.Confined(landlock=7).weakness() and "C code" in sandbox.Confined().weakness()
    assert sandbox.Confined().guarded_by() == "an audit hook"
