"""What a study will do, told before it is begun and when half of it is done."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hedgemix.config import DataConfig, RecipeError
from hedgemix.recipes import RECIPES
from pipeline.storage.store import Storage
from pipeline.study import fields, study_plan
from pipeline.study.definition import Study, of_variants
from pipeline.study.study_plan import Share, plans_of, shares
from pipeline.study.variants import Variant
from support import plans

BASE = fields.with_values(RECIPES["record"](), {"data.source": "docs", "data.packages": ("numpy",)})


def study(*variants: dict[str, Any]) -> Study:
    made = [Variant(str(number), each, fields.with_values(BASE, each)) for number, each in enumerate(variants)]
    return of_variants(Storage("", Path("nowhere")), "s", BASE, made)


MIXER = {"evaluate.mixer.hedge_share": 0.01}
MODEL = {"model.xsa": False}
LONGER = {"train.budget_seconds": 1000.0}


def counted(found: list[Share]) -> dict[str, tuple[int, int, int]]:
    return {each.kind: (each.named, each.different, each.done) for each in found}


def test_steps_that_records_share_are_counted_once(tmp_path: Path) -> None:
    found = shares(plans_of(study(MIXER, MODEL), Storage("", tmp_path), (1, 2)))
    assert counted(found) == {
        "data": (3, 1, 0),
        "counts": (3, 1, 0),
        "train": (6, 4, 0),
        "score": (6, 4, 0),
        "quantize": (6, 4, 0),
        "evaluate": (6, 6, 0),
    }
    assert not list(tmp_path.iterdir())  # nothing is made


@pytest.mark.parametrize(
    ("field", "value", "other"),
    [
        ("data.memory_bytes", 1000, {"quantize", "evaluate", "counts", "data"}),
        ("data.max_valid_tokens", 1000, {"score", "evaluate", "counts", "data"}),
        ("data.vocab_size", 512, {"train", "quantize", "score", "evaluate", "counts", "data"}),
    ],
)
def test_a_text_that_is_not_made_yet_differs_where_its_configuration_does(
    field: str, value: int, other: set[str], tmp_path: Path
) -> None:
    found = shares(plans_of(study({field: value}), Storage("", tmp_path), (1,)))
    assert {each.kind for each in found if each.different == 2} == other


def test_seconds_are_the_recipe_s_budgets_until_steps_tell(tmp_path: Path) -> None:
    made, storage = study(MIXER, LONGER), Storage("", tmp_path)
    told = {each.kind: each for each in shares(plans_of(made, storage, (1, 2)))}
    assert told["train"].seconds == 2 * 600 + 2 * 1000 and told["train"].source == "train.budget_seconds"
    assert told["train"].gpu_seconds == 8 * 3200
    assert told["evaluate"].seconds == 6 * 600 and "limits.evaluate_seconds" in told["evaluate"].source
    assert told["quantize"].seconds is None and told["data"].gpu_seconds == 0
    [base, *_] = plans_of(made, storage, (1, 2))
    plans.finish(base.seeds[1].evaluate)
    again = {each.kind: each for each in shares(plans_of(made, storage, (1, 2)))}
    assert counted([again["evaluate"]]) == {"evaluate": (6, 6, 1)}
    assert again["evaluate"].source == "mean of the 1 done" and (again["evaluate"].seconds or 0) < 1


def test_a_variant_that_moves_no_number_is_refused(tmp_path: Path) -> None:
    for field, value in (("compute.max_restarts", 9), ("compute.evaluate_workers", 2), ("limits.train_seconds", 5.0)):
        with pytest.raises(RecipeError, match="variant '0' runs the very steps of 'base'"):
            plans_of(study({field: value}), Storage("", tmp_path), (1,))


def test_the_plan_is_printed_in_80_columns(tmp_path: Path) -> None:
    text = io.StringIO()
    study_plan.print_study_plan(study(MIXER), Storage("", tmp_path), (1, 2), Console(file=text, width=80))
    shown = text.getvalue()
    assert "study s: 2 records of 2 seeds" in shown and "  0: s-0" in shown
    assert "one after another: 3,600 s, and data, counts, score, quantize; 8.00 GPU-hours" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_where_the_plan_looks_nothing_is_made(tmp_path: Path) -> None:
    assert study_plan.storage_of(str(tmp_path / "none")).root == tmp_path / "none"
    assert not (tmp_path / "none").exists()
    assert study_plan.storage_of("s3://bucket/prefix").remote
    dataset, step = study_plan.text_of(Storage("", tmp_path), DataConfig(packages=("numpy",)))
    assert dataset.valid_tokens >= 2 and step.kind == "data"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
