"""A study's rounds: what is run, what is written before and after, with a driver that makes scores up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from hedgemix.config import RecipeError
from hedgemix.recipes import RECIPES
from pipeline.results.schema import Row
from pipeline.steps import graph
from pipeline.steps.graph import RecordPlan
from pipeline.storage.store import Storage
from pipeline.study import fields, rounds
from pipeline.study.definition import Study, alone, of_variants
from pipeline.study.rounds import run_rounds
from pipeline.study.seeds import Seeds, Until
from pipeline.study.variants import Variant
from support import plans

BASE = RECIPES["laptop"]()


def variant(name: str, **values: Any) -> Variant:
    dotted = {field.replace("__", "."): value for field, value in values.items()}
    return Variant(name, dotted, fields.with_values(BASE, dotted))


MIXER = variant("mixer", evaluate__mixer__hedge_share=0.01)
MODEL = variant("model", model__xsa=False)
SPREAD = [0.0, 0.002, -0.002, 0.001, -0.001, 0.0015, -0.0015]


class Work:
    """Runs a study in a folder, and notes what its driver was given."""

    def __init__(self, folder: Path, study: Study, until: Until | None = None, most: int = 5) -> None:
        self.folder, self.text, self.given = folder, io.StringIO(), []
        self.study_files: list[bool] = []
        storage = Storage("", folder)
        texts = {record.name: (plans.dataset(), graph.step(storage, "data")) for record in study.records}
        self.seeds = Seeds(study, (7, 1, 2), until, most)
        self.rows = run_rounds(study, texts, self.seeds, self.run, {}, Console(file=self.text, width=200))

    given: list[dict[str, list[int]]]

    def run(self, named: Sequence[RecordPlan]) -> dict[str, list[Row]]:
        self.given.append({plan.name: list(plan.seeds) for plan in named})
        self.study_files.append((self.folder / "_studies").exists())
        return {plan.name: [self.row(plan, at, seed) for at, seed in enumerate(plan.seeds)] for plan in named}

    def row(self, plan: RecordPlan, at: int, seed: int) -> Row:
        moved = {"mixer": -0.1 + SPREAD[at] / 100, "model": SPREAD[at]}.get(plan.variant, 0.0)
        score = 1.0 + at / 10 + moved
        return Row(plan.name, "laptop", "0", seed, "done", bpb_final=score, valid_sha256="t", variant=plan.variant)


def test_a_record_alone_is_a_study_without_files(tmp_path: Path) -> None:
    work = Work(tmp_path, alone(BASE, "one"))
    assert work.given == [{"one": [7, 1, 2]}] and not (tmp_path / "_studies").exists()
    assert json.loads((tmp_path / "_records/one/steps.json").read_text())["seeds"].keys() == {"7", "1", "2"}


def test_the_study_s_file_stands_before_work_starts(tmp_path: Path) -> None:
    work = Work(tmp_path, of_variants(Storage("", tmp_path), "s", BASE, [MIXER, MODEL]))
    assert work.given == [{name: [7, 1, 2] for name in ("s", "s-mixer", "s-model")}] and work.study_files == [True]
    told = json.loads((tmp_path / "_studies/s/study.json").read_text())
    assert told["seeds"] == [7, 1, 2] and [each["name"] for each in told["variants"]] == ["mixer", "model"]
    assert not (tmp_path / "_studies/s/stopped.json").exists()


@pytest.mark.parametrize(("until", "more"), [("decided", 2), (0.003, 1), (1.0, 0)])
def test_a_rule_adds_seeds_to_the_undecided_and_says_why_it_stopped(until: Until, more: int, tmp_path: Path) -> None:
    work = Work(tmp_path, of_variants(Storage("", tmp_path), "s", BASE, [MIXER, MODEL]), until)
    added = [[7, 1, 2, 3, 4][: 4 + at] for at in range(more)]
    assert work.given[1:] == [{"s": seeds, "s-model": seeds} for seeds in added]
    assert {name: len(rows) for name, rows in work.rows.items()} == {"s": 3 + more, "s-mixer": 3, "s-model": 3 + more}
    stopped = json.loads((tmp_path / "_studies/s/stopped.json").read_text())
    assert {name: each["seeds"] for name, each in stopped.items()} == {"mixer": 3, "model": 3 + more}
    assert stopped["model"]["why"].startswith("undecided: p = " if until == "decided" else "half-width ")
    assert json.loads((tmp_path / "_studies/s/study.json").read_text())["seeds"] == [7, 1, 2]


def test_what_is_done_needs_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Callable[[RecordPlan], list[Row]] = lambda plan: [  # noqa: E731
        Row(plan.name, "laptop", "0", seed, "done", bpb_final=1.0) for seed in plan.seeds
    ]
    monkeypatch.setattr(rounds, "finished", done)
    work = Work(tmp_path, of_variants(Storage("", tmp_path), "s", BASE, [MIXER]))
    assert work.given == [] and "study s: all 6 seeds of 2 records were done before" in work.text.getvalue()
    assert len(pd.read_parquet(tmp_path)) == 6
    assert "record one: all 3 seeds were done before" in Work(tmp_path, alone(BASE, "one")).text.getvalue()


def test_variants_that_run_the_same_steps_are_refused(tmp_path: Path) -> None:
    same = variant("same", compute__max_restarts=9)
    study = of_variants(Storage("", tmp_path), "s", BASE, [MIXER, MODEL])
    rounds.check_differ(plans.of_study(study, tmp_path, (1, 2)))
    study = of_variants(Storage("", tmp_path), "s", BASE, [MIXER, same])
    with pytest.raises(RecipeError, match="variant 'same' runs the very steps of 'base'"):
        rounds.check_differ(plans.of_study(study, tmp_path, (1, 2)))
