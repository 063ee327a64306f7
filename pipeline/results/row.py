"""A seed's finished steps as its row of the results table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hedgemix import stages
from hedgemix.audit import claim
from hedgemix.config import Recipe, config_hash, to_dict
from pipeline.results.schema import Row
from pipeline.steps.graph import RecordPlan


def _columns(*same: str, **renamed: str) -> dict[str, str]:
    """Fields that are named like their column, and those that are not."""
    return {name: name for name in same} | renamed


RESULT_COLUMNS = {
    "train": _columns(
        "parameters", "steps", "train_loss_nats", "train_seconds", "loop_seconds", "calibrate_seconds",
        "warmup_seconds", "ms_per_step", "restarts", "checkpoint_failures", "qat_steps", "peak_memory_bytes",
        "hardware", tokens="train_tokens",
    ),
    "score": _columns("bpb_full"),
    "quantize": _columns(
        "theta", "expected_loss_nats", "gptq_seconds", "largest_damping", "artifact_bytes", "bits_per_weight",
        "artifact_sha256",
    ),
    "evaluate": _columns(
        "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final", "bpb_hedge", "bpb_logistic", "bpb_published",
        "published_mass", "nats_per_token", "evaluate_seconds", "scoring_seconds", "mixing_seconds", "ttt_seconds",
        "expert_names", "expert_weights", "ensemble_names", "ensemble_weights", "code_bytes",
        "evaluate_workers",
    ),
}  # fmt: skip
"""Which column a field of a stage's result fills, by the kind of step; code_bytes and evaluate_workers are of the step
alone. The result.json of an older hedgemix may lack a field: its column stays empty, but for evaluate_workers, which is
then the recipe's."""
SECONDS_COLUMNS = {"score": "score_seconds", "quantize": "quantize_seconds"}
"""Which column the seconds of the whole step fill; training and evaluation have clocks of their own."""
_filled = [column for fields in RESULT_COLUMNS.values() for column in fields.values()] + [*SECONDS_COLUMNS.values()]
assert len(set(_filled)) == len(_filled), "two stages fill one column"


def build_row(
    plan: RecordPlan,
    seed: int,
    standing: dict[str, dict[str, Any]],
    counted: dict[str, Any] | None,
    error: str | None,
) -> Row:
    """Build the row from what is known of the seed so far; columns of steps that are not done stay empty.

    standing: the records of the seed's finished steps by their kind (`SeedSteps.records`); counted: of its counts.
    """
    recipe, dataset, steps = plan.recipe, plan.dataset, plan.seeds[seed]
    records, where = list(standing.values()), plan.storage.where
    done = len(records) == len(steps.all())
    last = max(records, key=lambda found: found["finished_at"], default={})
    codes = {found["origin"].get("code_sha256") for found in records}
    values = filled(standing)
    total = values["artifact_bytes"] + values["code_bytes"] if done else None
    known = values | {
        "status": "done" if done else "failed" if error else "pending",
        "error": None if done else error,
        "study": plan.study or None,
        "variant": plan.variant or None,
        "retries": sum(found["attempts"] - 1 for found in records) if records else None,
        "lost_seconds": sum(found["lost_seconds"] for found in records) if records else None,
        "counts_seconds": counted["seconds"] if counted else None,
        "order": recipe.evaluate.order,
        "total_bytes": total,
        "limit_bytes": recipe.limits.total_bytes,
        "within_limits": within_limits(recipe, values, total) if total is not None else None,
        "memory_bytes": dataset.memory_bytes,
        "memory_tokens": dataset.memory_tokens,
        "valid_tokens": dataset.valid_tokens - 1,
        "valid_bytes": dataset.valid_bytes,
        "valid_sha256": dataset.valid_sha256,
        "valid_overlap_share": dataset.valid_overlap_share,
        "overlap_window": dataset.overlap_window or None,
        "train_bytes": dataset.train_bytes,
        "train_bytes_removed": dataset.train_bytes_removed,
        "train_sha256": dataset.train_sha256,
        "tokenizer_sha256": dataset.tokenizer_sha256,
        "vocab_size": dataset.vocab_size,
        "artifact_path": where(steps.quantize.folder / stages.ARTIFACT) if "quantize" in standing else None,
        "train_path": where(steps.train.folder) if "train" in standing else None,
        "evaluate_path": where(steps.evaluate.folder) if "evaluate" in standing else None,
        "dataset_path": where(Path(dataset.folder)) if dataset.folder else None,
        "workers": recipe.compute.workers,
        "evaluate_workers": values.get("evaluate_workers") or recipe.compute.evaluate_workers,
        "text_sha256": dataset.text_sha256,
        "train_set_tokens": dataset.train_tokens,
        **last.get("origin", {}),
        "code_sha256": codes.pop() if len(codes) == 1 else None,
        "started_at": min((found["started_at"] for found in records), default=None),
        "finished_at": max((found["finished_at"] for found in records), default=None),
    }
    if done:
        known |= claim.read_columns(steps.evaluate.folder, values["artifact_sha256"], standing["evaluate"]["result"])
    return Row(
        record=plan.name,
        recipe=recipe.recipe,
        config_hash=config_hash(recipe),
        seed=seed,
        config=json.dumps(to_dict(recipe)),
        **known,
    )


def filled(standing: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the results of these steps fill, by column."""
    values: dict[str, Any] = {}
    for kind, found in standing.items():
        values |= {column: found["result"].get(name) for name, column in RESULT_COLUMNS[kind].items()}
        if kind in SECONDS_COLUMNS:
            values[SECONDS_COLUMNS[kind]] = found["seconds"]
    return values


def within_limits(recipe: Recipe, values: dict[str, Any], total_bytes: int) -> bool:
    """Say whether bytes, training seconds and evaluation seconds all keep the recipe's limits."""
    return not stages.excesses(recipe.limits, total_bytes, values["train_seconds"], values["evaluate_seconds"])
