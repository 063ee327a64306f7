"""The tiny record's seed by the stages themselves, in this process: what a train_gpt.py has to give too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tinyrecord
from rich.console import Console

from hedgemix import dataset as datasets
from hedgemix import script, stages
from hedgemix.checkpoint import nothing
from hedgemix.clock import never
from hedgemix.config import Recipe
from hedgemix.files import silent
from pipeline import record
from pipeline.storage import Storage


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


def silent_line(line: str) -> None:
    """Says nothing."""


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal to the last digit, but for seconds and what follows from them."""
    names = [name for name in expected if name.startswith("bpb_")] + ["nats", "nats_per_token", "train_loss_nats"]
    names += ["steps", "artifact_sha256", "artifact_bytes", "theta", "expert_weights", "ensemble_weights"]
    return [found[name] for name in names] == [expected[name] for name in names]
