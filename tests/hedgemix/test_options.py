"""Options that cannot be parsed are one line that names them and the fix; output that nobody reads ends a command
without a word."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from rich.console import Console

from hedgemix import options
from hedgemix.config import RecipeError


@dataclass(frozen=True)
class Part:
    learning_rate: float = 0.1
    """Of the part."""
    kind: Literal["head", "weights"] = "head"


@dataclass(frozen=True)
class Given:
    text: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TEXT")]
    """A file; `--none` is no option."""
    name: str
    first: Part = field(default_factory=Part)
    second: Part = field(default_factory=Part)
    steps: int = 3
    seeds: tuple[int, ...] = ()
    draw: int | None = None
    plan: bool = False


NEEDED = ["a.txt", "--name", "x"]
MISTAKES = {
    "--stps 3": "there is no option --stps; did you mean --steps?",
    "--stps=3": "there is no option --stps; did you mean --steps?",
    "--first.learning_rat 3": "there is no option --first.learning_rat; did you mean --first.learning-rate?",
    "--learning_rate 3": "there is no option --learning_rate; did you mean --first.learning-rate or --second",
    "--zzz": "there is no option --zzz; see tool --help",
    "-x": "there is no option -x; see tool --help",
    "more": "nothing is done with 'more': it is no value of an option; leave it out, or see tool --help",
    "--plan 3": "nothing is done with '3'",
    "--steps x": "--steps x: expected a whole number",
    "--steps=x": "--steps x: expected a whole number",
    "--steps 1 --steps 1.5": "--steps 1.5: expected a whole number",
    "--steps": "--steps has no value; expected a whole number",
    "--seeds 1 b": "--seeds 1 b: expected whole numbers",
    "--draw x": "--draw x: expected a whole number",
    "--first.learning_rate much": "--first.learning-rate much: expected a number",
    "--first.kind haed": "--first.kind haed: expected one of head, weights; did you mean head?",
    "--first.kind zz": "--first.kind zz: expected one of head, weights",
    f"--steps {'long' * 50}": f"--steps {'long' * 50}: expected a whole number",
}


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_names_the_option_and_the_fix(given: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(RecipeError) as refused:
        options.parse(Given, [*NEEDED, *given.split()], "tool")
    told = str(refused.value)
    assert told.startswith(MISTAKES[given]) and "\n" not in told and os.environ["COLUMNS"] == columns


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "tool needs TEXT (A file; `--none` is no option), --name STR; see tool --help"),
        (["a.txt"], "tool needs --name STR; see tool --help"),
        (["--nmae", "x", "a.txt"], "there is no option --nmae; did you mean --name?"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        options.parse(Given, arguments, "tool")
    assert str(refused.value) == line
    assert capsys.readouterr() == ("", "")


def test_what_can_be_parsed_and_help_are_tyros_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*NEEDED, "--first.learning_rate", "0.5", "--seeds", "1", "2"]
    assert options.parse(Given, arguments, "tool") == tyro.cli(Given, args=arguments)
    printed = []
    for show in (options.parse, lambda kind, given, prog: tyro.cli(kind, args=given, prog=prog)):
        with pytest.raises(SystemExit) as ended:
            show(Given, ["--help"], "tool")
        assert ended.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "--first.learning-rate" in printed[0]


def test_a_box_of_another_form_is_still_one_line() -> None:
    assert options.refusal("╭─ New ─╮\n│ No  │\n│ such │\n╰───╯", [], "", "tool") == "No such"
    assert options.refusal("", [], "", "tool") == "these arguments are not understood; see tool --help"


def printing() -> int:
    print("x" * 100_000)
    return 0


def helping() -> None:
    options.parse(Given, ["--help"], "tool")


def by_rich() -> int:
    Console(highlight=False).print("x" * 100_000, soft_wrap=True)
    return 0


@pytest.mark.parametrize("work", [printing, helping, by_rich])
def test_output_that_nobody_reads_ends_the_command(
    work: Callable[[], int | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "on_broken_pipe", Console.on_broken_pipe)  # put back what `run` changes
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe, redirect_stdout(pipe):
        assert options.run(work) == options.READER_GONE == 141
        pipe.write("what came late")  # goes nowhere
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise BrokenPipeError("of a socket")

    monkeypatch.setattr(Console, "on_broken_pipe", Console.on_broken_pipe)
    reading, writing = os.pipe()
    with open(reading) as _, open(writing, "w") as pipe, redirect_stdout(pipe), pytest.raises(BrokenPipeError):
        options.run(fails)


def test_a_commands_exit_code_is_its_own() -> None:
    assert options.run(lambda: 3) == 3 and options.run(lambda: None) == 0
    with pytest.raises(SystemExit, match="4"):
        options.run(lambda: sys.exit(4))
