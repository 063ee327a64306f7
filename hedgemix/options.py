"""Options of a command line, parsed into dataclasses; what cannot be parsed is told in one line that names it and the
fix."""

from __future__ import annotations

import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from itertools import groupby, pairwise
from typing import Any, NoReturn, TypeVar

import tyro
from rich.console import Console

from hedgemix.config import RecipeError

Options = TypeVar("Options")
OPTION = re.compile(r"--[a-z][\w.-]*")
READER_GONE = 141
"""Exit code of a program that a shell's pipe has ended: 128 and the number of SIGPIPE."""


def run(work: Callable[[], int | None]) -> int:
    """Do the work of a command and write out what it printed; returns its exit code, or READER_GONE, with nothing said,
    when nobody reads its output any more."""
    Console.on_broken_pipe = reader_gone  # type: ignore[method-assign, assignment]  # rich's own exits with 1
    try:
        try:
            return work() or 0
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if not (error.code == READER_GONE if isinstance(error, SystemExit) else output_is_unread()):
            raise
        return READER_GONE


def reader_gone(console: Console) -> NoReturn:
    """End a command, or a thread of it, whose output on this console nobody reads."""
    if output_is_unread():
        raise SystemExit(READER_GONE)
    raise BrokenPipeError("the reader of what it tells has gone")


def output_is_unread() -> bool:
    """Say whether the reader of stdout or stderr has gone; what is written there from now on goes nowhere, also what
    the interpreter still holds."""
    watched = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # one without a file has no reader
            watched.register(stream.fileno(), 0)
    gone = [file for file, events in watched.poll(0) if events & (select.POLLERR | select.POLLHUP)]
    for file in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file)
        os.close(nowhere)
    return bool(gone)


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise RecipeError for an empty argument, which as a path would be the folder one is in. And let names that are
    not UTF-8 be printed."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not argument or argument.endswith("="):
            place = argument or (f"{before} ''" if before else "''")
            raise RecipeError(
                f"{place} is empty, as of a shell variable that is not set; give it a value or leave it out"
            )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def parse(kind: type[Options], arguments: Sequence[str], prog: str, **given: Any) -> Options:
    """Parse the arguments into a dataclass as `tyro.cli` does, which also prints help and then exits with 0.

    Raises RecipeError for an option that is not there, a value that is none of its kind, and one that is missing.
    """
    try:
        with redirect_stderr(io.StringIO()):
            options, rest = tyro.cli(kind, args=arguments, prog=prog, return_unknown_args=True, **given)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        help_text = shown(kind, ["--help"], prog, given)
        there = set(OPTION.findall(help_text))
        rest = [each for each in arguments if (name := OPTION.match(each)) and dashed(name[0]) not in there]
        if not rest:
            raise RecipeError(refusal(shown(kind, arguments, prog, given), arguments, help_text, prog)) from None
    if rest:
        raise RecipeError(unknown(rest, shown(kind, ["--help"], prog, given), prog))
    return options


def dashed(option: str) -> str:
    """Write an option as the help text does: fields may be given with underscores, too."""
    return option.replace("_", "-")


def shown(kind: type[Any], arguments: Sequence[str], prog: str, given: dict[str, Any]) -> str:
    """Give what `tyro.cli` prints, every paragraph in one line."""
    text = io.StringIO()
    with wide(), redirect_stdout(text), redirect_stderr(text), suppress(SystemExit):
        tyro.cli(kind, args=arguments, prog=prog, **given)
    return text.getvalue()


@contextmanager
def wide() -> Iterator[None]:
    """Have who asks for the terminal's width told one that nothing is broken at."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(1 << 20)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def nearest(name: str, names: Sequence[str]) -> str:
    """Ask whether the name that is most like this one was meant; '' when none is."""
    found = get_close_matches(name, names, 1)
    return f"; did you mean {found[0]}?" if found else ""


def unknown(rest: Sequence[str], help_text: str, prog: str) -> str:
    """Say which argument nothing is done with: an option that is not there, or a word that belongs to none."""
    option = next((each for each in rest if each.startswith("-")), None)
    if option is None:
        return f"nothing is done with {rest[0]!r}: it is no value of an option; leave it out, or see {prog} --help"
    name = option.partition("=")[0]
    options = sorted(set(OPTION.findall(help_text)))
    # A field alone is meant more often than one of another part with a name like it.
    fields = [each for each in options if each.rpartition(".")[2] == dashed(name).lstrip("-")]
    meant = f"; did you mean {' or '.join(fields)}?" if fields else nearest(dashed(name), options)
    return f"there is no option {name}{meant or f'; see {prog} --help'}"


def refusal(text: str, arguments: Sequence[str], help_text: str, prog: str) -> str:
    """Make one line of the box that tyro prints. text: the box; arguments: what was refused."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    # Behind the title come paragraphs between rules; where stdout is not UTF-8 there is a rule below the title too.
    paragraphs = [list(group) for rule, group in groupby(lines[1:], lambda line: not line.strip("─-╰╯")) if not rule]
    lines = paragraphs[0] if paragraphs else []
    said = " ".join(lines)
    if wrong := re.match(r"Error parsing (\S+?): (.*)", said):
        values = " ".join(values_of(wrong[1], arguments))
        kind = metavar(wrong[1], help_text)
        return f"{wrong[1]} {values}: {f'expected {kind}' if kind else wrong[2]}"
    if wrong := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*?),?\)", said):
        choices = wrong[3].replace("'", "").split(", ")
        return f"{wrong[2]} {wrong[1]}: expected one of {', '.join(choices)}{nearest(wrong[1], choices)}"
    if wrong := re.match(r"Missing value for argument '(.*?)'", said):
        return f"{wrong[1]} has no value; expected {metavar(wrong[1], help_text) or 'one'}"
    if said.startswith("Missing from "):
        needed = [
            name if name.startswith("--") else f"{name} ({more.removesuffix('(required)').strip(' .')})"
            for name, more in pairwise(lines[1:])
            if more.endswith("(required)")
        ]
        return f"{prog} needs {', '.join(needed)}; see {prog} --help"
    return said or f"these arguments are not understood; see {prog} --help"


def values_of(name: str, arguments: Sequence[str]) -> list[str]:
    """Find the values given to an option, last where it is given twice."""
    values: list[str] = []
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if dashed(option) == dashed(name):
            values = [value] if equals else []
            for following in arguments[number + 1 :]:
                if OPTION.match(following):
                    break
                values.append(following)
    return values


def metavar(name: str, help_text: str) -> str:
    """Say of what kind an option's values are, by the help text; '' when it does not tell."""
    found = re.search(rf"{re.escape(name)} ([A-Z\[{{]\S*)", help_text)
    if not found:
        return ""
    kind = found[1].strip("[]")
    names = {"INT": "whole number", "FLOAT": "number"}
    many = found[1].startswith("[")
    for word, meaning in names.items():
        if word in kind:
            return f"{meaning}s" if many else f"a {meaning}"
    return kind
