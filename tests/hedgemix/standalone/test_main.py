"""A seed without the pipeline: replayed to the bit, gone on with, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hedgemix import stages
from hedgemix.config import Recipe, from_dict, to_dict
from hedgemix.evaluate.evaluator import EvaluateResult
from hedgemix.runtime.files import load_tensors, read_json, sha256_of
from hedgemix.stages import QuantizeResult, ScoreResult, TrainStageResult
from hedgemix.standalone import main as standalone
from hedgemix.standalone import script
from hedgemix.train.trainer import Run
from support import tiny_seed

CLOCKED = ["--train.steps", "0", "--train.budget-seconds", "2", "--train.reserve-seconds", "0.8"]


@pytest.fixture(scope="module")
def recipe(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_seed.recipe(text, tmp_path_factory.mktemp("shards"), *CLOCKED, "--data.memory-bytes", "0")


@pytest.fixture(scope="module")
def ran(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of seed 3, its training ended by the clock."""
    folder = tmp_path_factory.mktemp("alone") / "first"
    assert start(recipe, "--seed", "3", "--out", str(folder)) == 0
    return folder


def start(recipe: Recipe, *options: str) -> int:
    return standalone.main(to_dict(recipe), {}, 80_000, options)


def scores(folder: Path) -> dict[str, Any]:
    return read_json(folder / "result.json")


def test_a_memory_takes_its_bytes_from_the_weights_and_pays(recipe: Recipe, ran: Path, tmp_path: Path) -> None:
    """The same training, and an artifact of the same bytes: what the memory takes is left to no weight."""
    first, log = scores(ran), ran / "train" / "log.jsonl"
    target = replace(recipe.quantize, target_bytes=first["artifact_bytes"])
    remembering = replace(recipe, quantize=target, data=replace(recipe.data, memory_bytes=10_000))
    out = tmp_path / "remembering"
    assert start(remembering, "--replay", str(log), "--seed", "3", "--out", str(out)) == 0
    found, told = scores(out), read_json(out / "data" / "dataset.json")
    assert sha256_of(ran / "train" / "weights.pt") == sha256_of(out / "train" / "weights.pt")
    assert 9_000 < told["memory_bytes"] <= 10_000 and found["artifact_bytes"] <= first["artifact_bytes"]
    assert found["theta"] > first["theta"] and found["bpb_final"] < first["bpb_final"]


def test_a_replay_repeats_what_the_clock_decided(
    recipe: Recipe, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ran / "train" / "log.jsonl"
    assert start(recipe, "--replay", str(log), "--seed", "3", "--out", str(tmp_path / "again")) == 0
    first, again = scores(ran), scores(tmp_path / "again")
    assert first["steps"] >= 10 and tiny_seed.same(again, first)
    assert sha256_of(ran / "train" / "weights.pt") == sha256_of(tmp_path / "again" / "train" / "weights.pt")
    lines = [read_fractions(folder / "train" / "log.jsonl") for folder in (ran, tmp_path / "again")]
    assert lines[0] == lines[1] and len(set(lines[0])) == first["steps"]

    # Another course of the same clock is another training: the replay is what makes them equal.
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(log.read_text().splitlines(keepends=True)[:9]))

    def trained_is_enough(**given: Any) -> None:
        raise OSError("it ends here")

    monkeypatch.setattr(stages, "score_stage", trained_is_enough)
    assert start(recipe, "--replay", str(shorter), "--seed", "3", "--out", str(tmp_path / "other")) == 2
    assert scores(tmp_path / "other" / "train")["steps"] == 9
    weights = [load_tensors(folder / "train" / "weights.pt") for folder in (ran, tmp_path / "other")]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def read_fractions(log: Path) -> list[float]:
    return [json.loads(line)["fraction"] for line in log.read_text().splitlines()]


def test_a_stopped_replay_goes_on(recipe: Recipe, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = replace(recipe, compute=replace(recipe.compute, checkpoint_seconds=0.01))
    options = ["--replay", str(ran / "train" / "log.jsonl"), "--seed", "3", "--out", str(tmp_path)]

    def lost(self: Any, checkpoints: Any, elapsed_seconds: float) -> None:
        save(self, checkpoints, elapsed_seconds)
        if self.step >= 6:
            raise OSError("the machine is gone")

    save = Run.save
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", lost)
        assert start(saving, *options) == 2
    assert not (tmp_path / "train" / "result.json").exists()
    assert start(saving, *options) == 0
    assert tiny_seed.same(scores(tmp_path), scores(ran)) and scores(tmp_path)["restarts"] == 1


def test_what_is_done_is_not_done_again(recipe: Recipe, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = scores(ran)
    assert start(recipe, "--seed", "3", "--out", str(ran)) == 0
    printed = capsys.readouterr().out
    assert "train:" not in printed and "evaluate:" not in printed and scores(ran) == before
    last = printed.splitlines()[-1]
    assert last == f"seed:3 val_loss:{before['nats_per_token']!r} val_bpb:{before['bpb_final']!r}"


def test_over_a_limit_the_exit_code_says_so(recipe: Recipe, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"train": TrainStageResult, "score": ScoreResult, "quantize": QuantizeResult, "evaluate": EvaluateResult}
    found = standalone.Results(*(from_dict(kind, scores(ran / name)) for name, kind in kinds.items()))
    for limit, value in (("train_seconds", 0.5), ("evaluate_seconds", 0.01), ("total_bytes", 90_000)):
        limited = replace(recipe, limits=replace(recipe.limits, **{limit: value}))
        assert standalone.report(limited, 3, found, 80_000, ran, print) == 1
        assert "over a limit: " in capsys.readouterr().out and len(scores(ran)["over"]) == 1
    assert standalone.report(recipe, 3, found, 80_000, ran, print) == 0


def test_mistakes_are_told(
    recipe: Recipe, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, *options: str, recipe: Recipe = recipe) -> None:
        assert start(recipe, *options) == 2
        assert message in capsys.readouterr().err

    log = tmp_path / "log"
    refused("holds another run", "--seed", "4", "--out", str(ran))
    refused("is not a folder", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "a"))
    docs = replace(recipe, data=replace(recipe.data, source="docs"))
    refused("reads installed packages", "--data", str(tmp_path), recipe=docs)
    two = replace(recipe, compute=replace(recipe.compute, evaluate_workers=2))
    refused("--nproc_per_node=2", recipe=two)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("there are 2; start it with torchrun --standalone --nproc_per_node=1")
    monkeypatch.delenv("WORLD_SIZE")
    log.write_text("seed 3\n")
    refused("has no steps", "--replay", str(log))
    log.write_text('{"step": 2, "fraction": 0.5}\n')
    refused("step 1 is missing", "--replay", str(log))
    log.write_text('{"step": 1, "fra\n')
    refused("a line is no JSON", "--replay", str(log))
    steps = '{"step": 1, "fraction": 0.0}\n'
    log.write_text('{"run": {"seed": 5}}\n' + steps)
    refused("is of seed 5", "--replay", str(log), "--seed", "3")
    log.write_text('{"run": {"seed": 5, "valid_sha256": "00"}}\n' + steps)
    refused("had another text (valid_sha256 00", "--replay", str(log), "--out", str(tmp_path / "b"))
    refused("No such file", "--replay", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("source", "tokenizer", "given", "expected"),
    [
        ("text", "", ["a", "b"], {"paths": ("a", "b")}),
        ("shards", "", ["a"], {"shards_dir": "a", "tokenizer": ""}),
        ("shards", "/elsewhere/tokens.model", ["{here}"], {"shards_dir": "{here}", "tokenizer": "{here}/tokens.model"}),
        ("shards", "/elsewhere/other.model", ["{here}"], {"shards_dir": "{here}", "tokenizer": ""}),
    ],
)
def test_the_text_may_lie_elsewhere(
    recipe: Recipe, tmp_path: Path, source: Any, tokenizer: str, given: list[str], expected: dict[str, Any]
) -> None:
    (tmp_path / "tokens.model").touch()
    theirs = replace(recipe, data=replace(recipe.data, source=source, tokenizer=tokenizer))
    options = standalone.parse(["--data", *(place.format(here=tmp_path) for place in given), "--cpus", "3"])
    found = standalone.placed(theirs, options)
    for name, value in expected.items():
        wanted = value.format(here=tmp_path) if isinstance(value, str) else value
        assert getattr(found.data, name) == wanted
    assert found.compute.cpus_per_worker == 3


@pytest.mark.soak
@pytest.mark.parametrize(("workers", "evaluate_workers"), [(2, 2), (2, 1), (1, 2)])
def test_two_ranks(text: Path, tmp_path: Path, workers: int, evaluate_workers: int) -> None:
    """torchrun's processes train and evaluate as many as the recipe says; one rank's numbers, but for rounding."""
    base = tiny_seed.recipe(text, tmp_path / "shards")
    compute = replace(base.compute, workers=workers, evaluate_workers=evaluate_workers)
    file = tmp_path / script.NAME
    file.write_bytes(script.build(replace(base, compute=compute)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(file), "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    found, expected = scores(tmp_path / "seed1"), tiny_seed.score(base, tmp_path / "one", 1)
    assert found["bpb_final"] == pytest.approx(expected["bpb_final"], rel=1e-3)
    assert found["steps"] == 12 and told.stdout.count("val_bpb:") == 1
    if workers == 1:
        assert found["artifact_sha256"] == expected["artifact_sha256"]
        assert found["bpb_final"] == pytest.approx(expected["bpb_final"], rel=1e-6)
