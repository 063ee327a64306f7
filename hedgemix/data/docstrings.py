"""Docstrings: the documentation in the Python sources of installed packages, read without importing any.

Parsing takes most of the time that a data set of them does, so that several processes do a share of the files each.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from hedgemix.config import RecipeError
from hedgemix.data.reading import Problems, Reading, encodable
from hedgemix.runtime.cpus import available_cpus

SHORTEST_DOCSTRING = 200  # characters
FILES_A_PROCESS = 200
"""No further process for fewer: one takes a tenth of a second to start, a file 5 ms."""
START = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); "
    "from hedgemix.data import docstrings as d; d.serve()"
)


def of_packages(packages: Sequence[str], reading: Reading | None = None) -> Iterator[str]:
    """Read the docstrings of at least 200 characters in the packages' sources, in path order; nothing is imported.

    `reading` counts. Raises RecipeError when packages are not installed or have no Python source, ChildProcessError
    when a process that reads its share dies.
    """
    reading = reading or Reading()
    for found in _of_files(find(packages)):
        reading.files += 1
        reading.passed_over["sources that do not parse"] += found is None
        yield from found or ()


def find(packages: Sequence[str]) -> list[Path]:
    """Find the packages' sources, in path order. Raises RecipeError when packages are not installed or have none."""
    problems, paths = Problems(), list[Path]()
    for package in packages:
        try:
            paths += _sources(package)
        except RecipeError as error:
            problems.add(error)
    problems.tell()
    return paths


def _of_files(paths: Sequence[Path]) -> Iterator[list[str] | None]:
    # Modules out of a train_gpt.py are no files, and no other process could import them.
    processes = min(available_cpus(), len(paths) // FILES_A_PROCESS) if Path(__file__).is_file() else 1
    if processes < 2:
        yield from map(of_file, paths)
        return
        return
    with ExitStack() as held:
        readers = [held.enter_context(_reader(paths[first::processes])) for first in range(processes)]
        for number, path in enumerate(paths):
            line = readers[number % processes].readline()
            if not line:
                raise ChildProcessError(f"the process that reads {path} died")
            yield json.loads(line)


def of_file(path: Path) -> list[str] | None:
    """Read the docstrings of one source file; None where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):  # templates, other versions' syntax
        return None
    found = []
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)  # cleaned as inspect.cleandoc does
            if text and len(text) >= SHORTEST_DOCSTRING and encodable(text):
                found.append(text)
    return found


def serve() -> None:
    """Answer a list of files on standard input with a line for each on standard output: its docstrings, as JSON."""
    paths = json.loads(sys.stdin.readline())
    gc.disable()  # syntax trees have no cycles, and looking for some takes a quarter of the time
    for path in paths:
        print(json.dumps(of_file(Path(path))))


@contextmanager
def _reader(paths: Sequence[Path]) -> Iterator[IO[str]]:
    """Start a process that reads these files, and end it; gives its answers."""
    command, pipe = [sys.executable, "-c", START], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8") as child:
        try:
            assert child.stdin and child.stdout
            with suppress(BrokenPipeError):  # it died, which shows where its answer is missed
                for told in (sys.path, [str(path) for path in paths]):
                    child.stdin.write(json.dumps(told) + "\n")
                child.stdin.close()
            yield child.stdout
        finally:
            child.kill()


def _sources(package: str) -> list[Path]:
    if "." in package:  # find_spec would import the parent
        raise RecipeError(f"data.packages: {package!r} is inside a package; name {package.split('.')[0]!r} instead")
    try:
        spec = importlib.util.find_spec(package)
    except (ValueError, ImportError):
        spec = None
    if spec is None:
        raise RecipeError(f"data.packages: {package!r} is not installed; install it or leave it out")
    if spec.submodule_search_locations is not None:
        folders = map(Path, spec.submodule_search_locations)
        sources = sorted(path for folder in folders for path in folder.rglob("*.py") if not _is_test(path, folder))
    else:
        sources = [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []
    if not sources:
        raise RecipeError(f"data.packages: {package!r} has no Python source to read; leave it out")
    return sources


def _is_test(path: Path, root: Path) -> bool:
    # A quarter of the source to parse, and next to no documentation.
    return not {"test", "tests"}.isdisjoint(path.relative_to(root).parts[:-1])


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    # ast.walk would also visit every expression, which takes longer than parsing.
    yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, block, ())
        if isinstance(children, list):  # the body of a lambda or of a conditional expression is not one
            for child in children:
                yield from _statements(child)
