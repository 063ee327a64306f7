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
from pipeline.execution import driver
from pipeline.execution.driver import Driver
from pipeline.steps.graph import plan_record
from pipeline.storage.store import Storage
from support import tiny_record
from support.faulty_record import begun

pytestmark = pytest.mark.slow

VARY = ["--vary", "evaluate.mixer.hedge-share", "0.02", "0.03", "--vary", "train.matrix_rate", "0.03"]
SHARE, RATE, ORDERS = "tiny_study-hedge_share-0.03", "tiny_study-matrix_rate-0.03", "tiny_study-fewer-orders"
TOML = """
[[variant]]
name = "fewer orders"
evaluate.mixer.orders = [1, 2]

[[variant]]
[variant.evaluate.mixer]
hedge_share = 3e-2
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
        self.study = (self.out / "_studies" / "tiny_study" / "study.json").read_text()


def kinds(steps: set[str]) -> Counter[str]:
    return Counter(name.partition("-")[0] for name in steps)


@pytest.fixture(scope="module")
def starts(
    ray_session: None, undisturbed: tuple[Path, int, str], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Start]:
    """Three starts of a study, where a record of its base's first seed is done: with something in the way of one
    variant's second training, stopped after its first training; the same again; without that variant, and with one
    more. As on a laptop, one seed trains at a time."""
    out = begun(undisturbed, tmp_path_factory.mktemp("study"))
    options = tiny_record.arguments(text, out, "--seeds", "1", "2", "--study", "tiny_study", "--track", "none")
    recipe, _ = record.parse(["laptop", *options, "--train.matrix-rate", "0.03"])
    dataset, data = record.prepare(recipe, Storage("", out), record.Console(quiet=True))
    way = plan_record("x", recipe, dataset, data, (2,)).seeds[2].train.folder / "step.lock"
    way.mkdir(parents=True)
    collect = Driver.collect

    def stop_after_training(work: Driver) -> bool:
        ended = collect(work)
        if any(drive.stands(2, "train") for drive in work.drives):
            raise KeyboardInterrupt
        return ended

    (out / "variants.toml").write_text(TOML)
    with patch.object(driver, "training_slots", lambda recipe: 1):
        with patch.object(Driver, "collect", stop_after_training):
            stopped = Start(out, *tiny_record.run_here([*options, *VARY]))
        failed = Start(out, *tiny_record.run_here([*options, *VARY]))
        last = Start(out, *tiny_record.run_here([*options, "--variants", str(out / "variants.toml")]))
    return [stopped, failed, last]


def test_a_stopped_study_says_so_and_has_its_tables(starts: list[Start]) -> None:
    stopped, failed, _ = starts
    assert stopped.code == 130 and "the same command goes on" in stopped.output
    assert set(stopped.rows) == {"tiny_study", SHARE, RATE}
    assert stopped.rows["tiny_study"].status.to_dict() == {1: "done", 2: "pending"}
    assert kinds(set(stopped.done))["train"] == 2 and stopped.done.items() <= failed.done.items()


def test_steps_that_variants_share_run_once(starts: list[Start]) -> None:
    _, failed, _ = starts
    assert kinds(set(failed.done)) == {"data": 1, "counts": 1, "train": 3, "score": 3, "quantize": 3, "evaluate": 5}
    base, share = failed.rows["tiny_study"], failed.rows[SHARE]
    for seed in (1, 2):
        for column in ("artifact_sha256", "train_path", "bpb_quantized"):
            assert base[column][seed] == share[column][seed]
        assert base.bpb_hedge[seed] != share.bpb_hedge[seed]
    attempts = {path.parent.name: read_json(path)["attempts"] for path in failed.out.glob("_steps/*/result.json")}
    stopped = {name for name, count in attempts.items() if count > 1}
    assert kinds(stopped) <= kinds({"quantize-", "score-", "evaluate-", "evaluate- "})  # at work when it was stopped


def test_a_failing_variant_leaves_the_others(starts: list[Start]) -> None:
    _, failed, _ = starts
    rate = failed.rows[RATE]
    assert failed.code == 1 and rate.status.to_dict() == {1: "done", 2: "failed"}
    assert rate.error[2].startswith("train: IsADirectoryError")
    assert {*failed.rows["tiny_study"].status, *failed.rows[SHARE].status} == {"done"}
    assert "matrix_rate=0.03, seed 2 failed: train: " in failed.output


def test_a_second_start_runs_what_is_new_and_keeps_what_it_does_not_name(starts: list[Start]) -> None:
    _, failed, last = starts
    assert last.code == 0, last.output
    assert failed.done.items() <= last.done.items()
    assert kinds(set(last.done) - set(failed.done)) == {"counts": 1, "evaluate": 2}
    told = json.loads(last.study)
    assert told["variants"] == [
        {"name": "hedge_share=0.03", "record": SHARE, "fields": {"evaluate.mixer.hedge_share": 0.03}},
        {"name": "matrix_rate=0.03", "record": RATE, "fields": {"train.matrix_rate": 0.03}},
        {"name": "fewer orders", "record": ORDERS, "fields": {"evaluate.mixer.orders": [1, 2]}},
    ]
    assert {name: told[name] for name in ("study", "recipe", "base", "seeds")} == {
        "study": "tiny_study", "recipe": "laptop", "base": "tiny_study", "seeds": [1, 2],
    }  # fmt: skip
    for name, table in ((each["name"], last.rows[each["record"]]) for each in told["variants"]):
        assert set(table.variant) == {name} and set(table.study) == {"tiny_study"} and name in last.output
    assert set(last.rows[ORDERS].status) == {"done"} and set(last.rows["tiny_study"].variant) == {"base"}
    assert last.rows[RATE].status.to_dict() == {1: "done", 2: "failed"}  # not named, and left as it was


def test_all_done_starts_no_ray(starts: list[Start], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, vary = starts[0].out, VARY[:4]
    options = tiny_record.arguments(text, out, "--seeds", "1", "2", "--study", "tiny_study", "--track", "none", *vary)
    with patch.object(record, "ray_started", lambda console: pytest.fail("Ray was started")):
        assert record.main(["laptop", *options]) == 0
    assert "study tiny_study: all 2 seeds of 2 records were done before" in capsys.readouterr().out
