"""The records of a study round by round: what is missing of their seeds, and then of those that its rule adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from hedgemix import stages
from hedgemix.config import RecipeError
from hedgemix.data.dataset import Dataset
from pipeline.results.row import build_row
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.steps.graph import RecordPlan, keep_steps, plan_record
from pipeline.steps.step import DamagedStepError, Step, check
from pipeline.storage.lease import Held
from pipeline.study import definition
from pipeline.study.definition import Study
from pipeline.study.seeds import Seeds

Texts = Mapping[str, tuple[Dataset, Step]]
"""The dataset of every record, and the step that made it, by the record's name."""


def run_rounds(
    study: Study,
    texts: Texts,
    seeds: Seeds,
    run_missing: Callable[[Sequence[RecordPlan]], dict[str, list[Row]]],
    locks: Mapping[str, Held],
    console: Console,
) -> dict[str, list[Row]]:
    """Run what is missing by `run_missing`, which is not called when nothing is; returns all rows by record. Of a
    study, its file is written before work starts. locks: the records' locks, by name."""
    rows: dict[str, list[Row]] = {}
    storage = texts[study.base.name][1].storage
    while True:
        plans = plan_all(study, texts, seeds.now())
        if study.name and not rows:
            definition.write(storage, study, seeds.declared)
        for plan in plans:
            keep_steps(plan)
        done = {plan.name: finished(plan) for plan in plans}
        if not all(done.values()):
            done = run_missing(plans)
        else:
            for name, each in done.items():
                write_rows(storage, each, locks.get(name))
            if not rows:
                console.print(f"{told(study, plans)} were done before; nothing to do", markup=False)
        rows |= done
        if not seeds.more(rows):
            break
    if seeds.stopped:
        definition.write_stopped(storage, study.name, seeds.stopped)
    return rows


def told(study: Study, plans: Sequence[RecordPlan]) -> str:
    """Name all seeds of the record, or of the study's records."""
    count = len(plans[0].seeds)
    if study.name:
        return f"study {study.name}: all {count * len(plans)} seeds of {len(plans)} records"
    return f"record {plans[0].name}: all {count} seeds"


def plan_all(study: Study, texts: Texts, seeds: Mapping[str, Sequence[int]]) -> list[RecordPlan]:
    """Name every step of the records that have seeds to run; base first."""
    return [
        plan_record(record.name, record.recipe, *texts[record.name], seeds[record.name], study.name, record.variant)
        for record in study.records
        if record.name in seeds
    ]


def check_differ(plans: Sequence[RecordPlan]) -> None:
    """Raise RecipeError for a variant whose every step is another's too: what it changes moves no number."""
    seen: dict[str, str] = {}
    for plan in plans:
        [first, *_] = plan.seeds.values()
        name = " ".join(step.name for step in first.all())
        if name in seen:
            raise RecipeError(
                f"variant {plan.variant!r} runs the very steps of {seen[name]!r}: what it changes moves no number; "
                "leave it out"
            )
        seen[name] = plan.variant


def finished(plan: RecordPlan) -> list[Row]:
    """Build the rows of a record whose every seed is done and whose artifacts are what was written; else none."""
    standing = {seed: steps.records() for seed, steps in plan.seeds.items()}
    if not all(len(standing[seed]) == len(steps.all()) for seed, steps in plan.seeds.items()):
        return []
    try:
        for seed, steps in plan.seeds.items():
            check(steps.quantize, stages.ARTIFACT, standing[seed]["quantize"]["files"].get(stages.ARTIFACT))
    except DamagedStepError:
        return []
    counted = plan.counts.record()
    return [build_row(plan, seed, standing[seed], counted, None) for seed in plan.seeds]
