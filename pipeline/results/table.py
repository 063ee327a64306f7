"""The results table as files: one parquet file a record. Aggregates are computed when it is read, never stored."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hedgemix.runtime.files import replacing
from pipeline.results.schema import Row, schema
from pipeline.storage.store import Storage


def table_path(storage: Storage, record: str) -> Path:
    """Return where the record's parquet file lies."""
    return storage.root / f"{record}.parquet"


def write_rows(storage: Storage, rows: list[Row]) -> Path:
    """Put these rows into their record's table, in place of its rows of the same seeds; whole or not at all. Records
    are files of their own, so two drivers can write at once. A table that storage damaged is put beside the record's
    other files: its rows come back with the command of their seeds, which finds them done."""
    path = table_path(storage, rows[0].record)
    mine = {row.seed for row in rows}
    kept = [old for old in read_rows(storage, path) if old["seed"] not in mine]
    table = pa.Table.from_pylist(kept + [dataclasses.asdict(row) for row in rows], schema=schema())
    with replacing(path) as file:
        pq.write_table(table, file)
    storage.push(path)
    return path


def read_rows(storage: Storage, path: Path) -> list[dict[str, Any]]:
    """Read the rows of a record's table, none when there is no sound one; a damaged one is copied beside the record's
    files."""
    content = storage.read_bytes(path)
    try:
        return [] if content is None else pq.read_table(pa.BufferReader(content)).to_pylist()
    except (OSError, pa.ArrowInvalid):
        aside = storage.record_folder(path.stem) / "damaged.parquet"
        with replacing(aside) as file:
            file.write(content or b"")
        return []


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Compute mean and sample standard deviation (NaN for no values, and for fewer than two)."""
    mean = sum(values) / len(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
