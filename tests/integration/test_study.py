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

VARY = ["--vary", "evaluate.mixer.hedge-share", "0.02", "0.03", "--vary", "train.matrix_rate", "0.03", "0.04"]
SHARE, ORDERS = "tiny_study-hedge_share-0.03", "tiny_study-fewer-orders"
RATE, FAILING = "tiny_study-matrix_rate-0.03", "tiny_study-matrix_rate-0.04"
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
    before: set[str] = field(default_factory=set)
    """The steps that were done before the first start."""

    def __post_init__(self) -> None:
        self.done = {path.parent.name: path.stat().st_mtime_ns for path in self.out.glob("_steps/*/result.json")}
        self.rows = {path.stem: pd.read_parquet(path).set_index("seed") for path in self.out.glob("*.parquet")}
        self.study = (self.out / "_studies" / "tiny_study" / "study.json").read_text(encoding="utf-8")


def kinds(steps: set[str]) -> Counter[str]:
    return Counter(name.partition("-")[0] for name in steps)


@pytest.fixture(scope="module")
def starts(
    ray_session: None, undisturbed: tuple[Path, int, str], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Start]:
    """Three starts of a study, where a record of its base is done: with something in the way of one variant's training,
    stopped after another's; the same again; without the trained variants, and with one more. As on a laptop, one seed
    trains at a time."""
    out = begun(undisturbed, tmp_path_factory.mktemp("study"))
    options = tiny_record.arguments(text, out, "--seeds", "1", "--study", "tiny_study", "--track", "none")
    recipe, _ = record.parse(["laptop", *options, "--train.matrix-rate", "0.04"])
    dataset, data = record.prepare(recipe, Storage("", out), record.Console(quiet=True))
    way = plan_record("x", recipe, dataset, data, (1,)).seeds[1].train.folder / "step.lock"
    way.mkdir(parents=True)
    before = {path.parent.name for path in out.glob("_steps/*/result.json")}
    collect = Driver.collect

    def stop_after_training(work: Driver) -> bool:
        ended = collect(work)
        if work.drives[2].stands(1, "train"):
            raise KeyboardInterrupt
        return ended

    (out / "variants.toml").write_text(TOML, encoding="utf-8")
    with patch.object(driver, "training_slots", lambda recipe: 1):
        with patch.object(Driver, "collect", stop_after_training):
            stopped = Start(out, *tiny_record.run_here([*options, *VARY]), before=before)
        failed = Start(out, *tiny_record.run_here([*options, *VARY]), before=before)
        last = Start(out, *tiny_record.run_here([*options, "--variants", str(out / "variants.toml")]))
    return [stopped, failed, last]


def test_a_stopped_study_says_so_and_has_its_tables(starts: list[Start]) -> None:
    stopped, failed, _ = starts
    assert stopped.code == 130 and "the same command goes on" in stopped.output
    assert {name: table.status[1] for name, table in stopped.rows.items() if name.startswith("tiny_study")} == {
        "tiny_study": "done", SHARE: "done", RATE: "pending", FAILING: "pending",
    }  # fmt: skip
    assert kinds(stopped.done.keys() - stopped.before)["train"] == 1 and stopped.done.items() <= failed.done.items()


def test_steps_that_variants_share_run_once(starts: list[Start]) -> None:
    _, failed, _ = starts
    assert kinds(failed.done.keys() - failed.before) == {"train": 1, "score": 1, "quantize": 1, "evaluate": 2}
    base, share = failed.rows["tiny_study"], failed.rows[SHARE]
    for column in ("artifact_sha256", "train_path", "bpb_quantized"):
        assert base[column][1] == share[column][1]
    assert base.bpb_hedge[1] != share.bpb_hedge[1]
    attempts = {path.parent.name: read_json(path)["attempts"] for path in failed.out.glob("_steps/*/result.json")}
    assert {count for name, count in attempts.items() if not name.startswith(("quantize", "score"))} == {1}


def test_a_failing_variant_leaves_the_others(starts: list[Start]) -> None:
    _, failed, _ = starts
    assert failed.code == 1 and failed.rows[FAILING].status[1] == "failed"
    assert failed.rows[FAILING].error[1].startswith("train: IsADirectoryError")
    assert {failed.rows[name].status[1] for name in ("tiny_study", SHARE, RATE)} == {"done"}
    assert "matrix_rate=0.04, seed 1 failed: train: " in failed.output


def test_a_second_start_runs_what_is_new_and_keeps_what_it_does_not_name(starts: list[Start]) -> None:
    _, failed, last = starts
    assert last.code == 0, last.output
    assert failed.done.items() <= last.done.items()
    assert kinds(set(last.done) - set(failed.done)) == {"counts": 1, "evaluate": 1}
    told = json.loads(last.study)
    assert told["variants"] == [
        {"name": "hedge_share=0.03", "record": SHARE, "fields": {"evaluate.mixer.hedge_share": 0.03}},
        {"name": "matrix_rate=0.03", "record": RATE, "fields": {"train.matrix_rate": 0.03}},
        {"name": "matrix_rate=0.04", "record": FAILING, "fields": {"train.matrix_rate": 0.04}},
        {"name": "fewer orders", "record": ORDERS, "fields": {"evaluate.mixer.orders": [1, 2]}},
    ]
    assert {name: told[name] for name in ("study", "recipe", "base", "seeds")} == {
        "study": "tiny_study", "recipe": "laptop", "base": "tiny_study", "seeds": [1],
    }  # fmt: skip
    for name, table in ((each["name"], last.rows[each["record"]]) for each in told["variants"]):
        assert set(table.variant) == {name} and set(table.study) == {"tiny_study"} and name in last.output
    assert set(last.rows[ORDERS].status) == {"done"} and set(last.rows["tiny_study"].variant) == {"base"}
    assert last.rows[FAILING].status[1] == "failed"  # not named, and left as it was


def test_all_done_starts_no_ray(starts: list[Start], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, vary = starts[0].out, VARY[:4]
    options = tiny_record.arguments(text, out, "--seeds", "1", "--study", "tiny_study", "--track", "none", *vary)
    with patch.object(record, "ray_started", lambda console: pytest.fail("Ray was started")):
        assert record.main(["laptop", *options]) == 0
    assert "study tiny_study: all 2 seeds of 2 records were done before" in capsys.readouterr().out
