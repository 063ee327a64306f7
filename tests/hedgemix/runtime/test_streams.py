"""Processes started with standard streams closed, as a shell's >&- does."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

PRINTS = """
import sys
from hedgemix.runtime.streams import open_closed_streams
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
    from hedgemix.runtime.streams import open_closed_streams

    open_closed_streams()
    assert before == (sys.stdin, sys.stdout, sys.stderr)
