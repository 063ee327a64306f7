"""The results table as files: one parquet file a record. Aggregates are computed when it is read, never stored."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hedgemix.config import RecipeError
from hedgemix.runtime.files import replacing
from hedgemix.runtime.layout import LOCK
from pipeline.results.schema import SCHEMA_VERSION, Row, schema
from pipeline.results.settings import MOVE_NO_NUMBER, differences
from pipeline.storage.lease import Held
from pipeline.storage.lock import hold
from pipeline.storage.store import Storage

READERS = 8
"""Tables read at once: a store takes a moment for each."""
SEED_STEPS = ("train", "score", "quantize", "evaluate")


def table_path(storage: Storage, record: str) -> Path:
    """Return where the record's parquet file lies."""
    return storage.root / f"{record}.parquet"


def write_rows(storage: Storage, rows: list[Row], held: Held | None = None) -> Path:
    """Put these rows into their record's table, in place of its rows of the same seeds; whole or not at all. Records
    are files of their own, so two drivers can write at once. A table that storage damaged is put beside the record's
    other files: its rows come back with the command of their seeds, which finds them done. Rows of other seeds get the
    configuration of these where it differs in what moves no number: a record has one. held: the record's lock; raises
    LostLockError when it is another's."""
    path = table_path(storage, rows[0].record)
    mine = {row.seed for row in rows}
    kept = [renamed(old, rows[0]) for old in read_rows(storage, path) if old["seed"] not in mine]
    _write(held or Held(storage), path, kept + [dataclasses.asdict(row) for row in rows])
    return path


def renamed(old: dict[str, Any], row: Row) -> dict[str, Any]:
    """Return the row of another seed under this one's configuration, if no number differs by it."""
    if not row.config or not old["config"]:
        return old
    changed = differences(json.loads(old["config"]), json.loads(row.config))
    if not changed or changed.keys() - MOVE_NO_NUMBER:
        return old
    return old | {"config": row.config, "config_hash": row.config_hash}


def _write(held: Held, path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as file:
        pq.write_table(pa.Table.from_pylist([_renewed(row) for row in rows], schema=schema()), file)
    held.publish(path)


def check_ours(storage: Storage, record: str) -> None:
    """Raise RecipeError when a sound file lies where the record's table goes and is no table of a record."""
    path = table_path(storage, record)
    content = storage.read_bytes(path)
    if content is not None and _version(content) == 0:
        raise RecipeError(
            f"{storage.where(path)} is no record's table; give this record another --record, or move that file away"
        )


def renew(storage: Storage) -> list[str]:
    """Rewrite the tables of other records that an older version wrote, in the columns of this one, and return their
    names: who reads a folder of tables as one takes the columns of the first. Those whose driver is at work are left to
    it, and those that cannot be read or written now to the next command."""
    paths = [storage.root / name for name in table_names(storage)]
    with ThreadPoolExecutor(READERS) as pool:
        contents = pool.map(partial(_readable, storage), paths)
        old = [path for path, content in zip(paths, contents, strict=True) if 0 < _version(content) < SCHEMA_VERSION]
    renewed = []
    for path in old:
        with suppress(RecipeError, OSError), hold(storage, storage.record_folder(path.stem) / LOCK) as held:
            if 0 < _version(_readable(storage, path)) < SCHEMA_VERSION:  # its driver may have ended meanwhile
                _write(held, path, read_rows(storage, path))
                renewed.append(path.stem)
    return renewed


def table_names(storage: Storage) -> list[str]:
    """List the parquet files of a runs folder, sorted; some may be none of ours."""
    names = storage.names(storage.root, recursive=False)
    return sorted(name for name in names if name.endswith(".parquet") and not name.startswith((".", "_")))


def _readable(storage: Storage, path: Path) -> bytes:
    try:
        return storage.read_bytes(path) or b""
    except OSError:
        return b""


def _version(content: bytes) -> int:
    """The schema version of a table, 0 of another parquet file, -1 of what is none."""
    try:
        metadata = pq.read_schema(pa.BufferReader(content)).metadata or {}
    except (OSError, pa.ArrowException):
        return -1
    return int(metadata.get(b"hedgemix_schema", 0))


def _renewed(row: dict[str, Any]) -> dict[str, Any]:
    """The row in the columns of this version; before 7, `attempts` counted the first start of each step too."""
    attempts = row.get("attempts")
    counted = {"retries": attempts - len(SEED_STEPS)} if attempts is not None and row["status"] == "done" else {}
    return counted | row | {"schema_version": SCHEMA_VERSION}


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
