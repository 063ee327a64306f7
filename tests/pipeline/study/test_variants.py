"""Which variants a command names: one field at a time, crossed, from a file; and all that is wrong at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hedgemix.config import Recipe, RecipeError
from hedgemix.experts.registry import EXPERTS
from hedgemix.model.linear import QAT_LEVELS
from hedgemix.recipes import RECIPES
from hedgemix.validate import check_recipe
from pipeline.study.variants import Variant, name_of, read_variants

BASE = RECIPES["laptop"]()
RATE, XSA = "evaluate.ttt.head.rate", "model.xsa"


def read(vary: Sequence[Sequence[str]] = (), cross: bool = False, file: str = "") -> list[Variant]:
    def check(recipe: Recipe) -> None:
        check_recipe(recipe, QAT_LEVELS, EXPERTS)

    return read_variants(BASE, vary, cross, file, check)


def found(*arguments: Any) -> dict[str, dict[str, Any]]:
    return {variant.name: variant.fields for variant in read(*arguments)}


def test_fields_take_their_values_one_at_a_time_and_the_recipe_s_own_is_the_base() -> None:
    assert BASE.evaluate.ttt.head.rate == 0.5 and BASE.model.xsa
    assert found([(RATE, "0.4", "0.5", "1e-5"), (XSA, "true", "false")]) == {
        "head.rate=0.4": {RATE: 0.4},
        "head.rate=1e-05": {RATE: 1e-5},
        "xsa=false": {XSA: False},
    }


def test_crossed_fields_take_all_combinations() -> None:
    assert found([(RATE, "0.5", "0.4"), (XSA, "true", "false")], True) == {
        "xsa=false": {XSA: False},
        "head.rate=0.4": {RATE: 0.4},
        "head.rate=0.4,xsa=false": {RATE: 0.4, XSA: False},
    }


def test_a_variant_s_recipe_is_the_base_but_for_its_fields() -> None:
    [variant] = read([("evaluate.mixer.orders", "1,2")])
    assert (variant.recipe.evaluate.mixer.orders == (1, 2) and variant.name == "mixer.orders=1+2") or variant.name
    assert variant.recipe.model == BASE.model and variant.recipe.evaluate.ttt == BASE.evaluate.ttt


def test_names_tell_values_apart() -> None:
    values = [0.1, 0.1 + 1e-12, 1e-5, True, False, (), (1,), (1, 2), "a"]
    assert len({name_of({XSA: value}) for value in values}) == len(values)


def test_a_file_names_variants_in_either_way_of_toml(tmp_path: Path) -> None:
    file = tmp_path / "v.toml"
    file.write_text(
        '[[variant]]\nname = "no xsa"\nmodel.xsa = false\n'
        f'[[variant]]\n"{RATE}" = 1\n'
        "[[variant]]\n[variant.evaluate.mixer]\norders = [1, 2]\nblock-tokens = 64\n"
    )
    assert found((), False, str(file)) == {
        "no xsa": {XSA: False},
        "head.rate=1": {RATE: 1.0},
        "orders=1+2,mixer.block_tokens=64": {"evaluate.mixer.orders": (1, 2), "evaluate.mixer.block_tokens": 64},
    }
    assert set(found([(RATE, "0.4")], False, str(file))) >= {"no xsa", "head.rate=0.4"}


def problems(*arguments: Any) -> str:
    with pytest.raises(RecipeError) as raised:
        read(*arguments)
    return str(raised.value)


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ([("model.xs", "true")], "did you mean model.xsa?"),
        ([(XSA, "perhaps")], "model.xsa 'perhaps' is neither true nor false"),
        ([(XSA,)], "--vary model.xsa has no value"),
        ([(RATE, "0.4"), (RATE, "0.6")], f"--vary {RATE} is given twice"),
        ([(RATE, "0.4", "0.40")], "two variants are called 'head.rate=0.4'"),
        ([("model.heads", "5")], "variant 'heads=5': model.width 96 is not a multiple of model.heads"),
        ([(XSA, "true")], "names only values that the recipe has"),
    ],
)
def test_a_mistake_is_told(vary: list[tuple[str, ...]], expected: str) -> None:
    assert expected in problems(vary)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has to hold [[variant]] tables"),
        ("variant = 3", "has to hold [[variant]] tables"),
        ("[[variant]]\nmodel.xsa = false\n[other]\n", "and nothing else"),
        ("[[variant]\n", "is no TOML"),
        ('[[variant]]\nname = "x"\n', "variant x changes no field"),
        ('[[variant]]\nname = "base"\nmodel.xsa = false\n', "its name is a line of text"),
        ('[[variant]]\nname = "a\\nb"\nmodel.xsa = false\n', "its name is a line of text"),
        ("[[variant]]\nname = 3\nmodel.xsa = false\n", "its name is a line of text"),
        ('[[variant]]\nname = "same"\nmodel.xsa = true\n', "variant 'same' is the recipe itself"),
        ("[[variant]]\nmodel = 3\n", "there is no field 'model'"),
        ("[[variant]]\nmodel.xsa = 1\n", "model.xsa 1 is neither true nor false"),
        (
            '[[variant]]\nname = "a"\nmodel.xsa = false\n[[variant]]\nname = "b"\nmodel.xsa = false\n',
            "variants 'a' and 'b' are the same recipe",
        ),
        (
            '[[variant]]\nname = "a"\nmodel.xsa = false\n[[variant]]\nname = "a"\nmodel.skips = false\n',
            "two variants are called 'a'",
        ),
    ],
)
def test_a_mistake_in_a_file_is_told(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "v.toml").write_text(text)
    assert expected in problems((), False, str(tmp_path / "v.toml"))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in problems((), False, str(tmp_path / "none.toml"))


def test_all_problems_are_told_together_ten_of_them_in_full() -> None:
    told = problems([("model.xs", "1"), (XSA, "x"), ("model.heads", "5", *map(str, range(7, 16)))])
    lines = told.splitlines()
    assert lines[0].endswith(" problems") and int(lines[0].split()[0]) == 12
    assert [line.split(".")[0].strip() for line in lines[1:11]] == [*map(str, range(1, 11))]
    assert lines[11] == "  and 2 more" and len(lines) == 12
    assert "model.xs" in lines[1] and "model.xsa 'x'" in lines[2]
