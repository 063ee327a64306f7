"""A record as its readers take it up: the rows of its table, and the files behind them, from a folder or a store."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hedgemix.config import Recipe, RecipeError, from_dict
from hedgemix.runtime.layout import STEPS
from pipeline.results import schema
from pipeline.results.table import table_names, table_path
from pipeline.storage.store import REMOTE_URI, Storage, as_recipe_error, storage_at


@dataclass(frozen=True)
class Record:
    """Holds a record's rows as dicts of the table's columns; files lie under the table's own folder, wherever that was
    copied to."""

    name: str
    storage: Storage
    rows: list[dict[str, Any]]

    @property
    def done(self) -> list[dict[str, Any]]:
        """Return the rows of the finished seeds."""
        return [row for row in self.rows if row["status"] == "done"]

    @property
    def recipe(self) -> Recipe:
        """Parse the recipe of the first row; all rows of a record have the same."""
        return from_dict(Recipe, json.loads(self.rows[0]["config"]))

    @property
    def table(self) -> str:
        """Return where its parquet file lies."""
        return self.storage.where(table_path(self.storage, self.name))

    @property
    def folder(self) -> Path:
        """Return the folder of what is written about the record."""
        return self.storage.record_folder(self.name)

    def place(self, row: dict[str, Any], column: str) -> Path | None:
        """Find what the row's path names, under the table's folder; None when the row has none."""
        parts = Path(row[column] or "").parts
        return self.storage.root.joinpath(*parts[parts.index(STEPS) :]) if STEPS in parts else None

    def content(self, row: dict[str, Any], column: str, name: str = "") -> bytes | None:
        """Read the file that the row names, or the file called `name` in its folder; None when it is not there."""
        place = self.place(row, column)
        return None if place is None else self.storage.read_bytes(place / name if name else place)

    def lines(self, row: dict[str, Any], column: str, name: str) -> list[dict[str, Any]]:
        """Read a file of JSON lines; empty when it is not there. A line that was cut short is left out."""
        return list(parse_json_lines(self.content(row, column, name) or b""))


def parse_json_lines(content: bytes) -> list[dict[str, Any]]:
    """Parse JSON lines; those that are no JSON are left out."""
    found = []
    for line in content.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def load(run: str) -> Record:
    """Load the record of a parquet file (a path, or an address in a store), or of a folder that holds one record alone.

    Raises RecipeError when there is none.
    """
    storage, table = find(run)
    content = storage.read_bytes(table)
    if content is None:
        raise RecipeError(f"{run} is not there; give the parquet file that the record prints as its table")
    return Record(table.stem, storage, rows(content, run))


def find(run: str) -> tuple[Storage, Path]:
    """Find the table that `run` names: its storage, and its path there. Raises RecipeError when it names no table, or a
    folder of several, or when a store fails."""
    if REMOTE_URI.match(run):
        address, mark, query = run.partition("?")
        above, _, name = address.rpartition("/")
        if not name.endswith(".parquet"):
            raise RecipeError(f"{address} is no table; give s3://bucket/prefix/RECORD.parquet")
        storage = storage_at(above + mark + query)
        with as_recipe_error(storage, "RUN"):
            storage.ready()
            storage.modified(storage.root / name)
        return storage, storage.root / name
    path = Path(run).resolve()
    if path.is_dir():
        tables = sorted(path.glob("[!._]*.parquet"))
        if len(tables) != 1:
            which = f": {', '.join(table.name for table in tables)}" if tables else ""
            raise RecipeError(f"{run} holds {len(tables)} records{which}; give the parquet file of one")
        [path] = tables
    return Storage("", path.parent), path


def rows(content: bytes, run: str) -> list[dict[str, Any]]:
    """Read the rows of a table; what an older hedgemix did not write is None. Raises RecipeError for a file that is no
    record's table or has no rows."""
    try:
        found = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:
        raise RecipeError(f"{run} is no parquet file ({str(error).splitlines()[0]}); give a record's") from None
    lacking = [field.name for field in fields(schema.Row) if field.name not in found.column_names]
    always = [field.name for field in fields(schema.Row) if field.default is MISSING]
    if any(name in always for name in lacking):
        raise RecipeError(f"{run} has no column {lacking[0]}: it is no record's table")
    if not found.num_rows:
        raise RecipeError(f"{run} has no rows")
    return [dict.fromkeys(lacking) | row for row in found.to_pylist()]


def load_all(storage: Storage) -> list[Record]:
    """Load every record of a runs folder, by name; tables that cannot be read left out."""
    found = []
    for name in table_names(storage):
        try:
            content = storage.read_bytes(storage.root / name)
            found.append(Record(Path(name).stem, storage, rows(content or b"", name)))
        except RecipeError:
            continue
    return found
