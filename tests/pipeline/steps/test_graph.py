"""Steps on disk: keys, atomic results, the record's lock."""

from __future__ import annotations

import math
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hedgemix.config import DataConfig, Recipe
from hedgemix.data.dataset import Dataset
from hedgemix.recipes import RECIPES
from hedgemix.standalone import script
from pipeline.steps import graph
from pipeline.storage.store import Storage


def dataset(**changes: Any) -> Dataset:
    hints = typing.get_type_hints(Dataset)
    blank = {str: "x", int: 10, int | None: 10, float | None: 0.5, tuple[str, ...]: ()}
    known = {name: blank[hint] for name, hint in hints.items()}
    return Dataset(**{**known, **changes})


def keys(recipe: Recipe, data: Dataset, seed: int = 1) -> dict[str, str]:
    made = graph.step(Storage("", Path("r")), "data")
    plan = graph.plan_record("small", recipe, data, made, (seed,))
    return {step.kind: step.key for step in plan.seeds[seed].all()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {kind for kind in before if before[kind] != after[kind]}


def test_a_step_is_named_by_what_it_reads_and_nothing_else() -> None:
    recipe = RECIPES["laptop"]()
    base = keys(recipe, dataset())
    assert changed(base, keys(recipe, dataset())) == set()
    assert changed(base, keys(recipe, dataset(), seed=2)) == {"train", "score", "quantize", "evaluate"}
    mixer = replace(recipe.evaluate, mixer=replace(recipe.evaluate.mixer, hedge_share=0.01))
    assert changed(base, keys(replace(recipe, evaluate=mixer), dataset())) == {"evaluate"}
    window = replace(recipe.evaluate, window_tokens=128)
    assert changed(base, keys(replace(recipe, evaluate=window), dataset())) == {"score", "evaluate"}
    bits = replace(recipe, quantize=replace(recipe.quantize, matrix_bits=4))
    assert changed(base, keys(bits, dataset())) == {"quantize", "evaluate"}
    limit = replace(recipe, limits=replace(recipe.limits, total_bytes=recipe.limits.total_bytes - 4096))
    assert changed(base, keys(limit, dataset())) == {"quantize", "evaluate"}  # it decides the steps of an artifact
    published = replace(limit, quantize=replace(limit.quantize, method="reference"))
    raised = replace(published, limits=recipe.limits)
    assert keys(published, dataset()) == keys(raised, dataset())
    assert changed(base, keys(recipe, dataset(valid_sha256="other"))) == {"score", "evaluate"}
    assert changed(base, keys(recipe, dataset(train_sha256="other"))) == {"train", "score", "quantize", "evaluate"}
    ranks = replace(recipe, compute=replace(recipe.compute, evaluate_workers=8))
    assert changed(base, keys(ranks, dataset())) == set()
    workers = replace(recipe, compute=replace(recipe.compute, workers=4))
    assert "train" in changed(base, keys(workers, dataset()))


@pytest.mark.parametrize("tokens", [2, 1000, 1001, 1002, 2500])
def test_a_plan_counts_bytes_and_chunks_as_a_person_would(tokens: int) -> None:
    recipe = RECIPES["laptop"]()
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, chunk_tokens=1000))
    made = graph.step(Storage("", Path("r")), "data")
    plan = graph.plan_record("small", recipe, dataset(valid_tokens=tokens), made, (3, 1))
    assert plan.code_bytes == len(script.build(recipe)) and plan.storage == made.storage
    pages = math.ceil(plan.code_bytes / 4096)
    assert plan.room_bytes == recipe.limits.total_bytes - 4096 * pages
    assert plan.chunks == len({target // 1000 for target in range(1, tokens)})  # the first token is no target
    assert [steps.seed for steps in plan.seeds.values()] == list(plan.seeds) == [3, 1]
    names = [step.name for steps in plan.seeds.values() for step in steps.all()]
    assert len({*names, plan.counts.name, plan.data.name}) == 10


def test_a_memory_names_another_artifact_and_another_index_but_no_other_training() -> None:
    recipe, storage = RECIPES["laptop"](), Storage("", Path("r"))

    def steps_of(**changes: str) -> tuple[graph.SeedSteps, str]:
        data = dataset(**changes)
        return graph.seed_steps(storage, recipe, data, 1, 10**6), graph.counts_step(storage, recipe, data).name

    (plain, plain_counts), (one, one_counts) = steps_of(), steps_of(memory="memory.ppmd", memory_sha256="a")
    two, two_counts = steps_of(memory="memory.ppmd", memory_sha256="b")
    assert plain.train == one.train == two.train and plain.score == one.score
    assert len({plain.quantize.name, one.quantize.name, two.quantize.name}) == 3
    assert len({plain_counts, one_counts, two_counts}) == 3


def test_the_data_step_sees_its_files_change(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    config = DataConfig(source="text", paths=(str(tmp_path),))
    before = graph.data_step(Storage("", tmp_path), config).key
    assert graph.data_step(Storage("", tmp_path), config).key == before
    file.write_text("longer")
    assert graph.data_step(Storage("", tmp_path), config).key != before


def test_the_data_step_looks_at_its_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    shards, text = DataConfig(source="shards", shards_dir="shards"), DataConfig(source="text", paths=(".",))
    before = graph.data_step(Storage("", tmp_path), shards).key, graph.data_step(Storage("", tmp_path), text).key
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one.parquet.tmp").write_text("x")
    assert (
        graph.data_step(Storage("", tmp_path), shards).key,
        graph.data_step(Storage("", tmp_path), text).key,
    ) == before
    (tmp_path / "shards" / "a_train_000000.bin").write_text("x")
    (tmp_path / "a.jsonl.zst").write_text("x")
    assert (
        graph.data_step(Storage("", tmp_path), shards).key != before[0]
        and graph.data_step(Storage("", tmp_path), text).key != before[1]
    )
