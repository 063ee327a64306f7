"""What the driver starts, and when: several records on one ledger, with tasks that do nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hedgemix.recipes import RECIPES
from pipeline.execution import driver, record_drive
from pipeline.execution.driver import Driver
from pipeline.execution.failures import Restarts
from pipeline.execution.job import Job
from pipeline.execution.ledger import Ledger
from pipeline.execution.record_drive import Drive
from pipeline.storage.store import Storage
from pipeline.study import fields
from pipeline.study.definition import of_variants
from pipeline.study.variants import Variant
from pipeline.tracking.follower import Trackers
from support import plans

BASE = RECIPES["laptop"]()


def variant(name: str, **values: Any) -> Variant:
    dotted = {field.replace("__", "."): value for field, value in values.items()}
    return Variant(name, dotted, fields.with_values(BASE, dotted))


MIXER = variant("mixer", evaluate__mixer__hedge_share=0.01)
MODEL = variant("model", model__xsa=False)


class Reference:
    """Stands for a task of Ray."""


@pytest.fixture
def freed() -> list[str]:
    """The steps whose places were freed."""
    return []


@pytest.fixture
def work(freed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A base, a variant of the mixer and one of the model, seeds 1 and 2, on a machine for one training."""
    monkeypatch.setattr(driver, "training_slots", lambda recipe: 1)
    monkeypatch.setattr(driver, "remove_group", freed.append)
    monkeypatch.setattr(record_drive.train_seed, "remote", lambda *arguments: Reference(), raising=False)
    for name in ("start_counts", "start_quantize", "start_score", "start_evaluation"):
        monkeypatch.setattr(record_drive.tasks, name, lambda *arguments: Reference())
    study = of_variants(Storage("", tmp_path), "s", BASE, [MIXER, MODEL])
    ledger = Ledger(Restarts(1))
    drives = [
        Drive(plan, Job(plan, plan.recipe, 1.0, {}, False, None), Console(quiet=True), Trackers([]), ledger)
        for plan in plans.of_study(study, tmp_path, (1, 2))
    ]
    for drive in drives:
        drive.look()
    return Driver(drives, ledger, None, Console(quiet=True))


def at_work(work: Driver) -> list[tuple[str, str, int | None]]:
    return sorted((task.stage, task.record, task.seed) for task in work.ledger.running.values())


def end(work: Driver, stage: str, error: Exception | None = None, **result: Any) -> None:
    """All tasks of this stage end, well or with the error."""
    for reference, task in list(work.ledger.running.items()):
        if task.stage == stage:
            del work.ledger.running[reference]
            if error:
                work.failed(task, error)
            else:
                plans.finish(task.step, **result)
    for drive in work.drives:
        drive.look()


def advance(work: Driver, *stages: str) -> None:
    """Let every stage end once what it waits for has."""
    for stage in stages:
        work.launch()
        end(work, stage, **({"bpb_final": 1.0} if stage == "evaluate" else {}))


def test_on_one_machine_the_base_trains_first_and_evaluations_are_not_shared_with_a_training(work: Driver) -> None:
    work.launch()
    work.launch()
    assert at_work(work) == [("count", "s", None), ("train", "s", 1)]  # the mixer's variant has the same training
    end(work, "count")
    end(work, "train")
    work.launch()
    assert at_work(work) == [("quantize", "s", 1), ("score", "s", 1)]
    end(work, "quantize")
    work.launch()
    assert at_work(work) == [("evaluate", "s", 1), ("evaluate", "s-mixer", 1), ("score", "s", 1)]
    end(work, "evaluate", bpb_final=1.0)
    work.launch()
    assert at_work(work) == [("score", "s", 1)]  # seed 1 is not done, so nothing else trains
    end(work, "score")
    assert [drive.done(1) for drive in work.drives] == [True, True, False]
    work.launch()
    assert at_work(work) == [("train", "s", 2)]


def test_every_step_is_started_once_over_all_records(work: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    started: Counter[str] = Counter()
    start = Drive.start

    def counted(drive: Drive, stage: str, step: Any, *rest: Any) -> bool:
        begun = start(drive, stage, step, *rest)
        started[step.name] += begun
        return begun

    monkeypatch.setattr(Drive, "start", counted)
    while work.unfinished():
        advance(work, "count", "train", "quantize", "score", "evaluate")
    every = {step.name for drive in work.drives for steps in drive.seeds.values() for step in steps.all()}
    every |= {drive.plan.counts.name for drive in work.drives}
    assert {name: count for name, count in started.items() if count} == dict.fromkeys(every, 1)
    kinds = Counter(name.partition("-")[0] for name in every)
    assert kinds == {"counts": 1, "train": 4, "quantize": 4, "score": 4, "evaluate": 6}


def test_a_cluster_is_told_of_all_trainings_at_once(work: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (driver, record_drive):
        monkeypatch.setattr(module, "on_cluster", lambda: True)
    work.launch()
    trainings = [each for each in at_work(work) if each[0] == "train"]
    assert trainings == [("train", "s", 1), ("train", "s", 2), ("train", "s-model", 1), ("train", "s-model", 2)]


def test_a_step_that_failed_for_good_fails_all_that_share_it_and_no_other(work: Driver, freed: list[str]) -> None:
    work.launch()
    end(work, "train", ValueError("wrong"))
    assert [drive.errors for drive in work.drives] == [{1: "train: ValueError: wrong"}] * 2 + [{}]
    assert freed == [work.drives[0].seeds[1].train.name]
    work.launch()
    assert ("train", "s", 2) in at_work(work)  # and seed 1 is not tried again
    for _ in range(5):
        advance(work, "count", "train", "quantize", "score", "evaluate")
    assert not work.unfinished() and [drive.done(2) for drive in work.drives] == [True] * 3
    assert [drive.errors.keys() for drive in work.drives] == [{1}, {1}, set()]


def test_a_lost_step_is_started_again_as_often_as_the_recipe_says_over_all_records(
    work: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.execution.failures.FIRST_REST_SECONDS", 0.0)
    work.launch()
    end(work, "train", ConnectionError("lost"))
    work.launch()
    assert ("train", "s", 1) in at_work(work) and not work.drives[0].errors
    end(work, "train", ConnectionError("lost again"))
    assert set(work.drives[0].errors) == set(work.drives[1].errors) == {1}


def test_counts_that_failed_fail_seeds_once_they_need_them(work: Driver) -> None:
    work.launch()
    end(work, "count", ValueError("no text"))
    assert not work.drives[0].errors
    for _ in range(5):
        advance(work, "train", "quantize", "score")
    work.launch()
    assert all(drive.errors == dict.fromkeys((1, 2), "count: ValueError: no text") for drive in work.drives)
    assert not work.unfinished() and not work.ledger.running


def test_jobs_of_other_sizes_wait_until_a_machine_is_free(work: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "training_slots", lambda recipe: 8)
    work.launch()
    assert len(work.ledger.training()) == 4
    work.ledger.running.clear()
    model = work.drives[2]
    wide = fields.with_values(model.job.recipe, {"compute.workers": 3})
    work.drives[2] = Drive(
        model.plan, Job(model.plan, wide, 1.0, {}, False, None), model.console, model.trackers, work.ledger,
        records=model.records,
    )  # fmt: skip
    work.launch()
    assert {task.record for task in work.ledger.training()} == {"s"}


def test_a_damaged_step_is_set_aside_for_all_that_share_it(work: Driver) -> None:
    advance(work, "count", "train", "quantize", "score")
    assert all(drive.stands(1, "quantize") for drive in work.drives[:2])
    work.repair(work.drives[0].seeds[1].quantize.name)
    assert not any(drive.stands(1, "quantize") for drive in work.drives)
    work.ledger.running.clear()
    work.launch()
    assert at_work(work) == [("quantize", "s", 1)]
