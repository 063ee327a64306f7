"""The tiny record's seed by the stages themselves, in this process: what a train_gpt.py has to give too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tinyrecord
from rich.console import Console

from hedgemix import dataset as datasets
from hedgemix import script, stages
from hedgemix.checkpoint import nothing
from hedgemix.clock import never
from hedgemix.config import Recipe, from_dict
from hedgemix.files import silent
from pipeline import record, results, rows, runs
from pipeline.steps import Made, Step, clocked, keep, perform
from pipeline.store import Storage


def recipe(text: Path, folder: Path, *options: str) -> Recipe:
    """The tiny record's, on shards made from the text under the folder, which training and scoring read alone."""
    made, _ = record.parse(["laptop", *tinyrecord.arguments(text, folder, *options)])
    _, data = record.prepare(made, Storage("", folder), Console(quiet=True))
    vocab_size, tokens = made.data.vocab_size, made.data.max_valid_tokens
    shards = replace(made.data, source="shards", paths=(), shards_dir=str(data.folder), vocab_size=vocab_size)
    return replace(made, data=replace(shards, max_valid_tokens=tokens))


def score(recipe: Recipe, folder: Path, seed: int) -> dict[str, Any]:
    """Every stage's result, together, from the folder's own copy of the dataset."""
    datasets.save(datasets.prepare(recipe.data, folder, silent_line), folder)
    dataset, room = datasets.load(folder), stages.artifact_room(recipe, script.n_bytes(recipe))
    found = stages.train_stage(recipe, dataset, seed, folder, silent, None, nothing, never)
    found |= stages.score_stage(recipe, dataset, folder, silent)
    found |= stages.quantize_stage(recipe, dataset, seed, folder, folder, room)
    stages.counts_stage(recipe, dataset, folder)
    artifact, index = folder / stages.ARTIFACT, folder / stages.INDEX
    return found | stages.evaluate_stage(recipe, dataset, artifact, index, folder, silent, False, nothing, never)


def make_record(recipe: Recipe, folder: Path, seeds: Sequence[int]) -> Path:
    """A finished record as the driver leaves it, its steps done in this process; the path of its table."""
    storage, made = Storage("", folder), []
    dataset, _ = record.prepare(recipe, storage, Console(quiet=True))
    code, made_by = script.n_bytes(recipe), rows.origin() | {"requirements": script.requirements(recipe)}
    counts = runs.counts_step(storage, recipe, dataset)

    def do(step: Step, work: Callable[[], dict[str, Any]]) -> None:
        def made() -> Made:
            with nullcontext() if step.kind in ("train", "evaluate") else clocked(step):  # those have their own clock
                return keep(step, work())

        perform(step, made, made_by)

    do(counts, lambda: stages.counts_stage(recipe, dataset, counts.folder))
    for seed in seeds:
        steps = runs.seed_steps(storage, recipe, dataset, seed)
        train, quantize, evaluate = steps.train.folder, steps.quantize.folder, steps.evaluate.folder
        room = stages.artifact_room(recipe, code)
        artifact, index = quantize / stages.ARTIFACT, counts.folder / stages.INDEX
        do(steps.train, partial(stages.train_stage, recipe, dataset, seed, train, silent, None, nothing, never))
        do(steps.score, partial(stages.score_stage, recipe, dataset, train, silent))
        do(steps.quantize, partial(stages.quantize_stage, recipe, dataset, seed, train, quantize, room))
        parts = recipe, dataset, artifact, index, evaluate, silent, False, nothing, never
        do(steps.evaluate, lambda parts=parts: stages.evaluate_stage(*parts) | {"code_bytes": code})
        made.append(rows.build_row("tiny", recipe, dataset, steps, steps.records(), counts.record(), None))
    return results.write(storage, made)


def recipe_of(row: dict[str, Any]) -> Recipe:
    return from_dict(Recipe, json.loads(row["config"]))


def silent_line(line: str) -> None:
    """Says nothing."""


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal to the last digit, but for seconds and what follows from them."""
    names = [name for name in expected if name.startswith("bpb_")] + ["nats", "nats_per_token", "train_loss_nats"]
    names += ["steps", "artifact_sha256", "artifact_bytes", "theta", "expert_weights", "ensemble_weights"]
    return [found[name] for name in names] == [expected[name] for name in names]
