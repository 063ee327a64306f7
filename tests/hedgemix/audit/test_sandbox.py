"""Work in a process of its own: what it may open, what is refused and by whom, what comes back."""

from __future__ import annotations

import errno
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from hedgemix.audit import sandbox
from hedgemix.audit.sandbox import WorkError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text("what is in it")
    return path


def run(name: str, path: Path, readable: list[Path] | None, **options: Any) -> sandbox.Outcome:
    return sandbox.run(f"support.sandbox_work:{name}", {"path": str(path)}, readable, **options)


@pytest.mark.parametrize("how", ["read", "read_descriptor"])
def test_a_file_it_is_told_of_is_read_and_noted(file: Path, how: str) -> None:
    logged: list[dict[str, Any]] = []
    outcome = run(how, file, [file], log=logged.append)
    assert outcome.value == "what is in it" and outcome.confined.refused == []
    assert outcome.confined.opened == [str(file)] and outcome.start_seconds > 0
    assert logged == ([{"reading": str(file)}] if how == "read" else [])


@pytest.mark.parametrize(
    ("how", "refused"),
    [
        ("read", "opening"),
        ("read_descriptor", "opening"),
        ("write", "writing"),
        ("remove", "os.remove"),
        ("connect", "socket."),
        ("start", "subprocess.Popen"),
        ("train", "importing hedgemix.train"),
    ],
)
def test_everything_else_is_refused(file: Path, how: str, refused: str) -> None:
    with pytest.raises(WorkError, match=f"isolated: {refused}") as caught:
        run(how, file, [file] if how in ("write", "remove") else [])
    assert caught.value.refused[0].startswith(refused) and file.read_text() == "what is in it"


def test_work_gives_way_to_a_conversation(file: Path) -> None:
    mine = os.nice(0)
    assert run("niceness", file, [file]).value == min(mine + sandbox.GIVE_WAY, 19)
    assert run("niceness", file, [file], talk=lambda heard, told: None).value == mine


def test_a_refusal_that_the_work_hides_is_known(file: Path) -> None:
    outcome = run("read_anyway", file, [])
    assert outcome.value == "none" and outcome.confined.refused == [f"opening {file}"]


def test_which_guards_are_up_is_told_before_the_work_can_lie_about_it(file: Path) -> None:
    """Without any of it, in an ordinary process."""
    confined = run("deny", file, []).confined
    assert confined.landlock < 99 and confined.refused == []
    assert confined.guarded_by() == run("read", file, [file]).confined.guarded_by()


@pytest.mark.parametrize("line", ["no JSON", "7", "{}", '{"confined": {"other": 1}}', '{"log": 1}'])
def test_what_is_no_answer_is_an_error(line: str) -> None:
    with pytest.raises(WorkError, match="wrote what is no answer"):
        sandbox.answer("some:work", line.encode())


def test_work_that_writes_its_own_answers_is_an_error() -> None:
    with pytest.raises(WorkError, match="support.sandbox_work:garble wrote what is no answer"):
        run("garble", Path("no answer"), [])


def test_what_is_read_beside_packages_code_is_told_with_it() -> None:
    """Data of a package that is installed can be opened, and has to be accounted for as its code has."""
    [notes] = [Path(str(each.locate())) for each in metadata.files("numpy") or () if each.name == "METADATA"]
    confined = run("read", notes, []).confined
    assert confined.refused == [] and os.path.realpath(notes) in confined.loaded


def test_a_link_is_what_it_leads_to(file: Path) -> None:
    link = file.with_name("link.py")
    link.symlink_to(file)
    with pytest.raises(WorkError, match="isolated: opening"):
        run("read", link, [])
    assert run("read", link, [link]).value == "what is in it"


def closed(confined: sandbox.Confined) -> int:
    """What C code hears that opens a file it was not given."""
    return errno.ENOENT if confined.namespaces else errno.EACCES if confined.landlock else 0


def test_where_the_kernel_can_it_refuses_c_code_too(file: Path) -> None:
    outcome = run("read_in_c", file, [])
    assert outcome.value == closed(outcome.confined)
    assert run("read_in_c", file, [file]).value == 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory")
def test_what_another_process_left_in_shared_memory_is_closed_to_c_code_too() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as left:
        outcome = run("read_in_c", Path(left.name), [])
    assert outcome.value == closed(outcome.confined)


def test_the_pipes_of_a_conversation_are_open_and_what_the_work_says_first_is_heard_first(file: Path) -> None:
    heard: list[bytes] = []

    def talk(said: BinaryIO, hears: BinaryIO) -> None:
        for word in (b"one", b"two"):
            heard.append(said.read(3))
            hears.write(word)
            hears.flush()

    assert run("talk", file, [], talk=talk).value == ["one", "two"] and heard == [b"bid", b"bid"]
    with pytest.raises(WorkError, match="a last word"):
        run("hang_up", file, [], talk=talk)
    assert set(heard[2:]) == {b""}


def test_without_guards_it_is_an_ordinary_process(file: Path) -> None:
    outcome = run("read_in_c", file, None)
    assert outcome.value == 0 and outcome.confined == sandbox.Confined()
    assert run("read", file, None).value == "what is in it"


def test_there_is_a_folder_to_write_to_and_it_is_gone_afterwards(file: Path) -> None:
    outcome = run("keep", file, [])
    assert outcome.value == "kept" and outcome.confined.refused == []


@pytest.mark.parametrize(("how", "message"), [("die", "died without a word: a last word"), ("none", "no attribute")])
def test_work_that_fails_is_an_error_that_says_why(file: Path, how: str, message: str) -> None:
    with pytest.raises(WorkError, match=message):
        run(how, file, [])


def test_what_an_installer_left_beside_code_is_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout that is installed in place: libraries look for entry points there."""
    notes = tmp_path / "thing.egg-info" / "entry_points.txt"
    notes.parent.mkdir()
    notes.write_text("[none]")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("read_anyway", notes, []).value == "[none]"
