"""The command `hedgemix audit` on a record that the pipeline made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hedgemix import cli
from hedgemix.audit import sandbox
from hedgemix.data import dataset as datasets
from hedgemix.runtime.files import read_json
from pipeline import record
from pipeline.results.row import build_row
from pipeline.steps import graph
from pipeline.storage.store import Storage
from support import tiny_record

pytestmark = pytest.mark.slow


def run(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["hedgemix", "audit", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


def test_a_record_is_audited_and_its_table_says_so(
    undisturbed: tuple[Path, int, str],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = undisturbed[0]
    monkeypatch.setenv("COLUMNS", "100")
    some = ["--streamed-tokens", "500", "--coded-tokens", "300"]
    weaker = "streamed_tokens 500 of 131,072; coded_tokens 300 of 1,024"
    code, output = run([str(out / "tiny.parquet"), *some], monkeypatch, capsys)
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0].startswith("seed 1: bpb_final ") and "3,999" in output
    assert lines[1].startswith("  drawn with --draw-seed ")
    assert lines[-1].startswith(
        "every check passed: seed 1; not taken for an audit, which looks at more (streamed_tokens 500 of 131,072"
    )
    checks = [line for line in lines if line.startswith("  ") and line.endswith(" s")]
    assert len(checks) == 11 and all(len(line) <= 100 and "pass" in line for line in checks)
    audited = pd.read_parquet(out / "tiny.parquet").set_index("seed")
    assert pd.isna(audited.audited[1]) and weaker == audited.audit_plan[1]
    assert audited.audit_tokens[1] == 4000 and pd.isna(audited.audit_plan[2])
    assert (Path(audited.evaluate_path[1]) / "audit.md").read_text().startswith("# Audit of tiny, seed 1")
    findings = {found["name"]: found for found in read_json(Path(audited.evaluate_path[1]) / "audit.json")["findings"]}
    assert len(findings["self-contained"]["figures"]["files_opened"]) == 2  # the artifact, and a shard

    # The same record command again writes the row anew, with what was found.
    options = tiny_record.arguments(text, out, "--seeds", "1", "2", "--record", "tiny")
    recipe, _ = record.parse(["laptop", *options])
    data = graph.data_step(Storage("", out), recipe.data)
    plan = graph.plan_record("tiny", recipe, datasets.load(data.folder), data, (1, 2))
    row = build_row(plan, 1, plan.seeds[1].records(), None, None)
    assert (
        row.audited is None
        and row.audit_plan == audited.audit_plan[1]
        and row.audit_failed == []
        and row.audit_coded_bits == audited.audit_coded_bits[1]
    )
    assert row.evaluate_path == audited.evaluate_path[1] and row.dataset_path == audited.dataset_path[1]

    # About another number than the score: told beside it, whatever is found. Here no work begins.
    def dies(*given: Any, **named: Any) -> sandbox.Outcome:
        raise sandbox.WorkError("it broke")

    monkeypatch.setattr(sandbox, "run", dies)
    code, output = run([str(out / "tiny.parquet"), "--claim", "published"], monkeypatch, capsys)
    again = pd.read_parquet(out / "tiny.parquet").set_index("seed")
    assert code == 1 and "seed 1: bpb_published" in output and "it broke" in output
    assert again.audit_tokens[1] == 4000 and again.audit_failed[1].tolist() == []
    assert (Path(audited.evaluate_path[1]) / "audit_published.json").exists()
