"""The command end to end on real Ray processes: a record, what is not done twice, failures, several workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import ray
from rich.console import Console

from hedgemix.config import config_hash, to_dict
from hedgemix.runtime.files import read_json
from hedgemix.standalone import main as standalone
from hedgemix.standalone import script
from pipeline import record
from pipeline.results.row import build_row
from pipeline.steps import graph
from pipeline.storage.store import Storage
from support import tiny_record

pytestmark = pytest.mark.slow

BITS = ["bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final", "bpb_published"]


def row(out: Path, seed: int = 1) -> pd.Series:
    table = pd.read_parquet(out)
    return table[table.seed == seed].iloc[0]


def test_a_record_ends_with_its_table(undisturbed: tuple[Path, int, str]) -> None:
    out, _, output = undisturbed
    done = row(out)
    assert done.status == "done" and pd.isna(done.error)
    assert done.steps == 12 and done.train_tokens == 12 * 512 and done.restarts == 0
    assert done.parameters > 100_000 and done.total_bytes == done.artifact_bytes + done.code_bytes
    assert Path(done.artifact_path).stat().st_size == done.artifact_bytes
    assert done.valid_tokens == 3999
    for column in BITS:
        assert 0 < done[column] < 20
        if column not in ("bpb_ttt", "bpb_published"):  # the others are printed as they are stored
            assert f"{done[column]:.4f}" in output
    assert done.bpb_final < done.bpb_quantized
    assert abs(done.bpb_quantized - done.bpb_full) < 0.02
    assert done.bpb_final * done.valid_bytes == pytest.approx(
        done.nats_per_token * done.valid_tokens / 0.6931471805599453
    )
    assert str(out / "tiny.parquet") in output and "pandas.read_parquet" in output


def test_the_seed_alone_gives_the_same_bits(undisturbed: tuple[Path, int, str], text: Path, tmp_path: Path) -> None:
    done = row(undisturbed[0])
    recipe, _ = record.parse(["laptop", *tiny_record.arguments(text, tmp_path)])
    assert done.code_bytes == script.n_bytes(recipe) and done.code_sha256 == script.sha256()
    assert list(done.requirements) == script.requirements(recipe)
    options = ["--seed", "1", "--out", str(tmp_path / "alone")]
    assert standalone.main(to_dict(recipe), {}, int(done.code_bytes), options) == 0
    found = read_json(tmp_path / "alone" / "result.json")
    for column in (*BITS, "artifact_sha256", "train_loss_nats", "nats_per_token"):
        assert found[column] == done[column], column


def test_a_failed_seed_is_a_row_with_its_error_and_leaves_the_others_alone(undisturbed: tuple[Path, int, str]) -> None:
    out, code, output = undisturbed
    failed = row(out, seed=2)
    assert code == 1
    assert (
        failed.status == "failed" and failed.error.startswith("train: IsADirectoryError") and "/train-" in failed.error
    )
    assert "seed 2 failed: train: " in output
    assert pd.isna(failed.bpb_final) and row(out).status == "done"


def test_the_same_command_does_no_work_twice_and_another_mixer_only_evaluates(
    undisturbed: tuple[Path, int, str],
    ray_session: None,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _, _ = undisturbed
    before = row(out)
    steps = {path: path.stat().st_mtime_ns for path in out.glob("_steps/*/result.json")}
    with monkeypatch.context() as patched:
        patched.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
        same = tiny_record.arguments(text, out, "--seeds", "1", "--record", "again")
        assert record.main(["laptop", *same]) == 0
        assert "nothing to do" in capsys.readouterr().out
        assert record.main(["laptop", *same, "--compute.max-restarts", "7"]) == 0
        others = ["--compute.evaluate-workers", "2", "--train.matrix-rate", "0.5"]
        assert record.main(["laptop", *same, *others]) == 2
        told = capsys.readouterr().err
    assert "train.matrix_rate was " in told and "compute.evaluate_workers was 1 and is 2; give this one" in told
    assert {path: path.stat().st_mtime_ns for path in out.glob("_steps/*/result.json")} == steps
    again = pd.read_parquet(out / "again.parquet").iloc[0]
    renewed = json.loads((out / "_records" / "again" / "recipe.json").read_text())
    assert renewed == json.loads(again.config) and renewed["compute"]["max_restarts"] == 7
    assert all(again[column] == before[column] for column in BITS)

    other = ["--evaluate.mixer.kind", "hedge", "--evaluate.ttt.no-enabled", "--evaluate.cache.no-enabled"]
    other += ["--seeds", "1", "--record", "other"]
    code, output = tiny_record.run_here(tiny_record.arguments(text, out, *other))
    assert code == 0, output
    new = {path.parent.name.split("-")[0] for path in out.glob("_steps/*/result.json")} - {
        path.parent.name.split("-")[0] for path in steps
    }
    added = [path.parent.name for path in out.glob("_steps/*/result.json") if path not in steps]
    assert new == set() and [name.split("-")[0] for name in added] == ["evaluate"]
    changed = pd.read_parquet(out / "other.parquet").iloc[0]
    assert pd.isna(changed.bpb_ttt) and changed.bpb_final == changed.bpb_mixed == changed.bpb_hedge
    assert changed.bpb_quantized == before.bpb_quantized


def test_a_row_tells_the_ranks_of_the_evaluation_that_ran(undisturbed: tuple[Path, int, str], text: Path) -> None:
    out = undisturbed[0]
    arguments = tiny_record.arguments(text, out, "--compute.evaluate-workers", "2")
    recipe, _ = record.parse(["laptop", *arguments])
    storage = Storage("", out)
    plan = graph.plan_record("x", recipe, *record.prepare(recipe, storage, Console(quiet=True)), (1,))
    standing = plan.seeds[1].records()
    assert build_row(plan, 1, standing, None, None).evaluate_workers == 1
    del standing["evaluate"]["result"]["evaluate_workers"]  # as an older version left it
    assert build_row(plan, 1, standing, None, None).evaluate_workers == 2


def test_two_training_workers_and_two_evaluating_ranks_agree_with_one(
    undisturbed: tuple[Path, int, str], ray_session: None, text: Path, tmp_path: Path
) -> None:
    several = ["--compute.workers", "2", "--compute.evaluate-workers", "2", "--seeds", "1"]
    code, output = tiny_record.run_here(tiny_record.arguments(text, tmp_path, *several))
    assert code == 0, output
    mine, theirs = row(tmp_path), row(undisturbed[0])
    assert mine.workers == mine.evaluate_workers == 2 and theirs.workers == theirs.evaluate_workers == 1
    assert mine.train_loss_nats == pytest.approx(theirs.train_loss_nats, rel=1e-5)
    for column in ("bpb_full", "bpb_final"):
        assert mine[column] == pytest.approx(theirs[column], rel=2e-3)  # rounding to 31 levels magnifies float noise


def test_a_recipe_no_machine_can_hold_is_refused_at_once(
    ray_session: None, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # of a machine without any no text is made
    code, output = tiny_record.run_here(tiny_record.arguments(text, tmp_path, "--compute.gpus-per-worker", "4"))
    assert code == 2 and "compute.gpus_per_worker" in output and "4 GPU" in output


@pytest.mark.soak
def test_a_diverging_seed_says_so(text: Path, tmp_path: Path) -> None:
    absurd = ["--train.matrix-rate", "1e30", "--train.embedding-rate", "1e30", "--seeds", "1"]
    code, output = tiny_record.run(tiny_record.arguments(text, tmp_path, *absurd), tmp_path)
    assert code == 1
    assert "seed 1: the loss is nan at step" in row(tmp_path).error and "train.matrix_rate" in output


def test_rows_say_where_they_come_from(undisturbed: tuple[Path, int, str]) -> None:
    done = row(undisturbed[0])
    assert done.torch_version and done.ray_version and done.python_version and done.hardware.startswith("CPU")
    assert done.started_at.endswith("+00:00") and done.started_at <= done.finished_at
    assert len(done.valid_sha256) == len(done.train_sha256) == len(done.tokenizer_sha256) == 64
    recipe, _ = record.parse(["laptop"])
    assert done.config_hash != config_hash(replace(recipe))
