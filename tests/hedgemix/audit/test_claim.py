"""The claim of a run: found from its table alone, also after a move, and refused in one line when it cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hedgemix import cli
from hedgemix.audit import claim
from hedgemix.config import RecipeError
from pipeline.analysis import records
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.storage.store import Storage
from support.tiny_run import Record


def test_a_moved_folder_is_found_beside_its_table(record: Record, made: Record) -> None:
    here, there = record.claim(), made.claim()
    assert here.artifact.is_relative_to(record.folder) and there.artifact.is_relative_to(made.folder)
    assert here.dataset == there.dataset or here.dataset.valid_shards != there.dataset.valid_shards
    assert here.score == there.score == here.row["bpb_final"] and len(here.trace) > 3
    assert (
        here.path(".md").name == "audit.md" and record.claim("published").path(".json").name == "audit_published.json"
    )


def test_only_finished_rows_are_claims_and_a_seed_is_asked_for(record: Record) -> None:
    assert (
        [found.seed for found in claim.claims(record.table)]
        == [7]
        == [found.seed for found in claim.claims(record.table, (7,))]
    )
    with pytest.raises(RecipeError, match="no finished row of seed 8; finished are 7"):
        claim.claims(record.table, (8,))


def damage_table(record: Record) -> None:
    record.table.write_bytes(b"not a table")


def older_table(record: Record) -> None:
    table = pq.read_table(record.table)
    pq.write_table(table.drop_columns(["evaluate_path", "audited"]), record.table)


def without_plan(record: Record) -> None:
    """As the table of an older hedgemix is."""
    pq.write_table(pq.read_table(record.table).drop_columns(["audit_plan"]), record.table)


def unfinished(record: Record) -> None:
    write_rows(
        Storage("", record.folder), [Row(record="tiny", recipe="tiny", config_hash="0", seed=7, status="failed")]
    )


def other_artifact(record: Record) -> None:
    record.change(artifact_sha256="0" * 64)


def altered_artifact(record: Record) -> None:
    path = record.claim().artifact
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def no_score(record: Record) -> None:
    path = record.evaluation() / "result.json"
    path.write_text(json.dumps({"result": {"bpb_final": None}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_table, "is no parquet file"),
        (lambda record: record.table.unlink(), "is no file"),
        (older_table, "no column evaluate_path.*run its record command again"),
        (unfinished, "no finished row"),
        (other_artifact, "is not the artifact of the row"),
        (altered_artifact, "altered: its checksum"),
        (lambda record: record.claim().artifact.unlink(), "artifact_path .* is not there nor at"),
        (lambda record: shutil.rmtree(record.evaluation()), "evaluate_path .* is not there nor at"),
        (lambda record: (record.evaluation() / "trace.jsonl").write_text("{"), "no sound trace.jsonl"),
        (lambda record: (record.evaluation() / "trace.jsonl").write_text(""), "reports no bpb_final and no chunks"),
        (no_score, "reports no bpb_final"),
        (lambda record: next(record.folder.glob("_steps/data-0/train*1.bin")).unlink(), "shard .* is not there"),
    ],
)
def test_what_cannot_be_audited_is_told_in_one_line_with_exit_code_2(
    record: Record,
    spoil: Callable[[Record], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(record)
    with pytest.raises(RecipeError, match=message):
        claim.claims(record.table)
    monkeypatch.setattr(sys, "argv", ["hedgemix", "audit", str(record.table)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give the parquet file of a record, or --scorer and --tokens"),
        (["TABLE", "--scorer", "math:sqrt"], "give the parquet file of a record, or --scorer"),
        (["TABLE", "--tokens", "x.npy"], "--whole-text and --report go with --scorer"),
        (["TABLE", "--whole-text"], "--whole-text and --report go with --scorer"),
        (["--scorer", "math:sqrt"], "--scorer needs --tokens"),
    ],
)
def test_a_command_line_that_says_too_little_or_too_much_is_refused(
    options: list[str],
    message: str,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(record.table) if option == "TABLE" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["hedgemix", "audit", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_table_without_the_column_of_the_plan_is_read_and_gets_it_once_audited(record: Record) -> None:
    without_plan(record)
    assert record.claim().row["audit_plan"] is None
    assert [row["audit_plan"] for row in records.load(str(record.table)).rows] == [None, None]
    record.change(audited=True, audit_plan="full")
    assert record.claim().row["audit_plan"] == "full"
    assert pq.read_table(record.table).column_names.count("audit_plan") == 1


def test_writing_columns_keeps_everything_else(record: Record) -> None:
    before = pq.read_table(record.table)
    claim.write_columns(record.table, 7, {"audited": True, "audit_failed": [], "audit_coded_bits": 5})
    after = pq.read_table(record.table)
    assert after.schema.equals(before.schema, check_metadata=True)
    mine, other = after.to_pylist()
    assert mine["audited"] and mine["audit_failed"] == [] and mine["audit_coded_bits"] == 5
    assert other == before.to_pylist()[1]
    changed = {"audited", "audit_failed", "audit_coded_bits"}
    assert {name: mine[name] for name in mine if name not in changed} == {
        name: value for name, value in before.to_pylist()[0].items() if name not in changed
    }
    assert isinstance(after, pa.Table) and set(claim.AUDITED) <= set(after.column_names)
