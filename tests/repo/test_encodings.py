"""Text files are UTF-8 wherever the program runs: no call leaves their encoding to the user's locale."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.test_structure import LIBRARY, PIPELINE, called, name_of

MODES = {"open": 1, "fdopen": 1, "io.open": 1, "os.fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
"""What opens a file, and which of its arguments is the mode; of a path's method it is the first."""
DEFAULT_BINARY = ("NamedTemporaryFile", "TemporaryFile")
NO_TEXT = ("os.open", "wave.open", "webbrowser.open", "tarfile.open", "zipfile.open")
PROCESSES = ("run", "Popen", "check_output", "check_call", "call")


def leaves_to_locale(source: str) -> Iterator[int]:
    """Lines that open, read or write text, or talk with a process in it, without an encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = called(node), {keyword.arg: keyword.value for keyword in node.keywords}
        last = name.rpartition(".")[2]
        if "encoding" in keywords or name in NO_TEXT:
            continue
        if (last == "read_text" and not node.args) or (last == "write_text" and len(node.args) < 2):
            yield node.lineno
        elif name in MODES or last in (*DEFAULT_BINARY, "fdopen", "open"):
            place = MODES.get(name, MODES.get(last, 0) if last in DEFAULT_BINARY else 0)
            mode = keywords.get("mode") or (node.args[place] if len(node.args) > place else None)
            binary = last in DEFAULT_BINARY if mode is None else any_binary(mode)
            if not binary and len(node.args) < 4:
                yield node.lineno
        elif last in PROCESSES and name.startswith("subprocess.") and ({"text", "universal_newlines"} & set(keywords)):
            yield node.lineno


def any_binary(mode: ast.expr) -> bool:
    """Whether every string in the expression of a mode is of a binary one."""
    words = [part.value for part in ast.walk(mode) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    words = [word for word in words if word and set(word) <= set("rwaxbt+")]
    return bool(words) and all("b" in word for word in words)


@pytest.mark.parametrize("path", LIBRARY + PIPELINE, ids=name_of)
def test_every_text_has_its_encoding(path: Path) -> None:
    assert not list(leaves_to_locale(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("open(path)", [1]),
        ("open(path, 'w')", [1]),
        ("open(path, mode='a')", [1]),
        ("open(path, 'rb')", []),
        ("open(path, 'w', encoding='utf-8')", []),
        ("open(path, 'a' if more else 'w')", [1]),
        ("open(path, 'ab' if more else 'wb')", []),
        ("open(path, mode)", [1]),
        ("os.open(path, flags)", []),
        ("os.fdopen(number, 'w')", [1]),
        ("path.open()", [1]),
        ("path.open('wb')", []),
        ("path.read_text()", [1]),
        ("path.read_text('utf-8')", []),
        ("path.write_text(text)", [1]),
        ("path.write_text(text, encoding='utf-8')", []),
        ("path.read_bytes()", []),
        ("tempfile.NamedTemporaryFile()", []),
        ("tempfile.NamedTemporaryFile('w')", [1]),
        ("subprocess.run(command, text=True)", [1]),
        ("subprocess.run(command, encoding='utf-8')", []),
    ],
)
def test_the_check_sees_each_form(source: str, lines: list[int]) -> None:
    assert list(leaves_to_locale(source)) == lines
