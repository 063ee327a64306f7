"""A study's table: as a parquet file, and in the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.analysis import study, study_table, verdicts
from pipeline.analysis.study import Study
from pipeline.analysis.verdicts import Finding
from support import table_rows

ROOT = Path(__file__).resolve().parents[3]
BASE = [1.2946, 1.2900, 1.2942]
LONG = "orders-1-2-3-4_experts-recency_and-a-name-that-is-too-long-for-a-line"


@pytest.fixture
def read(tmp_path: Path) -> tuple[Study, list[Finding]]:
    """A study with a variant of each kind, and what was found."""
    path = table_rows.study(
        tmp_path,
        BASE,
        {
            "worse": ({"model.xsa": False}, [1.3035, 1.2993, 1.3030]),
            "better": ({"evaluate.ttt.rate": 0.0001}, [1.2926, 1.2881, 1.2921]),
            "none": ({"model.layers": 12}, []),
            LONG: ({"evaluate.mixer.orders": [1, 2]}, [1.29]),
        },
    )
    loaded = study.load(str(path))
    return loaded, verdicts.findings(loaded)


def test_the_parquet_file_holds_what_was_found(read: tuple[Study, list[Finding]]) -> None:
    content = study_table.parquet(*read)
    table = pd.read_parquet(io.BytesIO(content)).set_index("variant")
    assert [*table.index] == ["base", LONG, "better", "worse", "none"]
    better = table.loc["better"]
    [found] = [each for each in read[1] if each.variant.name == "better"]
    assert found.sample
    assert (better.difference_bpb, better.low_bpb, better.high_bpb) == (
        found.sample.mean, found.sample.low, found.sample.high,
    )  # fmt: skip
    assert (better.p, better.p_holm, better.verdict) == (found.p, found.p_holm, "better")
    assert better.bpb_final == pytest.approx(1.2909333) and better.seeds_paired == better.seeds_done == 3
    assert json.loads(better.fields) == {"evaluate.ttt.rate": 0.0001} and better.record == "rates-better"
    assert (better.train_seconds, better.evaluate_seconds, better.total_bytes) == (60.0, 27.0, 1_390_000)
    assert bool(better.holds_row) and not better.holds_record and better.note == verdicts.sentence(found)
    assert table.loc["none"].isna().sum() == 11 and table.loc["none", "verdict"] == "not compared"
    assert pd.isna(table.loc[LONG, "low_bpb"]) and table.loc[LONG, "difference_bpb"] == pytest.approx(-0.0046)
    base = table.loc["base"]
    assert base.bpb_final == pytest.approx(sum(BASE) / 3) and pd.isna(base.verdict) and pd.isna(base.difference_bpb)
    stored = pq.read_table(io.BytesIO(content))
    assert all(field.metadata[b"doc"] for field in stored.schema)
    assert {name: stored[name].null_count for name in ("p", "low_bpb", "bpb_final")} == {
        "p": 3, "low_bpb": 3, "bpb_final": 1
    }  # fmt: skip  # no NaN, which other readers take for a number


def test_the_terminal_shows_it_in_eighty_columns(read: tuple[Study, list[Finding]]) -> None:
    printed = io.StringIO()
    study_table.show(*read, Console(file=printed, width=80, highlight=False))
    told = printed.getvalue()
    [line] = [line for line in told.splitlines() if line.startswith("better ") and "is" not in line]
    assert line.split()[1:4] == ["3", "1.2909", "-0.0020"] and line.split()[-3:] == ["60.0", "27.0", "1,390,000"]
    rows = told[told.index("variant") : told.index(f"{LONG} is")].splitlines()
    assert max(map(len, rows)) <= 80 and "…" not in told and rows[-1].startswith("base")
    for each in read[1]:
        assert verdicts.sentence(each).replace("`", "") in told
    assert told.endswith("none: no table yet\n")


def test_every_column_is_documented_in_the_words_of_the_file() -> None:
    page = (ROOT / "docs" / "reports.md").read_text()
    assert all(f"| `{name}` | {doc} |\n" in page for name, (_, doc) in study_table.COLUMNS.items())
