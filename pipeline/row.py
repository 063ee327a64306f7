"""A seed's finished steps as its row of the results table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hedgemix import claim, stages
from hedgemix.config import Recipe, config_hash, to_dict
from hedgemix.dataset import Dataset
from pipeline.graph import SeedSteps
from pipeline.schema import Row


def build_row(
    record: str,
    recipe: Recipe,
    dataset: Dataset,
    steps: SeedSteps,
    standing: dict[str, dict[str, Any]],
    counted: dict[str, Any] | None,
    error: str | None,
) -> Row:
    """What is known of the seed so far; columns of steps that are not done stay empty.

    standing: the records of the seed's finished steps by their kind (`SeedSteps.records`); counted: of its counts.
    """
    records, where = list(standing.values()), steps.train.storage.where
    done = len(records) == len(steps.all())
    last = max(records, key=lambda found: found["finished_at"], default={})
    codes = {found["origin"].get("code_sha256") for found in records}
    values: dict[str, Any] = {}
    for found in records:
        values.update(found["result"])
        values[f"{found['kind']}_seconds"] = values.get(f"{found['kind']}_seconds", found["seconds"])
    total = values["artifact_bytes"] + values["code_bytes"] if done else None
    columns = {field.name for field in dataclasses.fields(Row)}
    known = {name: value for name, value in values.items() if name in columns}
    known |= {
        "status": "done" if done else "failed" if error else "pending",
        "error": None if done else error,
        "attempts": sum(found["attempts"] for found in records) if records else None,
        "lost_seconds": sum(found["lost_seconds"] for found in records) if records else None,
        "counts_seconds": counted["seconds"] if counted else None,
        "train_tokens": values.get("tokens"),
        "order": recipe.evaluate.order,
        "total_bytes": total,
        "limit_bytes": recipe.limits.total_bytes,
        "within_limits": within_limits(recipe, values, total) if total is not None else None,
        "valid_tokens": dataset.valid_tokens - 1,
        "valid_bytes": dataset.valid_bytes,
        "valid_sha256": dataset.valid_sha256,
        "train_sha256": dataset.train_sha256,
        "tokenizer_sha256": dataset.tokenizer_sha256,
        "vocab_size": dataset.vocab_size,
        "artifact_path": where(steps.quantize.folder / stages.ARTIFACT) if "quantize" in standing else None,
        "train_path": where(steps.train.folder) if "train" in standing else None,
        "evaluate_path": where(steps.evaluate.folder) if "evaluate" in standing else None,
        "dataset_path": where(Path(dataset.folder)) if dataset.folder else None,
        "workers": recipe.compute.workers,
        "evaluate_workers": recipe.compute.evaluate_workers,
        "text_sha256": dataset.text_sha256,
        "train_set_tokens": dataset.train_tokens,
        **last.get("origin", {}),
        "code_sha256": codes.pop() if len(codes) == 1 else None,
        "started_at": min((found["started_at"] for found in records), default=None),
        "finished_at": max((found["finished_at"] for found in records), default=None),
    }
    if done:
        known |= claim.kept(steps.evaluate.folder, values["artifact_sha256"], standing["evaluate"]["result"])
    return Row(
        record=record,
        recipe=recipe.recipe,
        config_hash=config_hash(recipe),
        seed=steps.seed,
        config=json.dumps(to_dict(recipe)),
        **known,
    )


def within_limits(recipe: Recipe, values: dict[str, Any], total_bytes: int) -> bool:
    return not stages.excesses(recipe.limits, total_bytes, values["train_seconds"], values["evaluate_seconds"])
