"""hedgemix compare: every seed, the test, what differs; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from hedgemix.config import RecipeError
from pipeline import cli
from pipeline.analysis import comparison, records, significance
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.storage.store import Storage
from support import table_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    table_rows.write(folder, "tiny", [2.6], table_rows.made_up())
    return folder


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
    p = stats.ttest_rel([2.41, 2.42, 2.45], [2.50, 2.53, 2.52], alternative="less").pvalue
    for expected in (
        "ensemble: 2.4267 bits per byte", "linear: 2.5167 bits per byte", "0.0900 bits per byte", "better than linear",
        f"p = {p:.3f} (paired t, one-sided)", "paired t-test of 3 seeds: both ran them", "0.005 nats",
        "evaluate.mixer.kind: ensemble | linear",
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


def test_seeds_that_both_ran_are_paired_and_the_others_left_out(runs: Path) -> None:
    """The seeds' luck is ten times what the settings bring: Welch's test sees nothing of it."""
    one = table_rows.write(runs, "one", [2.40, 2.50, 2.60, 9.0])
    other = table_rows.write(runs, "other", [2.41, 2.512, 2.611])
    test = comparison.test(one, other, 0.001)
    margin = 0.001 / significance.nats_per_bit(one.done[0])
    told = stats.ttest_1samp([-0.01, -0.012, -0.011], -margin, alternative="less")
    assert (test.name, test.degrees) == ("paired t", 2) and test.p == pytest.approx(told.pvalue) and test.p < 0.01
    assert test.difference == pytest.approx(0.011)
    assert comparison.paired_scores(one, other) == {1: (2.40, 2.41), 2: (2.50, 2.512), 3: (2.60, 2.611)}
    assert comparison.chosen_test(one, other) == (
        "paired t-test of the 3 seeds that both ran; left out for want of a pair: 1 of one, 0 of other"
    )
    assert comparison.test(other, one).difference == pytest.approx(-0.011)


def test_seeds_that_failed_make_no_pair(runs: Path) -> None:
    one, other = table_rows.write(runs, "all", [2.4, 2.5, 2.6]), table_rows.write(runs, "less", [2.5, 2.65, 2.7])
    assert comparison.test(one, other).degrees == 2
    other = table_rows.change(runs, "less", 2, status="failed", bpb_final=None)
    assert comparison.test(one, other).degrees == 1 and "1 of all, 0 of less" in comparison.chosen_test(one, other)


@pytest.mark.parametrize(("shift", "expected"), [(3, "they share none"), (2, "they share one alone")])
def test_seeds_that_are_not_shared_are_tested_by_welch(runs: Path, shift: int, expected: str) -> None:
    one, mine, theirs = table_rows.write(runs, "all", [2.4, 2.5, 2.6]), [2.4, 2.5, 2.6], [2.7, 2.65, 2.8]
    row = records.load(str(runs / "tiny.parquet")).done[0] | {"record": f"shifted-{shift}"}
    write_rows(
        Storage("", runs), [Row(**row | {"seed": n + shift, "bpb_final": x}) for n, x in enumerate(theirs, start=1)]
    )
    other = records.load(str(runs / f"shifted-{shift}.parquet"))
    test = comparison.test(one, other)
    told = stats.ttest_ind(mine, theirs, equal_var=False, alternative="less")
    assert (test.name, test.p, test.degrees) == ("Welch", pytest.approx(told.pvalue), pytest.approx(told.df))
    assert comparison.chosen_test(one, other) == f"Welch's t-test of 3 and 3 seeds: {expected}"


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
