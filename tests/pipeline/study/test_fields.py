"""Fields of a recipe by their dotted names: every one can be read and set, values have their field's type."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from hedgemix.config import RecipeError, to_dict
from hedgemix.recipes import RECIPES
from pipeline.results.settings import flatten
from pipeline.study import fields

RECIPE = RECIPES["laptop"]()


def test_every_field_of_a_recipe_but_its_name_can_be_varied() -> None:
    assert {*fields.types_by_name()} == {name for name, _ in flatten(to_dict(RECIPE))} - {"recipe"}


@pytest.mark.parametrize("name", fields.types_by_name())
def test_a_field_s_own_value_is_one_of_its_type_and_set_alone(name: str) -> None:
    value = fields.value_of(RECIPE, name)
    plain = dict(flatten(to_dict(RECIPE)))[name]
    assert fields.check_value(name, plain) == value
    assert fields.with_values(RECIPE, {name: value}) == RECIPE
    changed = dict(flatten(to_dict(fields.with_values(RECIPE, {name: "other"}))))
    assert changed == dict(flatten(to_dict(RECIPE))) | {name: "other"}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model.xsa", "true", True),
        ("model.xsa", "False", False),
        ("model.layers", "3", 3),
        ("train.matrix_rate", "3e-4", 3e-4),
        ("train.budget_seconds", "60", 60.0),
        ("model.mlp_slope", "-0.5", -0.5),
        ("evaluate.mixer.kind", "none", "none"),
        ("evaluate.mixer.orders", "1,2, 3", (1, 2, 3)),
        ("evaluate.mixer.orders", "4", (4,)),
        ("evaluate.mixer.match_lengths", "none", ()),
        ("evaluate.mixer.experts", "none", ()),
        ("evaluate.mixer.experts", "recency", ("recency",)),
        ("evaluate.mixer.gates", "none", ("none",)),
        ("evaluate.mixer.gates", "order,both", ("order", "both")),
        ("data.tokenizer", "a.model", "a.model"),
    ],
)
def test_values_on_the_command_line(name: str, text: str, value: Any) -> None:
    found = fields.parse_value(name, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("model.xsa", "1", "neither true nor false"),
        ("model.layers", "3.0", "no whole number"),
        ("model.layers", str(2**53), "no whole number"),
        ("train.matrix_rate", "fast", "no finite number"),
        ("train.matrix_rate", "nan", "no finite number"),
        ("train.matrix_rate", "inf", "no finite number"),
        ("evaluate.mixer.kind", "hegde", "not one of none, hedge, linear, logistic, ensemble"),
        ("evaluate.mixer.orders", "1,,2", "no list, or one with an item that is no whole number"),
        (
            "evaluate.mixer.gates",
            "order,all",
            "no list, or one with an item that is not one of none, order, entropy, both",
        ),
    ],
)
def test_values_of_another_type_are_refused_by_name(name: str, text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=f"^{name} '{text}' is {expected}"):
        fields.parse_value(name, text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.xsa", 1),
        ("model.layers", True),
        ("model.layers", 2.0),
        ("train.matrix_rate", "0.1"),
        ("train.matrix_rate", float("inf")),
        ("evaluate.mixer.orders", 3),
        ("evaluate.mixer.orders", ["1"]),
        ("data.tokenizer", None),
    ],
)
def test_values_of_a_file_have_the_field_s_type(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=name):
        fields.check_value(name, value)


def test_a_whole_number_is_a_float_too() -> None:
    found = fields.check_value("train.matrix_rate", 1)
    assert found == 1.0 and type(found) is float


def test_an_optional_field_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hints: dict[str, Any] = {"a.b": float | None, "a.c": tuple[int, ...] | None, "a.d": Literal["x"] | None}
    monkeypatch.setattr(fields, "types_by_name", lambda: hints)
    for name, text, value in (("a.b", "2", 2.0), ("a.c", "1,2", (1, 2)), ("a.d", "x", "x")):
        assert fields.parse_value(name, "none") is None and fields.parse_value(name, text) == value
        assert fields.check_value(name, None) is None and fields.check_value(name, value) == value
        with pytest.raises(RecipeError, match=f"{name} 'z' is .*nor none"):
            fields.parse_value(name, "z")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("evaluate.ttt.rat", "evaluate.ttt.rate?"),
        ("ttt.rate", "evaluate.ttt.rate?"),
        ("xsa", "model.xsa?"),
        ("train.xsa", "model.xsa?"),
        ("head.rate", "evaluate.ttt.head.rate?"),
        ("recipe", "?"),
    ],
)
def test_an_unknown_field_is_told_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as raised:
        fields.full_name(name)
    assert str(raised.value).startswith(f"there is no field '{name}'; did you mean ")
    assert str(raised.value).endswith(near)


def test_options_spelling_is_a_field_s() -> None:
    assert fields.full_name("--evaluate.ttt.batch-sequences") == "evaluate.ttt.batch_sequences"


def test_short_names_end_in_one_field_alone() -> None:
    short = {name: fields.short_name(name) for name in fields.types_by_name()}
    assert len({*short.values()}) == len(short) and all(name.endswith(each) for name, each in short.items())
    assert short["model.xsa"] == "xsa" and short["evaluate.ttt.head.rate"] == "head.rate"
