"""Records made of one real row: other seeds, scores, settings, as their readers would meet them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.analysis import records
from pipeline.analysis.records import Record
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.storage.store import Storage


def folder(undisturbed: Path, place: Path) -> Path:
    """A copy of the record `tiny` of seed 1, without its failed seed."""
    out = Path(shutil.copytree(undisturbed, place / "runs", ignore=shutil.ignore_patterns("step.lock", "figures")))
    row = records.load(str(out / "tiny.parquet")).done[0]
    (out / "tiny.parquet").unlink()
    write(out, "tiny", [row["bpb_final"]], row)
    return out


def write(out: Path, name: str, scores: Sequence[float], row: dict[str, Any] | None = None, **other: Any) -> Record:
    """A record whose seeds 1, 2, ... have these final scores, else the row of `tiny`."""
    row = row or records.load(str(out / "tiny.parquet")).done[0]
    rows = [
        Row(**row | {"record": name, "seed": seed, "bpb_final": score} | other)
        for seed, score in enumerate(scores, start=1)
    ]
    write_rows(Storage("", out), rows)
    return records.load(str(out / f"{name}.parquet"))


def change(out: Path, name: str, seed: int, **values: Any) -> Record:
    """The record with other values in one seed's row."""
    found = records.load(str(out / f"{name}.parquet"))
    [row] = [row for row in found.rows if row["seed"] == seed]
    write_rows(Storage("", out), [Row(**row | values)])
    assert len(pd.read_parquet(out / f"{name}.parquet")) == len(found.rows)
    return records.load(str(out / f"{name}.parquet"))
