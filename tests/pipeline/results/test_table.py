"""The results table: its schema, its file, and what prints it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import threading
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from hedgemix.config import Recipe, RecipeError, config_hash, to_dict
from hedgemix.recipes import RECIPES
from hedgemix.runtime.layout import LOCK
from pipeline.analysis.console import print_results
from pipeline.results import table as table_module
from pipeline.results.schema import SCHEMA_VERSION, Row, column_docs, markdown, schema
from pipeline.results.table import _version, check_ours, mean_and_deviation, read_rows, renew, write_rows
from pipeline.storage.lease import Times
from pipeline.storage.lock import hold
from pipeline.storage.store import Storage, open_storage
from support.s3_server import StoreServer, store_process, store_server

__all__ = ["store_process", "store_server"]

ROOT = Path(__file__).resolve().parent.parent.parent.parent
DONE = Row(
    record="one",
    recipe="laptop",
    config_hash="h",
    seed=1,
    status="done",
    bpb_final=1.5,
    bpb_full=1.75,
    published_mass=40.0,
    valid_bytes=1000,
    within_limits=True,
    expert_names=["neural", "order1"],
    expert_weights=[0.75, 0.25],
)
FAILED = Row(record="one", recipe="laptop", config_hash="h", seed=2, status="failed", error="train: it broke")


def test_rows_come_back_from_pandas_as_they_were_written(tmp_path: Path) -> None:
    path = write_rows(Storage("", tmp_path), [DONE, FAILED])
    table = pd.read_parquet(path)
    assert table.seed.tolist() == [1, 2] and table.status.tolist() == ["done", "failed"]
    assert table.bpb_final[0] == 1.5 and math.isnan(table.bpb_final[1])
    assert list(table.expert_weights[0]) == [0.75, 0.25]
    assert table.error[1] == "train: it broke"


def test_every_column_is_typed_documented_and_versioned(tmp_path: Path) -> None:
    stored = pq.read_schema(write_rows(Storage("", tmp_path), [FAILED]))
    assert stored.names == [field.name for field in dataclasses.fields(Row)]
    assert stored.metadata[b"hedgemix_schema"] == str(SCHEMA_VERSION).encode()
    docs = column_docs()
    for name in stored.names:
        assert docs[name] and stored.field(name).metadata[b"doc"] == docs[name].encode()
    # A table with nothing but failures has the same types as one without.
    assert stored.equals(pq.read_schema(write_rows(Storage("", tmp_path), [DONE])))


def test_the_document_of_the_table_is_the_schema() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == markdown()


def test_the_runs_folder_reads_as_one_table_whatever_else_is_in_it(tmp_path: Path) -> None:
    events = "_records/one/tensorboard/seed1/train/events.out.tfevents.1.host"
    for name in (
        "_steps/train-1/result.json",
        "_records/one/recipe.json",
        "_records/one/record.lock",
        events,
        "_mlflow.db",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / ".two.parquet.host.1.tmp").write_bytes(b"half a file")
    write_rows(Storage("", tmp_path), [DONE])
    write_rows(Storage("", tmp_path), [dataclasses.replace(DONE, record="two", seed=seed) for seed in (1, 2)])
    assert sorted(pd.read_parquet(tmp_path).record) == ["one", "two", "two"]


def write_old(folder: Path, record: str, version: int = 6) -> Path:
    """A table as version 6 wrote it: attempts for retries, and no columns of the audit."""
    row = dataclasses.asdict(dataclasses.replace(DONE, record=record)) | {"schema_version": version}
    kept = {name: value for name, value in row.items() if not name.startswith("audit") and name != "retries"}
    fields = [field for field in schema() if field.name in kept]
    columns = pa.schema([*fields, pa.field("attempts", pa.int64())], {"hedgemix_schema": str(version)})
    pq.write_table(pa.Table.from_pylist([kept | {"attempts": 6}], columns), folder / f"{record}.parquet")
    return folder / f"{record}.parquet"


def documented(library: str) -> str:
    """What README.md or docs/table.md calls to read a runs folder with a library."""
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "docs/table.md"))
    calls = {
        "pandas": r"pandas\.read_parquet\('runs'\)",
        "polars": r"polars\.read_parquet\(.*?\)",
        "duckdb": r"duckdb\.sql\(.*?\)\.df\(\)",
    }
    [call] = re.findall(calls[library], pages)
    return str(call)


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_a_folder_of_tables_of_mixed_ages_reads_as_one(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    storage = Storage("", tmp_path / "runs")
    write_rows(storage, [dataclasses.replace(DONE, record="new", audited=True)])
    write_old(tmp_path / "runs", "a_first")
    write_old(tmp_path / "runs", "z_last", 7)
    assert renew(storage) == ["a_first", "z_last"] and renew(storage) == []
    found = eval(documented(library), {library: importlib.import_module(library)})
    table = found.to_dict(as_series=False) if library == "polars" else found.to_dict("list")
    assert sorted(table["record"]) == ["a_first", "new", "z_last"] and set(table) == set(schema().names)
    rows = {name: at for at, name in enumerate(table["record"])}
    assert bool(table["audited"][rows["new"]]) and table["retries"][rows["a_first"]] == 2
    assert set(table["schema_version"]) == {SCHEMA_VERSION} and set(table["bpb_final"]) == {1.5}


def test_an_old_table_whose_driver_is_at_work_is_left_to_it(tmp_path: Path) -> None:
    storage, path = Storage("", tmp_path), write_old(tmp_path, "busy")
    before = path.read_bytes()
    with hold(storage, storage.record_folder("busy") / LOCK):
        assert renew(storage) == [] and path.read_bytes() == before
    assert write_rows(storage, [dataclasses.replace(DONE, record="busy", seed=2)]) == path
    assert sorted(pd.read_parquet(path).retries.fillna(-1)) == [-1, 2]


def test_a_file_of_somebody_s_is_no_record_s_table(tmp_path: Path) -> None:
    storage = Storage("", tmp_path)
    check_ours(storage, "none")
    check_ours(storage, write_rows(storage, [DONE]).stem)
    pq.write_table(pa.table({"mine": [1]}), tmp_path / "mine.parquet")
    with pytest.raises(RecipeError, match=r"mine.parquet is no record's table; give this record another --record"):
        check_ours(storage, "mine")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    check_ours(storage, "damaged")  # put aside when rows are written
    assert renew(storage) == []


def test_two_records_may_write_at_once_and_a_rewrite_replaces_only_its_own(tmp_path: Path) -> None:
    def write(record: str) -> None:
        for _ in range(20):
            write_rows(Storage("", tmp_path), [dataclasses.replace(DONE, record=record)])

    write("one")
    threads = [threading.Thread(target=write, args=(record,)) for record in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(pd.read_parquet(tmp_path).record) == ["one", "three", "two"]


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(Storage("", tmp_path), [DONE])

    def broken(table: object, file: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError):
        write_rows(Storage("", tmp_path), [DONE, FAILED])
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.parquet"]
    assert len(pd.read_parquet(path)) == 1


def test_other_seeds_join_the_record_and_the_same_seed_is_replaced(tmp_path: Path) -> None:
    write_rows(Storage("", tmp_path), [DONE, FAILED])
    path = write_rows(
        Storage("", tmp_path), [dataclasses.replace(DONE, seed=3), dataclasses.replace(FAILED, error="again")]
    )
    table = pd.read_parquet(path).set_index("seed")
    assert sorted(table.index) == [1, 2, 3] and table.error[2] == "again" and table.bpb_final[1] == 1.5


def test_a_record_s_other_seeds_get_its_settings_where_no_number_differs_by_them(tmp_path: Path) -> None:
    recipe, storage = RECIPES["laptop"](), Storage("", tmp_path)
    later = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, max_restarts=9))
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=9))

    def row(seed: int, recipe: Recipe) -> Row:
        config = json.dumps(to_dict(recipe))
        return dataclasses.replace(DONE, seed=seed, config_hash=config_hash(recipe), config=config)

    write_rows(storage, [row(1, recipe), row(2, other), dataclasses.replace(DONE, seed=3)])
    table = pd.read_parquet(write_rows(storage, [row(4, later)])).set_index("seed")
    assert table.config[1] == table.config[4] and table.config_hash[1] == table.config_hash[4] == config_hash(later)
    assert table.config_hash[2] == config_hash(other) and table.config_hash[3] == "h"  # not this record's, or unknown


def test_old_tables_of_a_store_are_renewed_too(store_server: StoreServer, tmp_path: Path) -> None:
    here = open_storage(store_server.uri("old"), tmp_path / "here")
    write_rows(here, [dataclasses.replace(DONE, record="new")])
    for name in ("a_first", "busy"):
        here.write_bytes(here.root / f"{name}.parquet", write_old(tmp_path, name).read_bytes())
    here.write_bytes(here.root / "mine.parquet", b"PAR1")
    here.write_bytes(here.root / "_steps/train-1/old.parquet", write_old(tmp_path, "step").read_bytes())
    there = open_storage(store_server.uri("old"), tmp_path / "there")
    quick = partial(hold, times=Times(0.5, 4.0, 0.1))
    with quick(here, here.record_folder("busy") / LOCK), patch.object(table_module, "hold", quick):
        assert renew(there) == ["a_first"] and renew(there) == []
    versions = {name: _version(here.read_bytes(here.root / f"{name}.parquet") or b"") for name in ("a_first", "busy")}
    assert versions == {"a_first": SCHEMA_VERSION, "busy": 6} and _version(b"PAR1") == -1
    [row] = read_rows(here, here.root / "a_first.parquet")
    assert row["retries"] == 2 and row["bpb_final"] == 1.5 and row["schema_version"] == SCHEMA_VERSION


def test_a_store_that_fails_leaves_old_tables_to_the_next_command(tmp_path: Path) -> None:
    storage, path = Storage("", tmp_path), write_old(tmp_path, "one")
    other = write_old(tmp_path, "two")
    read = Storage.read_bytes

    def failing(self: Storage, path: Path) -> bytes | None:
        if path.name == "one.parquet":
            raise OSError("of a store")
        return read(self, path)

    with patch.object(Storage, "read_bytes", failing):
        assert renew(storage) == ["two"]
    assert _version(other.read_bytes()) == SCHEMA_VERSION and _version(path.read_bytes()) == 6


def test_mean_and_sample_deviation() -> None:
    assert mean_and_deviation([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    mean, deviation = mean_and_deviation([3.0])
    assert mean == 3.0 and math.isnan(deviation)


def test_the_printed_table_fits_80_columns_and_shows_every_seed(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    rows = [dataclasses.replace(DONE, seed=seed, steps=1000, total_bytes=15_484_405) for seed in (1337, 42)]
    rows = [dataclasses.replace(row, train_seconds=599.9, evaluate_seconds=561.2) for row in rows]
    print_results([*rows, FAILED], str(tmp_path / "one.parquet"), console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines() if "pandas" not in line and "table:" not in line) <= 80
    for expected in ("1337", "42", "15,484,405", "1.7500", "seed 2 failed: train: it broke", "sum to 40.00", "mean"):
        assert expected in text
    assert "\u2026" not in text  # nothing cut
