"""The tiny record's seed by the stages themselves, in this process: what a train_gpt.py has to give too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hedgemix import stages
from hedgemix.audit import auditor
from hedgemix.audit.claim import claims
from hedgemix.audit.findings import Finding
from hedgemix.audit.plan import Plan
from hedgemix.config import Recipe, from_dict
from hedgemix.data import dataset as datasets
from hedgemix.standalone import script
from pipeline import record
from pipeline.results.provenance import origin
from pipeline.results.row import build_row
from pipeline.results.table import write_rows
from pipeline.steps import graph
from pipeline.steps.recovery import clocked
from pipeline.steps.step import Made, Step, perform, save_outputs
from pipeline.storage.store import Storage
from pipeline.submission.evidence import AUDITED
from support import tiny_record


def recipe(text: Path, folder: Path, *options: str) -> Recipe:
    """The tiny record's, on shards made from the text under the folder, which training and scoring read alone."""
    made, _ = record.parse(["laptop", *tiny_record.arguments(text, folder, *options)])
    _, data = record.prepare(made, Storage("", folder), Console(quiet=True))
    vocab_size, tokens = made.data.vocab_size, made.data.max_valid_tokens
    shards = replace(made.data, source="shards", paths=(), shards_dir=str(data.folder), vocab_size=vocab_size)
    return replace(made, data=replace(shards, max_valid_tokens=tokens))


def score(recipe: Recipe, folder: Path, seed: int) -> dict[str, Any]:
    """Every stage's result, together, from the folder's own copy of the dataset."""
    datasets.save(datasets.prepare(recipe.data, folder, silent_line), folder)
    dataset, room = datasets.load(folder), stages.artifact_room(recipe, script.n_bytes(recipe))
    given: Any = {"recipe": recipe, "dataset": dataset}
    results: list[Any] = [
        stages.train_stage(**given, seed=seed, folder=folder),
        stages.score_stage(**given, train_folder=folder),
        stages.quantize_stage(**given, seed=seed, train_folder=folder, folder=folder, room_bytes=room),
    ]
    stages.counts_stage(**given, folder=folder)
    places: Any = {"artifact_path": folder / stages.ARTIFACT, "index_folder": folder / stages.INDEX}
    results.append(stages.evaluate_stage(**given, **places, folder=folder))
    return {name: value for result in results for name, value in asdict(result).items()}


def make_record(recipe: Recipe, folder: Path, seeds: Sequence[int]) -> Path:
    """A finished record as the driver leaves it, its steps done in this process; the path of its table."""
    storage, made = Storage("", folder), []
    dataset, data = record.prepare(recipe, storage, Console(quiet=True))
    plan = graph.plan_record("tiny", recipe, dataset, data, seeds)
    graph.keep_steps(plan)
    made_by, counts = origin() | {"requirements": script.requirements(recipe)}, plan.counts

    def do(step: Step, work: Callable[..., Any], **arguments: Any) -> None:
        more = {"code_bytes": plan.code_bytes, "evaluate_workers": 1} if step.kind == "evaluate" else {}

        def made() -> Made:
            with nullcontext() if step.kind in ("train", "evaluate") else clocked(step):  # those have their own clock
                return save_outputs(step, asdict(work(recipe=recipe, dataset=dataset, **arguments)) | more)

        perform(step, made, made_by)

    do(counts, stages.counts_stage, folder=counts.folder)
    for seed, steps in plan.seeds.items():
        train, quantize, evaluate = steps.train.folder, steps.quantize.folder, steps.evaluate.folder
        do(steps.train, stages.train_stage, seed=seed, folder=train)
        do(steps.score, stages.score_stage, train_folder=train)
        room = plan.room_bytes
        do(steps.quantize, stages.quantize_stage, seed=seed, train_folder=train, folder=quantize, room_bytes=room)
        places = {"artifact_path": quantize / stages.ARTIFACT, "index_folder": counts.folder / stages.INDEX}
        do(steps.evaluate, stages.evaluate_stage, **places, folder=evaluate)
        made.append(build_row(plan, seed, steps.records(), counts.record(), None))
    return write_rows(storage, made)


def passed(table: Path) -> None:
    """Leave what full audits of all seeds leave that pass, without making them: their checks are tested elsewhere."""
    for claim in claims(table):
        work = auditor.start(claim, Plan(), lambda finding: None)
        work.findings = [Finding(name, True, "", f"{name} holds.") for name in AUDITED]
        auditor.write(work)


def recipe_of(row: dict[str, Any]) -> Recipe:
    return from_dict(Recipe, json.loads(row["config"]))


def silent_line(line: str) -> None:
    """Says nothing."""


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal to the last digit, but for seconds and what follows from them."""
    names = [name for name in expected if name.startswith("bpb_")] + ["nats", "nats_per_token", "train_loss_nats"]
    names += ["steps", "artifact_sha256", "artifact_bytes", "theta", "expert_weights", "ensemble_weights"]
    return [found[name] for name in names] == [expected[name] for name in names]
