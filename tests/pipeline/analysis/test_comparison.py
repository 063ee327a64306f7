"""hedgemix compare: every seed, the test, what differs; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from hedgemix.config import RecipeError
from pipeline import cli
from pipeline.analysis import comparison, records
from support import table_rows


@pytest.fixture(scope="module")
def runs(undisturbed: tuple[Path, int, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table_rows.folder(undisturbed[0], tmp_path_factory.mktemp("compare"))


def compare(monkeypatch: pytest.MonkeyPatch, runs: Path, one: str, other: str) -> None:
    monkeypatch.setattr(
        "sys.argv", ["hedgemix", "compare", str(runs / f"{one}.parquet"), str(runs / f"{other}.parquet")]
    )
    monkeypatch.setenv("COLUMNS", "80")
    cli.main()


def test_two_records_are_compared(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(records.load(str(runs / "tiny.parquet")).rows[0]["config"])
    config["evaluate"]["mixer"] |= {"kind": "linear", "orders": [1, 2]}
    table_rows.write(runs, "linear", [2.50, 2.53, 2.52], config=json.dumps(config), config_hash="other")
    table_rows.write(runs, "ensemble", [2.41, 2.42, 2.45], torch_version="2.11.0")
    compare(monkeypatch, runs, "ensemble", "linear")
    told = capsys.readouterr().out
    p = stats.ttest_ind([2.41, 2.42, 2.45], [2.50, 2.53, 2.52], equal_var=False, alternative="less").pvalue
    for expected in (
        "ensemble: 2.4267 bits per byte", "linear: 2.5167 bits per byte", "0.0900 bits per byte", "better than linear",
        f"p = {p:.3f}", "0.005 nats", "evaluate.mixer.kind: ensemble | linear",
        "evaluate.mixer.orders: 1 2 3 4 5 6 7 8 | 1 2",
        "note: different versions of PyTorch: 2.11.0 and",
    ):  # fmt: skip
        assert expected in told
    for score in ("2.4100", "2.4200", "2.4500", "2.5000", "2.5300", "2.5200"):  # every seed
        assert score in told
    tables = [line for line in told.splitlines() if line[:4].strip().isdigit() or "final" in line]
    assert len(tables) == 8 and max(map(len, tables)) <= 80 and "…" not in told  # nothing is cut
    assert "note: both scored the same artifacts, by seed +0.0900, +0.1100, +0.0700 bits per byte" in told
    # The other way round it is worse, and no new record.
    compare(monkeypatch, runs, "linear", "ensemble")
    told = capsys.readouterr().out
    assert "worse than ensemble" in told and "p < 0.25: no" in told


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"valid_sha256": "f" * 64, "text_sha256": "e" * 64}, "different texts"),
        ({"valid_sha256": "f" * 64, "valid_bytes": 7}, "different texts"),
        ({"status": "failed"}, "no finished seed"),
    ],
)
def test_scores_that_mean_different_things_are_not_compared(
    runs: Path, values: dict[str, object], expected: str
) -> None:
    one, other = table_rows.write(runs, "a", [2.4, 2.5]), table_rows.write(runs, "b", [2.4, 2.5], **values)
    with pytest.raises(RecipeError, match=expected):
        comparison.test(one, other)


def test_another_tokenizer_on_the_same_text_may_be_compared(runs: Path) -> None:
    one = table_rows.write(runs, "a", [2.4, 2.5])
    other = table_rows.write(runs, "b", [2.6, 2.7], valid_sha256="f" * 64, tokenizer_sha256="e" * 64)
    assert comparison.test(one, other).difference == pytest.approx(0.2)
    assert "different tokenizers" in " ".join(comparison.notes(one, other))


def test_artifacts_of_their_own_are_not_taken_for_the_same(runs: Path) -> None:
    one, other = table_rows.write(runs, "a", [2.4, 2.5]), table_rows.write(runs, "b", [2.6, 2.5])
    assert comparison.same_artifacts(one, other) == pytest.approx([0.2, 0.0])
    assert comparison.same_artifacts(one, table_rows.change(runs, "b", 2, artifact_sha256="0" * 64)) == []
    assert (
        comparison.same_artifacts(table_rows.write(runs, "a", [2.4, 2.5, 2.6]), table_rows.write(runs, "b", [2.6]))
        == []
    )


def test_a_mixed_record_is_refused_by_the_command(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table_rows.write(runs, "mixed", [2.4, 2.5])
    table_rows.change(runs, "mixed", 2, config_hash="another")
    with pytest.raises(SystemExit) as ended:
        compare(monkeypatch, runs, "mixed", "tiny")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "mixed cannot be averaged" in told and "config_hash" in told
