"""What somebody changed in a finished record before handing it in is named: the seed, the file, what against what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hedgemix.audit import claim
from hedgemix.runtime.files import read_json, sha256_of, write_json
from pipeline.analysis import records
from pipeline.submission.evidence import contradictions

Spoil = Callable[[Path], Any]


def place(table: Path, seed: int, kind: str) -> Path:
    """The folder of a seed's step in the copy."""
    names = read_json(table.parent / "_records" / "tiny" / "steps.json")["seeds"][str(seed)]
    return table.parent / "_steps" / names[kind]


def change(**columns: Any) -> Spoil:
    return lambda table: claim.write_columns(table, 2, columns)


def in_json(kind: str, name: str, edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A JSON file in a step of the second seed."""

    def spoil(table: Path) -> None:
        path = place(table, 2, kind) / name
        held = read_json(path)
        edit(held)
        write_json(path, held)

    return spoil


def in_lines(kind: str, name: str, edit: Callable[[list[dict[str, Any]]], Any], hide: bool = True) -> Spoil:
    """A file of lines of the second seed; hide: with its sum in result.json."""

    def spoil(table: Path) -> None:
        path = place(table, 2, kind) / name
        held = [json.loads(line) for line in path.read_text().splitlines()]
        edit(held)
        path.write_text("".join(json.dumps(line) + "\n" for line in held))
        entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        if hide:
            in_json(kind, "result.json", lambda found: found["files"].update({name: entry}))(table)

    return spoil


def audit(**fields: Any) -> Spoil:
    return in_json("evaluate", "audit.json", lambda verdict: verdict.update(fields))


def swap(table: Path) -> None:
    one, two = (place(table, seed, "quantize") / "artifact.hmx" for seed in (1, 2))
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)


def swap_in_the_table(table: Path) -> None:
    one, two = pq.read_table(table).to_pylist()
    names = ("artifact_path", "artifact_sha256", "artifact_bytes")
    claim.write_columns(table, 1, {name: two[name] for name in names})
    claim.write_columns(table, 2, {name: one[name] for name in names})


def one_artifact(table: Path) -> None:
    for name in ("artifact.hmx", "result.json"):
        shutil.copy(place(table, 1, "quantize") / name, place(table, 2, "quantize") / name)


def one_path(table: Path) -> None:
    claim.write_columns(table, 2, {"artifact_path": pq.read_table(table).to_pylist()[0]["artifact_path"]})


def audit_of_another_seed(table: Path) -> None:
    for name in ("audit.json", "audit.md"):
        shutil.copy(place(table, 1, "evaluate") / name, place(table, 2, "evaluate") / name)


def drop_seed(table: Path) -> None:
    content = pq.read_table(table)
    pq.write_table(content.filter([seed == 1 for seed in content["seed"].to_pylist()]), table)


def twice(table: Path) -> None:
    pq.write_table(pq.read_table(table).take([0, 1, 1]), table)


def forget_declared(table: Path) -> None:
    (table.parent / "_records" / "tiny" / "steps.json").unlink()


def weak_plan(table: Path) -> None:
    in_json("evaluate", "audit.json", lambda verdict: verdict["plan"].update(streamed_tokens=3, tolerance=0.1))(table)


def failed_check(table: Path) -> None:
    def fail(verdict: dict[str, Any]) -> None:
        next(finding for finding in verdict["findings"] if finding["name"] == "bits")["passed"] = False

    in_json("evaluate", "audit.json", fail)(table)


def test_an_honest_record_contradicts_itself_nowhere(finished: Path, table: Path) -> None:
    assert contradictions(records.load(str(finished))) == []

    assert contradictions(records.load(str(table))) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(bpb_final=1.0), "seed 2: the table says bpb_final 1.0, its steps' result.json and audit.json "),
        (change(bpb_full=1.0), "seed 2: the table says bpb_full 1.0, "),
        (change(train_seconds=1.0), "seed 2: the table says train_seconds 1.0, "),
        (change(audit_tokens=9), "seed 2: the table says audit_tokens 9, "),
        (change(config="{}"), "seed 2: the table says config '{}', "),
        (change(requirements=["torch"]), "seed 2: it names 'torch' as a requirement, not name==version"),
        (swap, "artifact.hmx has "),
        (swap_in_the_table, "seed 2: the table says artifact_path "),
        (one_artifact, "seeds 1, 2 have one artifact, of sha256 "),
        (one_path, "seeds 1, 2 have one artifact, of sha256 "),
        (lambda table: (place(table, 2, "quantize") / "artifact.hmx").unlink(), "artifact.hmx is not there"),
        (lambda table: (place(table, 2, "evaluate") / "trace.jsonl").unlink(), "trace.jsonl is not there"),
        (lambda table: (place(table, 2, "train") / "log.jsonl").unlink(), "log.jsonl is not there"),
        (lambda table: (place(table, 2, "score") / "result.json").unlink(), "/result.json, which recipe and seed name"),
        (lambda table: (place(table, 2, "evaluate") / "audit.json").unlink(), "audit.json is not there"),
        (
            in_lines("evaluate", "trace.jsonl", lambda held: held.append(held[-1])),
            "trace.jsonl has 5 chunks, the text 4",
        ),
        (in_lines("evaluate", "trace.jsonl", lambda held: held[0]["bits"].update(final=1.0)), "its trace adds up to"),
        (
            in_lines("evaluate", "trace.jsonl", lambda held: held[0]["bits"].update(final=1.0), False),
            "trace.jsonl has ",
        ),
        (in_lines("train", "log.jsonl", lambda held: held.pop()), "log.jsonl has not each of "),
        (in_lines("train", "log.jsonl", lambda held: held[1].update(loss_nats=1.0), False), "log.jsonl has "),
        (in_lines("train", "log.jsonl", lambda held: held[-1].update(loss_nats=0.1)), "says train_loss_nats"),
        (audit_of_another_seed, "audit.json says seed 1, it is 2"),
        (audit(artifact_sha256="0" * 64), "audit.json says artifact_sha256 "),
        (audit(config_hash="0"), "audit.json says config_hash '0', it is "),
        (audit(code_sha256="0"), "audit.json says code_sha256 '0', it is "),
        (audit(result={}), "audit.json says result {}, it is "),
        (audit(audited_with={"hedgemix": "0"}), "audit.json says audited_with '0', it is "),
        (audit(tokens=100), "audit.json says tokens 100, it is 4000"),
        (audit(findings=[]), "seed 2: its audit did not pass order"),
        (audit(plan={"windows": "many"}), "audit.json is not there, or is none of this hedgemix"),
        (weak_plan, "seed 2: its audit was weaker: streamed_tokens 3 of 131,072"),
        (weak_plan, "seed 2: its audit was weaker: tolerance 0.1 instead of 1e-06"),
        (failed_check, "seed 2: its audit did not pass bits"),
        (lambda table: (place(table, 2, "evaluate") / "audit.md").write_text("fine"), "says report_sha256"),
        (drop_seed, "seed 2 was declared (steps.json) and the table has no row of it"),
        (twice, "seed 2 has 2 rows in the table"),
        (forget_declared, "it names the seeds that were declared"),
        (lambda table: next(table.parent.glob("_steps/data-*/dataset.json")).unlink(), "has no dataset.json"),
    ],
)
def test_what_was_changed_is_named_in_a_line(table: Path, spoil: Spoil, message: str) -> None:
    spoil(table)
    found = contradictions(records.load(str(table)))
    assert any(message in line for line in found), found
    assert all("\n" not in line for line in found)
