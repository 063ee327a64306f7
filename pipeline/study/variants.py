"""Which variants a command names: fields that take several values, one at a time or crossed, and a file's list.

All of them are checked before anything starts; what is wrong is told together.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedgemix.config import Recipe, RecipeError
from pipeline.study import fields

BASE = "base"
"""What a study calls the recipe that its variants vary."""
PROBLEMS_SHOWN = 10
LONGEST_NAME = 200
"""Characters."""


@dataclass(frozen=True)
class Variant:
    """Holds a recipe that differs from the base in these fields, by their dotted names."""

    name: str
    fields: dict[str, Any]
    recipe: Recipe


def read_variants(
    base: Recipe,
    vary: Sequence[Sequence[str]],
    cross: bool,
    file: str,
    check: Callable[[Recipe], None],
) -> list[Variant]:
    """Make the variants of `--vary FIELD VALUE ...`, one field at a time or all combinations, and of a file of TOML.

    A value that is the base's own makes no variant. check raises RecipeError for a recipe that cannot work. Raises
    RecipeError with all that is wrong, the first PROBLEMS_SHOWN in full: unknown fields, values of another type,
    recipes that cannot work, names and recipes that occur twice.
    """
    problems: list[str] = []
    named = [*varied(vary, cross, problems), *(listed(file, problems) if file else [])]
    found: list[Variant] = []
    for name, values in named:
        values = {field: value for field, value in values.items() if fields.value_of(base, field) != value}
        if not values:
            if name:
                problems.append(f"variant {name!r} is the recipe itself; change a field, or leave it out")
            continue
        variant = Variant(name or name_of(values), values, fields.with_values(base, values))
        problems += problems_of(variant, found, check)
        found.append(variant)
    if problems:
        raise RecipeError(several(problems))
    if not found:
        raise RecipeError("--vary names only values that the recipe has; name another, or leave --vary out")
    return found


def varied(vary: Sequence[Sequence[str]], cross: bool, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the values that `--vary` sets, each without a name; `problems` gets what cannot be read."""
    axes: list[list[tuple[str, Any]]] = []
    for field, *texts in vary:
        try:
            name = fields.full_name(field)
        except RecipeError as error:
            problems.append(f"--vary {error}")
            continue
        if not texts:
            problems.append(f"--vary {name} has no value; name one or more after it")
        axes.append([])
        for text in texts:
            try:
                axes[-1].append((name, fields.parse_value(name, text)))
            except RecipeError as error:
                problems.append(f"--vary {error}")
    names = [axis[0][0] for axis in axes if axis]
    problems += [f"--vary {name} is given twice; name all its values at once" for name in repeated(names)]
    if cross:
        yield from (("", dict(each)) for each in itertools.product(*axes)) if axes else ()
    else:
        yield from (("", dict([pair])) for axis in axes for pair in axis)


def listed(file: str, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the variants of a TOML file, [[variant]] each: its name, empty where it has none, and its values. Raises
    RecipeError for a file that cannot be read; `problems` gets the rest."""
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"--variants {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"--variants {file} is no TOML: {error}") from None
    tables = content.get("variant")
    if not isinstance(tables, list) or not tables or set(content) != {"variant"}:
        raise RecipeError(f"--variants {file} has to hold [[variant]] tables, and nothing else")
    for number, table in enumerate(tables, start=1):
        values = dict(table) if isinstance(table, dict) else {}
        name = values.pop("name", "")
        where = f"{file}: variant {name or number}"
        if not isinstance(name, str) or not is_name(name or "x"):
            problems.append(
                f"{where}: its name is a line of text of at most {LONGEST_NAME} characters that is not {BASE!r}"
            )
            continue
        if not values:
            problems.append(f"{where} changes no field")
            continue
        found = {}
        for field, value in flat(values):
            try:
                full = fields.full_name(field)
                found[full] = fields.check_value(full, value)
            except RecipeError as error:
                problems.append(f"{where}: {error}")
        if found:
            yield name, found


def flat(table: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested tables with its dotted name."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def is_name(name: str) -> bool:
    """Say whether a variant may have this name."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip() and name != BASE


def problems_of(variant: Variant, before: list[Variant], check: Callable[[Recipe], None]) -> Iterator[str]:
    """Yield why the variant cannot be one beside those before it."""
    try:
        check(variant.recipe)
    except RecipeError as error:
        yield f"variant {variant.name!r}: {error}"
    if any(other.name == variant.name for other in before):
        yield f"two variants are called {variant.name!r}; give each a name of its own"
    elif same := next((other for other in before if other.recipe == variant.recipe), None):
        yield f"variants {same.name!r} and {variant.name!r} are the same recipe; leave one out"


def name_of(values: dict[str, Any]) -> str:
    """Name a variant by what it changes: `ttt.rate=0.0001`, with commas between fields."""
    return ",".join(f"{fields.short_name(name)}={text_of(value)}" for name, value in values.items())


def text_of(value: Any) -> str:
    """Write a value in short, as a name has it."""
    if isinstance(value, tuple):
        return "+".join(map(text_of, value)) or fields.NONE
    if value is None or isinstance(value, bool):
        return fields.NONE if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def repeated(names: Sequence[str]) -> list[str]:
    """List the names that occur more than once, each once."""
    return [name for at, name in enumerate(names) if name in names[:at] and name not in names[at + 1 :]]


def several(problems: list[str]) -> str:
    """Write problems as a message: one in its line, several numbered, the first PROBLEMS_SHOWN of them."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:PROBLEMS_SHOWN], start=1)]
    more = len(problems) - len(lines)
    return "\n".join([f"{len(problems)} problems", *lines, *([f"  and {more} more"] if more else [])])
