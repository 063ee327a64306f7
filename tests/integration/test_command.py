"""The command line: recipes, overrides, and mistakes answered in one line before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hedgemix.config import ModelConfig, from_dict, to_dict
from hedgemix.config import Recipe as RecipeType
from hedgemix.data import shards
from hedgemix.recipes import RECIPES
from pipeline import record
from pipeline.execution import ray_session
from support import text_data, tiny_record


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.recipe == name
    assert from_dict(RecipeType, to_dict(recipe)) == recipe


def test_a_model_described_before_a_field_was_there_has_its_default() -> None:
    described = to_dict(RECIPES["laptop"]().model)
    del described["residual_dtype"]
    assert from_dict(ModelConfig, described) == RECIPES["laptop"]().model


def test_any_field_is_an_option() -> None:
    recipe, options = record.parse(["laptop", "--train.steps", "20", "--evaluate.ttt.rate", "0.5", "--seeds", "3", "4"])
    assert (recipe.train.steps, recipe.evaluate.ttt.rate, options.seeds) == (20, 0.5, (3, 4))
    assert recipe.model == RECIPES["laptop"]().model


def test_without_a_recipe_this_machine_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert record.parse([])[0].recipe == "laptop"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert record.parse(["--seeds", "1"])[0].recipe == "single_gpu"


def test_help_shows_fields_with_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        record.main(["record", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for expected in ("--train.budget-seconds", "--seeds", "--limits.total-bytes", "786432", "Wall clock"):
        assert expected in shown


VARY = ["--vary", "model.xsa", "false"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "laptop, single_gpu, record"),
        (["laptop", "--seeds", "1", "1"], "--seeds"),
        (["laptop", "--record", "../x"], "--record"),
        (["laptop", "--train.batch-tokens", "1000"], "train.batch_tokens 1000"),
        (["laptop", "--train.budget-seconds", "2"], "train.budget_seconds"),
        (["laptop", "--model.heads", "5"], "model.heads"),
        (["laptop", "--model.residual-dtype", "bfloat16"], "train.dtype bfloat16"),
        (["laptop", "--quantize.matrix-bits", "9"], "quantize.matrix_bits"),
        (["laptop", "--evaluate.window-tokens", "512"], "evaluate.window_tokens 512"),
        (["laptop", "--evaluate.mixer.hedge-share", "2"], "evaluate.mixer.hedge_share"),
        (["laptop", "--evaluate.mixer.orders", "1", "9"], "evaluate.mixer.orders"),
        (["laptop", "--model.logit-cap", "0"], "model.logit_cap"),
        (["laptop", "--compute.workers", "0"], "compute.workers"),
        (["laptop", "--limits.total-bytes", "0"], "limits.total_bytes"),
        (["laptop", "--data.source", "text", "--data.paths", "nowhere.txt"], "nowhere.txt"),
        (["laptop", "--data.packages", "no_such_package"], "data.packages"),
        (["record", "--compute.gpus-per-worker", "0"], "hedgemix download"),
        (["laptop", "--compute.gpus-per-worker", "1"], "torch sees no GPU on this machine"),
        (["laptop", "--seeds", "-1"], "--seeds -1: a seed is a number from 0"),
        (["laptop", "--seeds", str(2**63)], "--seeds 9223372036854775808"),
        (["laptop", "--out", ""], "--out '' is empty"),
        (["laptop", "--out="], "--out= is empty"),
        (["laptop", "--out", "file"], "--out file cannot be made"),
        (["laptop", "--out", "\udcfc"], "is not UTF-8"),
        (["laptop", "--record", "\udcfc"], "--record"),
        (["laptop", "--record", "mine", "--out", "."], "mine.parquet is no record's table"),
        (["laptop", "--data.paths", "file"], "data.paths is given, and data.source docs does not read it"),
        (
            ["laptop", "--data.source", "shards", "--data.no-case-markers"],
            "data.case_markers is given, and whether shards",
        ),
        (["laptop", "--data.shards-dir", "x"], "set data.source shards"),
        (["laptop", "--data.source", "text", "--data.paths", ".", "none.txt"], "none.txt does not exist"),
        (["laptop", "--data.memory-bytes", "2000000"], "data.memory_bytes 2,000,000 fills"),
        (["laptop", "--vary", "model.xs", "true"], "there is no field 'model.xs'; did you mean model.xsa?"),
        (["laptop", "--vary", "model.heads", "5", "7"], "2 problems   1. variant 'heads=5': model.width 96"),
        (["laptop", "--variants", "file"], "--variants file is no TOML"),
        (["laptop", "--cross"], "--cross is of a study; name its variants with --vary or --variants"),
        (["laptop", "--until", "decided"], "--until is of a study"),
        (["laptop", *VARY, "--record", "mine"], "name it with --study"),
        (["laptop", *VARY, "--study", "../x"], "--study"),
        (["laptop", *VARY, "--study", "x" * 81], "--study has 81 characters; take at most 80"),
        (["laptop", *VARY, "--until", "0"], "--until 0 is no width"),
        (["laptop", *VARY, "--until", "0.01", "--max-seeds", "2"], "--max-seeds 2 is less than the 3 of --seeds"),
        (["laptop", *VARY, "--max-seeds", "5"], "--max-seeds is read with --until"),
        (["laptop", *VARY, "--data.packages", "no_such_package"], "data.packages"),
        (["laptop", "--vary", "data.packages", "numpy", "no_such_package"], "variant 'packages=no_such_package'"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_session.ray, "init", lambda **options: pytest.fail("Ray was started"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("file").write_text("of somebody")
    pq.write_table(pa.table({"mine": [1]}), "mine.parquet")
    assert record.main(arguments) == 2
    assert pq.read_table("mine.parquet").to_pydict() == {"mine": [1]}
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and expected in printed.replace("\n", " ") and "Traceback" not in printed


def test_the_plan_of_a_study_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert record.main(["laptop", "--vary", "evaluate.ttt.head.rate", "0.3", "0.5", *VARY, "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "parameters     402,533" in shown and ": 3 records of 3 seeds" in shown and "-xsa-false" in shown
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tiny_record.text_file(tmp_path)
    options = ["--data.source", "text", "--data.paths", str(text), "--data.vocab-size", "400"]
    assert record.main(["laptop", *options, "--data.valid-fraction", "0.3", "--train.batch-tokens", "4096000"]) == 2
    assert "train.batch_tokens" in capsys.readouterr().err


def test_official_shards_are_used_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text_data.processor()
    Path("tokenizer.model").write_bytes(text_data.processor().serialized_model_proto())
    shards.write_shard("a_train_000000.bin", np.arange(300, dtype=np.uint16) % 500)
    shards.write_shard("a_val_000000.bin", np.arange(300, dtype=np.uint16) % 500)
    Path("a_val_000000.bin").write_bytes(Path("a_val_000000.bin").read_bytes()[:-10])
    options = ["--data.source", "shards", "--data.shards-dir", ".", "--data.tokenizer", "tokenizer.model"]
    assert record.main(["laptop", *options, "--data.vocab-size", "512"]) == 2
    printed = capsys.readouterr().err
    assert "a_val_000000.bin" in printed
