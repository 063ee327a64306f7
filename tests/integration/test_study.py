"""A study on a real Ray: steps that variants share run once, a failing variant leaves the others, a stopped study goes
on, and a second start runs what is new."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest

from hedgemix.runtime.files import read_json
from pipeline import record
from pipeline.execution.driver import Driver
from pipeline.steps.graph import plan_record
from pipeline.storage.store import Storage
from support import tiny_record

pytestmark = pytest.mark.slow

VARY = ["--vary", "evaluate.mixer.hedge-share", "0.02", "0.03", "--vary", "train.matrix_rate", "0.03"]
NAMES = {"hedge_share=0.03": "tiny-hedge_share-0.03", "matrix_rate=0.03": "tiny-matrix_rate-0.03"}
TOML = """
[[variant]]
name = "fewer orders"
evaluate.mixer.orders = [1, 2]

[[variant]]
[variant.train]
matrix_rate = 3e-2
"""


@dataclass
class Start:
    """What one start of the study left."""

    out: Path
    code: int
    output: str
    done: dict[str, int] = field(default_factory=dict)
    """Time of every step's result.json, by the step's name."""
    rows: dict[str, pd.DataFrame] = field(default_factory=dict)
    study: str = ""

    def __post_init__(self) -> None:
        self.done = {path.parent.name: path.stat().st_mtime_ns for path in self.out.glob("_steps/*/result.json")}
        self.rows = {path.stem: pd.read_parquet(path).set_index("seed") for path in self.out.glob("*.parquet")}
        self.study = (self.out / "_studies" / "tiny" / "study.json").read_text()


def kinds(steps: set[str]) -> Counter[str]:
    return Counter(name.partition("-")[0] for name in steps)


@pytest.fixture(scope="module")
def starts(ray_session: None, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Start]:
    """The study with something in the way of one variant's second training, stopped after its first training; the same
    again; and without what was in the way, with one more variant."""
    out = tmp_path_factory.mktemp("study")
    options = tiny_record.arguments(text, out, "--seeds", "1", "2", "--study", "tiny", "--track", "none")
    recipe, _ = record.parse(["laptop", *options, "--train.matrix-rate", "0.03"])
    dataset, data = record.prepare(recipe, Storage("", out), record.Console(quiet=True))
    way = plan_record("x", recipe, dataset, data, (2,)).seeds[2].train.folder / "step.lock"
    way.mkdir(parents=True)
    collect = Driver.collect

    def stop_after_training(driver: Driver) -> bool:
        ended = collect(driver)
        if any(drive.stands(1, "train") for drive in driver.drives):
            raise KeyboardInterrupt
        return ended

    with patch.object(Driver, "collect", stop_after_training):
        stopped = Start(out, *tiny_record.run_here([*options, *VARY]))
    failed = Start(out, *tiny_record.run_here([*options, *VARY]))
    way.rmdir()
    (out / "variants.toml").write_text(TOML)
    return [stopped, failed, Start(out, *tiny_record.run_here([*options, "--variants", str(out / "variants.toml")]))]


def test_a_stopped_study_says_so_and_has_its_tables(starts: list[Start]) -> None:
    stopped, failed, _ = starts
    assert stopped.code == 130 and "the same command goes on" in stopped.output
    assert set(stopped.rows) == {"tiny", *NAMES.values()}
    assert set(stopped.rows["tiny"].status) == {"pending"} and stopped.done.items() <= failed.done.items()
    assert kinds(set(stopped.done))["train"] >= 1 and "evaluate" not in kinds(set(stopped.done))


def test_steps_that_variants_share_run_once(starts: list[Start]) -> None:
    _, failed, _ = starts
    assert kinds(set(failed.done)) == {"data": 1, "counts": 1, "train": 3, "score": 3, "quantize": 3, "evaluate": 5}
    base, share = failed.rows["tiny"], failed.rows[NAMES["hedge_share=0.03"]]
    for seed in (1, 2):
        assert (
            base.artifact_sha256[seed] == share.artifact_sha256[seed]
            and base.train_path[seed] == share.train_path[seed]
        )
        assert base.bpb_quantized[seed] == share.bpb_quantized[seed] and base.bpb_hedge[seed] != share.bpb_hedge[seed]
    for folder in failed.out.glob("_steps/*/result.json"):
        assert read_json(folder)["attempts"] <= (2 if folder.parent.name.partition("-")[0] != "data" else 1)


def test_a_failing_variant_leaves_the_others(starts: list[Start]) -> None:
    _, failed, _ = starts
    rate = failed.rows[NAMES["matrix_rate=0.03"]]
    assert failed.code == 1 and rate.status.to_dict() == {1: "done", 2: "failed"}
    assert rate.error[2].startswith("train: IsADirectoryError")
    assert set(failed.rows["tiny"].status) == set(failed.rows[NAMES["hedge_share=0.03"]].status) == {"done"}
    assert "matrix_rate=0.03, seed 2 failed: train: " in failed.output


def test_a_second_start_runs_what_is_new_and_keeps_what_it_does_not_name(starts: list[Start]) -> None:
    _, failed, last = starts
    assert last.code == 0, last.output
    assert failed.done.items() <= last.done.items()
    new = set(last.done) - set(failed.done)
    assert kinds(new) == {"counts": 1, "train": 1, "score": 1, "quantize": 1, "evaluate": 3}
    told = json.loads(last.study)
    assert told["variants"] == [
        {"name": "hedge_share=0.03", "record": "tiny-hedge_share-0.03", "fields": {"evaluate.mixer.hedge_share": 0.03}},
        {"name": "matrix_rate=0.03", "record": "tiny-matrix_rate-0.03", "fields": {"train.matrix_rate": 0.03}},
        {"name": "fewer orders", "record": "tiny-fewer-orders", "fields": {"evaluate.mixer.orders": [1, 2]}},
    ]
    assert {name: told[name] for name in ("study", "recipe", "base", "seeds")} == {
        "study": "tiny", "recipe": "laptop", "base": "tiny", "seeds": [1, 2],
    }  # fmt: skip
    for each in told["variants"]:
        table = last.rows[each["record"]]
        assert set(table.status) == {"done"} and set(table.variant) == {each["name"]} and set(table.study) == {"tiny"}
        assert each["name"] in last.output
    assert set(last.rows["tiny"].variant) == {"base"} and "study.json" in last.output


def test_all_done_starts_no_ray(starts: list[Start], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = starts[0].out
    options = tiny_record.arguments(text, out, "--seeds", "1", "2", "--study", "tiny", "--track", "none", *VARY)
    with patch.object(record, "ray_started", lambda console: pytest.fail("Ray was started")):
        assert record.main(["laptop", *options]) == 0
    assert "study tiny: all 2 seeds of 3 records were done before" in capsys.readouterr().out
