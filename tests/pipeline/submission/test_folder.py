"""A submission holds what ran, repeats it, and is refused otherwise, with nothing written."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hedgemix.audit import claim
from hedgemix.config import RecipeError, to_dict
from hedgemix.runtime.files import read_json
from hedgemix.standalone import main as standalone
from hedgemix.standalone import script
from pipeline import cli
from pipeline.submission.eligibility import About
from pipeline.submission.folder import submit
from support import tiny_seed
from support.s3_server import BUCKET, StoreServer, store_process, store_server

__all__ = ["store_process", "store_server"]

ABOUT = About("A. Author", "author", "Mixed", "Two sentences. About it.", "non-record", "2026-11-23")
FILES = ["README.md", "requirements.txt", "submission.json", "train_gpt.py", "train_seed1.log", "train_seed2.log"]


@pytest.fixture(scope="module")
def submitted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("submitted") / "out"
    submit(str(finished), out, ABOUT)
    return out


def rows(table: Path) -> list[dict[str, Any]]:
    return pq.read_table(table).to_pylist()


def test_the_folder_says_what_the_table_does(finished: Path, submitted: Path) -> None:
    assert sorted(path.name for path in submitted.iterdir()) == FILES
    told, found = read_json(submitted / "submission.json"), rows(finished)
    scores = [row["bpb_final"] for row in found]
    assert told["val_bpb"] == pytest.approx(statistics.mean(scores), rel=1e-12)
    assert told["val_bpb_std"] == pytest.approx(statistics.stdev(scores), rel=1e-9)
    assert told["val_loss"] == pytest.approx(statistics.mean(row["nats_per_token"] for row in found), rel=1e-12)
    assert told["seeds"] == [1, 2] and told["seed_results"]["2"]["val_bpb"] == scores[1]
    size = (submitted / "train_gpt.py").stat().st_size
    assert told["bytes_code"] == size == found[0]["code_bytes"]
    assert told["bytes_total"] == max(row["total_bytes"] for row in found)
    assert told["author"] == "A. Author" and told["github_id"] == "author" and told["track"] == "non-record"
    facts = told["compliance"]
    assert all(isinstance(so, bool) for so in facts.values())
    assert facts["train_under_limit"] and facts["audit_passed"] and facts["score_first"]
    assert facts["audit_covers_all_tokens"] and not facts["three_seeds"]
    text = (submitted / "README.md").read_text()
    assert f"| 1 | {scores[0]:.6f} | " in text and "{" not in text and "three seeds: no" in text
    needed = (submitted / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in needed] == ["numpy", "pyppmd", "sentencepiece", "torch", "zstandard"]
    assert "torch==2." in "".join(needed) and "+" not in "".join(needed)


def test_its_file_repeats_its_log(finished: Path, submitted: Path, tmp_path: Path) -> None:
    """The file itself is run by tests/hedgemix/standalone/test_script.py; here the same code reads the log."""
    log, row = submitted / "train_seed2.log", rows(finished)[1]
    told, fractions = standalone.replayed(log)
    assert told["seed"] == 2 and len(fractions) == row["steps"] and told["recipe"] == json.loads(row["config"])
    recipe = json.loads(row["config"])
    code = (submitted / "train_gpt.py").stat().st_size
    assert standalone.main(recipe, {}, code, ["--replay", str(log), "--out", str(tmp_path / "again")]) == 0
    assert tiny_seed.same(
        read_json(tmp_path / "again" / "result.json"),
        {name: row[name] for name in ("bpb_full", "bpb_mixed", "bpb_ttt", "bpb_final", "bpb_published")}
        | {name: row[name] for name in ("nats_per_token", "train_loss_nats", "steps", "artifact_sha256")}
        | {"nats": read_json(tmp_path / "again" / "score" / "result.json")["nats"]}
        | {name: row[name] for name in ("artifact_bytes", "theta", "expert_weights", "ensemble_weights")},
    )
    last = log.read_text().splitlines()[-1]
    assert last == f"seed:2 val_loss:{row['nats_per_token']!r} val_bpb:{row['bpb_final']!r}"


def test_the_command(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(*options: str) -> None:
        words = ["hedgemix", "submit", str(table), str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", [*words, "--author", "A", "--github-id", "a", "--name", "N", "--blurb", "B"])
        cli.main()

    run()
    assert "of 2 seeds" in (printed := capsys.readouterr().out) and "not so: " in printed and "three seeds" in printed
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2 and "is there and not empty" in capsys.readouterr().err


def test_a_record_in_a_store_gives_the_same_folder(
    finished: Path, submitted: Path, tmp_path: Path, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEDGEMIX_SCRATCH", str(tmp_path / "scratch"))
    filesystem = store_server.filesystem()
    for path in finished.parent.rglob("*"):
        if path.is_file():
            with filesystem.open_output_stream(f"{BUCKET}/runs/{path.relative_to(finished.parent)}") as file:
                file.write(path.read_bytes())
    address, mark, query = store_server.uri().partition("?")
    submit(f"{address}/{finished.name}{mark}{query}", tmp_path / "out", ABOUT)
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (submitted / name).read_bytes()


def change(**columns: Any) -> Callable[[Path], None]:
    """Set columns of the second seed's row."""
    return lambda table: claim.write_columns(table, 2, columns)


def cut_log(table: Path) -> None:
    [path] = [path for path in table.parent.glob("_steps/train-*/log.jsonl") if '"step": 1,' in path.read_text()][:1]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def cut_trace(table: Path) -> None:
    path = next(table.parent.glob("_steps/evaluate-*/trace.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def other_recipe(table: Path) -> None:
    recipe = json.loads(rows(table)[0]["config"])
    recipe["model"]["logit_cap"] = 31.0
    claim.write_columns(table, 2, {"config": json.dumps(recipe), "config_hash": "0" * 12})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change(status="failed"), "seed 2 is failed; run the record's command again"),
        (change(status="pending"), "seed 2 is pending"),
        (change(audited=None, audit_plan=None), "not audited: seed 2; run hedgemix audit "),
        (change(audited=None, audit_plan="cuts 1 of 2"), "seed 2 was not audited in full \\(cuts 1 of 2\\)"),
        (change(audit_plan=None), "seed 2 was not audited in full \\(by an older hedgemix\\)"),
        (change(audited=False, audit_failed=["bits"]), "seed 2 failed its audit \\(bits\\)"),
        (change(artifact_bytes=16_000_000), "seed 2: 16,1.* bytes, the recipe allows 1,400,000"),
        (change(train_seconds=601.0), "seed 2: 601.0 training seconds, the recipe allows 600"),
        (change(evaluate_seconds=601.0), "seed 2: 601.0 evaluation seconds"),
        (change(code_sha256="0" * 64), "seed 2 ran other code than hedgemix"),
        (change(code_sha256=None), "seed 2 ran other code than hedgemix"),
        (change(hedgemix_version="0.0.9"), "seed 2 ran other code than hedgemix"),
        (change(code_bytes=50_000), "seed 2 was evaluated for a record with other settings.* 50,000 bytes"),
        (change(requirements=["torch==1.0"]), "seed 2 ran with other packages"),
        (change(requirements=None), "seed 2 ran with other packages"),
        (change(hardware="CPU riscv64, 1 threads"), "hardware"),
        (change(valid_sha256="0" * 64), "scored texts"),
        (other_recipe, "configurations"),
        (cut_log, "its log.jsonl has not each of"),
        (cut_trace, "its trace.jsonl has not all 3,999 tokens"),
    ],
)
def test_what_does_not_hold_is_refused(table: Path, tmp_path: Path, spoil: Callable[[Path], None], reason: str) -> None:
    spoil(table)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RecipeError, match=reason):
        submit(str(table), tmp_path / "out", ABOUT)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("field", ["author", "github_id", "name", "blurb", "track", "date"])
def test_what_submission_json_has_to_say_is_asked_for(finished: Path, tmp_path: Path, field: str) -> None:
    with pytest.raises(RecipeError, match=f"--{field.replace('_', '-')} is empty"):
        submit(str(finished), tmp_path / "out", replace(ABOUT, **{field: " "}))
    with pytest.raises(RecipeError, match="--date 'today' is no date"):
        submit(str(finished), tmp_path / "out", replace(ABOUT, date="today"))


def test_whole_or_not_at_all(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()

    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_text", full)
        submit(str(finished), tmp_path / "out", ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())
    submit(str(finished), tmp_path / "out", ABOUT)
    assert len(list((tmp_path / "out").iterdir())) == len(FILES)
    with pytest.raises(RecipeError, match="is there and not empty"):
        submit(str(finished), tmp_path / "out", ABOUT)


def test_the_file_is_of_the_recipe_and_not_of_the_machine(finished: Path, submitted: Path) -> None:
    recipe = tiny_seed.recipe_of(rows(finished)[0])
    assert (submitted / "train_gpt.py").read_bytes() == script.build(recipe)
    assert to_dict(recipe)["compute"]["cpus_per_worker"] == 1
