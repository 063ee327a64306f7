"""Processes started where a shell, a terminal or a folder is not as usual."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hedgemix.runtime.surroundings import settle

PRINTS = """
import sys
from hedgemix.runtime.surroundings import open_closed_streams
open_closed_streams()
with open(sys.argv[1], "wb") as file:
    file.write(b"whole")
    file.flush()
    print("a line")
    print("a line of error", file=sys.stderr, flush=True)
    assert sys.stdin.read() == ""
    sys.stdout.flush()
import subprocess
print(subprocess.run([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE, check=True).stdout, flush=True)
"""
SETS = [streams for count in (1, 2, 3) for streams in itertools.combinations((0, 1, 2), count)]


@pytest.mark.parametrize("closed", SETS, ids=str)
def test_nothing_that_is_printed_lands_in_a_file(closed: tuple[int, ...], tmp_path: Path) -> None:
    shell = " ".join(f"{stream}{'<' if stream == 0 else '>'}&-" for stream in closed)
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", PRINTS, str(tmp_path / "file")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert done.stdout == ("" if 1 in closed else "a line\nb'1\\n'\n")
    assert done.stderr == ("" if 2 in closed else "a line of error\n")


def test_open_streams_are_left_alone() -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    from hedgemix.runtime.surroundings import open_closed_streams

    open_closed_streams()
    assert before == (sys.stdin, sys.stdout, sys.stderr)


TELLS = """
import sys
from hedgemix.runtime.surroundings import settle
settle()
settle()
print("one", file=sys.stderr, flush=True)
sys.stdin.read(1)
for stream in (sys.stdout, sys.stderr):
    print("nobody sees this", file=stream, flush=True)
sys.exit(7)
"""


def test_a_command_outlives_its_terminal() -> None:
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TELLS], stdin=subprocess.PIPE, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    told = b""
    while not told.endswith(b"\n"):
        told += os.read(master, 100)
    assert told == b"one\r\n"
    os.close(master)
    process.communicate(b"x", timeout=30)
    assert process.returncode == 7


def test_a_folder_that_was_removed_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n{TELLS}"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: the folder this shell is in was removed"), done


@pytest.mark.parametrize(("given", "kept"), [("0", None), (" 0", None), ("40", "40"), (None, None)])
def test_a_terminal_has_some_width(given: str | None, kept: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if given is not None:
        monkeypatch.setenv("COLUMNS", given)
    settle()
    assert os.environ.get("COLUMNS") == kept
