"""Which field of a stage's result fills which column of a seed's row."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from hedgemix.evaluate.evaluator import EvaluateResult
from hedgemix.stages import QuantizeResult, ScoreResult, TrainStageResult
from pipeline.results.row import RESULT_COLUMNS, SECONDS_COLUMNS, filled
from pipeline.results.schema import Row

KINDS = {"train": TrainStageResult, "score": ScoreResult, "quantize": QuantizeResult, "evaluate": EvaluateResult}
NO_COLUMN = {"nats", "tries", "scored_tokens", "scored_bytes"}
"""Fields that the row tells otherwise, or not."""
OF_THE_STEP = {"code_bytes", "evaluate_workers"}
"""What a task adds to the stage's result."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_result_has_its_column_or_is_left_out_on_purpose(kind: str) -> None:
    fields = {field.name for field in dataclasses.fields(KINDS[kind])}
    assert set(RESULT_COLUMNS[kind]) - OF_THE_STEP == fields - NO_COLUMN


def test_every_column_is_the_table_s_and_comes_from_one_stage() -> None:
    columns = Counter(column for fields in RESULT_COLUMNS.values() for column in fields.values())
    columns.update(SECONDS_COLUMNS.values())
    assert set(columns.values()) == {1} and set(columns) <= {field.name for field in dataclasses.fields(Row)}


def test_results_fill_the_columns_of_their_own_stage_alone() -> None:
    """A field that is named like another stage's column, and one that no column takes, fill nothing."""
    standing: dict[str, dict[str, Any]] = {
        "train": {"seconds": 9.0, "result": {"tokens": 7, "train_seconds": 8.0, "bpb_full": 1.0, "order": "x"}},
        "score": {"seconds": 2.0, "result": {"bpb_full": 1.5, "tokens": 3}},
    }
    found = filled(standing)
    assert (found["train_tokens"], found["train_seconds"], found["bpb_full"]) == (7, 8.0, 1.5)
    assert found["score_seconds"] == 2.0 and not {"tokens", "order", "quantize_seconds", "theta"} & set(found)


def test_what_an_older_result_lacks_is_empty() -> None:
    found = filled({"quantize": {"seconds": 1.0, "result": {"artifact_bytes": 5}}})
    assert found["artifact_bytes"] == 5 and found["theta"] is None and found["quantize_seconds"] == 1.0
