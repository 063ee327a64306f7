"""The fields of a recipe by their dotted names: their types, values from text or TOML, and a recipe with other
values."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from functools import cache
from typing import Any, Literal

from hedgemix.config import Recipe, RecipeError

NONE = "none"
"""On the command line: None of an optional field, and no item of one that takes several."""


@cache
def types_by_name() -> dict[str, Any]:
    """Map the dotted name of every field of a recipe that can be varied to its type."""
    found: dict[str, Any] = {}

    def add(kind: Any, above: str) -> None:
        for name, hint in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                add(hint, f"{above}{name}.")
            elif above:  # at the top stands the recipe's own name
                found[above + name] = hint

    add(Recipe, "")
    return found


def full_name(name: str) -> str:
    """Return the field's name as the recipe spells it, for an option's hyphens too. Raises RecipeError with the nearest
    name when there is no such field."""
    spelled = name.removeprefix("--").replace("-", "_")
    if spelled in types_by_name():
        return spelled
    ends = f".{spelled}", f".{spelled.rpartition('.')[2]}"
    whole, last = ([each for each in types_by_name() if each.endswith(end)] for end in ends)
    near = whole or last or difflib.get_close_matches(spelled, types_by_name(), n=1, cutoff=0.0)
    raise RecipeError(f"there is no field {name!r}; did you mean {' or '.join(near)}?")


@cache
def short_name(name: str) -> str:
    """Return the shortest end of a field's dotted name that no other field of a recipe has."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        short = ".".join(parts[-count:])
        if sum(each == short or each.endswith("." + short) for each in types_by_name()) == 1:
            return short
    return name


def parse_value(name: str, text: str) -> Any:
    """Parse a value of the field as the command line has it: several items between commas, `none` for None or no item.
    Raises RecipeError for what is no value of its type."""
    hint = types_by_name()[name]
    value = _parsed(hint, text)
    if value is _WRONG:
        raise RecipeError(f"{name} {text!r} is {_expected(hint)}")
    return value


def check_value(name: str, value: Any) -> Any:
    """Check a value of the field as TOML or JSON has it, and return it in the field's type. Raises RecipeError for one
    of another type."""
    hint = types_by_name()[name]
    checked = _checked(hint, value)
    if checked is _WRONG:
        raise RecipeError(f"{name} {value!r} is {_expected(hint)}")
    return checked


def value_of(recipe: Recipe, name: str) -> Any:
    """Read the field's value in a recipe."""
    found: Any = recipe
    for part in name.split("."):
        found = getattr(found, part)
    return found


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Copy the recipe with other values of the fields with these dotted names."""
    for name, value in values.items():
        recipe = _with(recipe, name.split("."), value)
    return recipe


def _with(config: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    inner = _with(getattr(config, first), rest, value) if rest else value
    return dataclasses.replace(config, **{first: inner})


_WRONG = object()
"""What no field's value is."""


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have, of which there are several in a union."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _first(values: Any) -> Any:
    return next((value for value in values if value is not _WRONG), _WRONG)


def _parsed(hint: Any, text: str) -> Any:
    if type(None) in _options(hint) and text == NONE:
        return None
    return _first(_parsed_as(each, text) for each in _options(hint) if each is not type(None))


def _parsed_as(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if text == NONE and (item is str or _parsed(item, text) is _WRONG):
            return ()
        items = tuple(_parsed(item, each.strip()) for each in text.split(","))
        return _WRONG if _WRONG in items else items
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), _WRONG)
    if hint in (int, float):
        try:
            return _checked(hint, hint(text))
        except ValueError:
            return _WRONG
    return _checked(hint, text)


def _checked(hint: Any, value: Any) -> Any:
    return _first(_checked_as(each, value) for each in _options(hint))


def _checked_as(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        return value if type(value) is str and value in typing.get_args(hint) else _WRONG
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            return _WRONG
        items = tuple(_checked(typing.get_args(hint)[0], each) for each in value)
        return _WRONG if _WRONG in items else items
    if hint is float and type(value) in (int, float):
        return float(value) if math.isfinite(value) else _WRONG
    if hint is int and type(value) is int and abs(value) >= 2**53:
        return _WRONG
    return value if type(value) is hint else _WRONG


def _expected(hint: Any) -> str:
    """What a wrong value is not, for a message."""
    names = {bool: "neither true nor false", int: "no whole number", float: "no finite number", str: "no text"}
    options = [each for each in _options(hint) if each is not type(None)]
    none = f", nor {NONE}" if type(None) in _options(hint) else ""
    [plain] = options[:1]
    if typing.get_origin(plain) is Literal:
        return f"not one of {', '.join(typing.get_args(plain))}{none}"
    if typing.get_origin(plain) is tuple:
        return f"no list, or one with an item that is {_expected(typing.get_args(plain)[0])}{none}"
    return names.get(plain, f"no {plain}") + none
