"""A study's file, and the records it names: found, read, or refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hedgemix.config import RecipeError
from pipeline.analysis import study
from support import table_rows

VARIANTS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "slow": ({"evaluate.ttt.rate": 0.0001}, [2.3, 2.4]),
    "fast": ({"evaluate.ttt.rate": 0.0003}, []),
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    table_rows.study(tmp_path, [2.4, 2.5], VARIANTS)
    return tmp_path


@pytest.mark.parametrize("run", ["", "_studies/rates", "_studies/rates/study.json"])
def test_a_study_is_named_by_its_file_its_folder_or_the_runs_folder(runs: Path, run: str) -> None:
    found = study.load(str(runs / run))
    assert (found.name, found.recipe, found.folder) == ("rates", "laptop", runs / "_studies" / "rates")
    assert [row["bpb_final"] for row in found.base.record.done] == [2.4, 2.5]
    slow, fast = found.variants
    assert (slow.name, slow.fields, len(slow.record.done)) == ("slow", {"evaluate.ttt.rate": 0.0001}, 2)
    assert fast.record.name == "rates-fast" and fast.record.rows == [] and fast.why_stopped == ""


def test_what_a_rule_said_last_is_read(runs: Path) -> None:
    (runs / "_studies" / "rates" / "stopped.json").write_text(json.dumps({"slow": {"seeds": 2, "why": "p = 0.3"}}))
    slow, fast = study.load(str(runs)).variants
    assert (slow.why_stopped, fast.why_stopped) == ("p = 0.3", "")


def test_a_table_that_is_none_is_a_variant_without_seeds(runs: Path) -> None:
    (runs / "rates-fast.parquet").write_text("cut short")
    assert study.load(str(runs)).variants[1].record.rows == []


def test_of_several_studies_one_has_to_be_named(runs: Path) -> None:
    other = runs / "_studies" / "other"
    other.mkdir()
    (other / "study.json").write_text((runs / "_studies" / "rates" / "study.json").read_text())
    with pytest.raises(RecipeError, match="holds 2 studies: other, rates; give _studies/NAME/study.json"):
        study.load(str(runs))
    assert study.load(str(other)).name == "other"


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("empty", "holds 0 studies"),
        ("_studies/gone/study.json", "is not there"),
        ("s3://bucket/prefix/rates.parquet", "is no study; give s3://bucket/prefix/_studies/NAME/study.json"),
        ("s3://bucket", "is no study"),
    ],
)
def test_what_is_no_study_is_refused(
    runs: Path, run: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=expected):
        study.load(run)


@pytest.mark.parametrize(
    "content",
    [
        "cut sho", "[]", "{}", '{"recipe": "laptop", "base": "b", "variants": [1]}',
        '{"recipe": "laptop", "base": "../../b", "variants": []}',
        '{"recipe": "laptop", "base": "b", "variants": [{"name": "a", "record": "a/b", "fields": {}}]}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_studys_is_refused(runs: Path, content: str) -> None:
    path = runs / "_studies" / "rates" / "study.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"study\.json is no study's file"):
        study.load(str(path))


def test_in_a_store_the_file_is_named_and_its_runs_folder_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HEDGEMIX_SCRATCH", str(tmp_path))
    storage, name = study.find("s3://bucket/some/runs/_studies/rates/study.json?region=eu-west-1")
    assert (storage.uri, name) == ("s3://bucket/some/runs?region=eu-west-1", "rates")
