"""What of a record's settings may change between two starts of it, and how the rest is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hedgemix.config import Recipe, RecipeError, to_dict
from hedgemix.recipes import RECIPES
from hedgemix.standalone import script
from pipeline.results.settings import MOVE_NO_NUMBER, differences, flatten, keep_recipe
from pipeline.steps import graph
from pipeline.storage.store import Storage

LAPTOP = RECIPES["laptop"]()
OTHER: dict[str, Any] = {
    "workers": 3, "gpus_per_worker": 2.0, "cpus_per_worker": 5.0, "evaluate_workers": 2, "max_restarts": 7,
    "checkpoint_seconds": 5.0,
}  # fmt: skip


def with_compute(**values: Any) -> Recipe:
    return replace(LAPTOP, compute=replace(LAPTOP.compute, **values))


def begun(folder: Path) -> tuple[Storage, Path]:
    """The storage of a record of which steps were begun, and the place of its recipe."""
    (folder / "steps.json").write_text("{}")
    return Storage("", folder), folder / "recipe.json"


@pytest.mark.parametrize("left", ["steps.json", "mine.parquet"])
def test_a_record_of_which_no_step_was_begun_takes_any_settings(left: str, tmp_path: Path) -> None:
    storage, path = Storage("", tmp_path), tmp_path / "recipe.json"
    for recipe in (LAPTOP, RECIPES["record"]()):
        keep_recipe(storage, path, recipe, "mine")
        assert json.loads(path.read_text()) == to_dict(recipe)
    (tmp_path / left).write_text("")
    with pytest.raises(RecipeError, match="record mine was begun with other settings"):
        keep_recipe(storage, path, LAPTOP, "mine")


def test_a_record_keeps_to_the_recipe_it_was_begun_with(tmp_path: Path) -> None:
    storage, path = begun(tmp_path)
    keep_recipe(storage, path, LAPTOP, "mine")
    before = path.stat().st_mtime_ns
    keep_recipe(storage, path, LAPTOP, "mine")
    assert path.stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match="record mine was begun with other settings"):
        keep_recipe(storage, path, RECIPES["record"](), "mine")
    path.write_text("{")  # damaged: nothing else is lost with it
    keep_recipe(storage, path, LAPTOP, "mine")
    assert json.loads(path.read_text())["recipe"] == "laptop"


def test_a_refusal_names_every_setting_with_both_values(tmp_path: Path) -> None:
    storage, path = begun(tmp_path)
    keep_recipe(storage, path, LAPTOP, "mine")
    mixer = replace(LAPTOP.evaluate.mixer, orders=(1, 2))
    other = replace(
        with_compute(max_restarts=9, workers=1),
        train=replace(LAPTOP.train, steps=30),
        evaluate=replace(LAPTOP.evaluate, mixer=mixer),
    )
    with pytest.raises(RecipeError) as refused:
        keep_recipe(storage, path, other, "mine")
    assert f"({path}): train.steps was 0 and is 30, evaluate.mixer.orders was " in str(refused.value)
    assert "] and is [1, 2], compute.workers was 2 and is 1; give this one another --record" in str(refused.value)
    assert "max_restarts" not in str(refused.value) and json.loads(path.read_text()) == to_dict(LAPTOP)
    older = to_dict(LAPTOP)  # of an older version, which lacked a field and had another
    older["train"]["gone"] = older["train"].pop("steps")
    path.write_text(json.dumps(older))
    with pytest.raises(RecipeError, match=r"train.gone was 0 and is not there, train.steps was not there and is 0;"):
        keep_recipe(storage, path, LAPTOP, "mine")


@pytest.mark.parametrize("name", OTHER)
def test_what_moves_no_number_may_change_and_is_kept_as_it_is_now(name: str, tmp_path: Path) -> None:
    """No number: no step has another name, and train_gpt.py is the same file."""
    (storage, path), other = begun(tmp_path), with_compute(**{name: OTHER[name]})
    keep_recipe(storage, path, LAPTOP, "mine")
    if f"compute.{name}" in MOVE_NO_NUMBER:
        keep_recipe(storage, path, other, "mine")
        assert json.loads(path.read_text()) == to_dict(other) != to_dict(LAPTOP)
    else:
        with pytest.raises(RecipeError, match=f"compute.{name} was .* and is {OTHER[name]}; "):
            keep_recipe(storage, path, other, "mine")
    assert (f"compute.{name}" in MOVE_NO_NUMBER) == (named(storage, other) == named(storage, LAPTOP))


def named(storage: Storage, recipe: Recipe) -> list[Any]:
    """All that is named by the recipe, of a data set that is not there."""
    dataset = graph.Dataset("docs", (), (), "", 1024, 9, 9, 0, 9, 1, 1, "a", "b", "c", "d")
    steps = graph.seed_steps(storage, recipe, dataset, 1, 1_000_000).all()
    others = graph.counts_step(storage, recipe, dataset), graph.step(storage, "data", recipe.data)
    return [*steps, *others, script.build(recipe)]


def test_every_setting_of_the_machine_was_tried() -> None:
    assert set(OTHER) == set(vars(LAPTOP.compute))
    assert dict(flatten(to_dict(LAPTOP))).keys() >= MOVE_NO_NUMBER


def test_differences_are_told_in_the_order_of_the_settings() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 1, "c": [2], "e": "x"}, "d": 0}
    assert differences(old, new) == {"a.c": ("[1]", "[2]"), "d": ("null", "0"), "a.e": ("not there", '"x"')}
    assert differences(old, old) == {}
