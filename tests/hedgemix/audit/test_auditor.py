"""The audit passes what is sound, and each of its checks catches the violation planted for it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hedgemix.audit import auditor, claim, own_code, sandbox
from hedgemix.audit.auditor import Audit, Work
from hedgemix.audit.findings import Finding, failed
from hedgemix.audit.plan import Plan
from hedgemix.config import EvaluateConfig, RecipeError
from hedgemix.experts import feature_experts
from hedgemix.experts.registry import EXPERTS
from hedgemix.runtime.files import read_json, sha256_of, write_json
from pipeline.submission.evidence import AUDITED
from support import cheats
from support.text_data import documents
from support.tiny_artifact import ADAPTIVE, CACHE_OVER_TRAINED, CONFIG
from support.tiny_run import Record, make

FULL = Plan(seed=5, unforeseen=True)
"""As an audit draws one; the seed is known so that a failure is repeated."""
PLAN = replace(FULL, draws=12)
WORK = Work(
    witness="support.cheats:testify",
    rank="support.cheats:score_rank",
    coder="support.cheats:compress",
    decoder="support.cheats:decompress",
)
SHORT = replace(PLAN, first_tokens=640, cuts=1)
"""Two chunks, of which the second is scored after something was learned."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of other processes done in this one, through JSON all the same; but for ranks, which are several."""
    elsewhere = sandbox.run

    def run(work: str, arguments: Any, readable: Any, log: Any = lambda record: None) -> sandbox.Outcome:
        if "rank" in arguments:
            return elsewhere(work, arguments, readable)
        module, _, name = work.partition(":")
        function = getattr(importlib.import_module(module), name)
        value = function(**json.loads(json.dumps(arguments)), log=lambda told: log(json.loads(json.dumps(told))))
        return sandbox.Outcome(value, sandbox.Confined(), 0.0)

    monkeypatch.setattr(sandbox, "run", run)


def repeated(record: Record, plan: Plan = SHORT, name: str = "final", done_by: Work = WORK) -> Audit:
    work = auditor.start(record.claim(name), plan, lambda found: None, done_by)
    auditor.repeat(work, 640)
    return work


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {found.name: found for found in findings}


@pytest.mark.usefixtures("here")
def test_a_sound_run_passes_every_check_and_the_findings_are_kept(record: Record) -> None:
    told: list[Finding] = []
    findings = auditor.run(record.claim(), FULL, told.append, done_by=WORK)
    assert [found.headline for found in findings if not found.passed] == [] and told == findings
    assert {found.name for found in findings} == set(AUDITED)
    found = named(findings)
    assert 0 < found["normalised"].figures["largest_log_sum"] < 2e-6
    assert found["normalised"].figures["rows"] >= 12
    assert (
        found["order"].figures["tokens"]
        == len(record.claim().trace) * 320 - 1 - 320 + record.claim().trace[-1]["tokens"]
    )
    assert found["order"].figures["chunks_learned"] == len(record.claim().trace) - 1
    assert "bitwise equal" in found["bits"].headline
    assert max(found["blind-to-target"].figures["chunks_learned_before"]) >= 1
    assert found["blind-to-future"].figures["charges_compared"] > 300
    assert 0 < found["world-size"].figures["largest_relative_difference"] < 1e-6
    assert all(found.seconds >= 0 and found.statement.endswith(".") for found in findings)

    row = pd.read_parquet(record.table).set_index("seed").loc[7]
    assert row.audited and row.audit_plan == "full" and list(row.audit_failed) == [] and 0 < row.audit_log_sum < 2e-6
    assert row.audit_published_log_sum > 0.01 and row.audit_tokens == record.claim().dataset.valid_tokens
    assert abs(row.audit_coded_bits - row.audit_reported_bits) < 64
    report = (record.evaluation() / "audit.md").read_text()
    assert "**Every check passed.**" in report and found["world-size"].statement in report
    assert pd.read_parquet(record.table).set_index("seed").loc[8].audited is None

    verdict = read_json(record.evaluation() / "audit.json")
    assert (verdict["seed"], verdict["plan"]["seed"], verdict["config_hash"]) == (7, 5, row.config_hash)
    assert verdict["artifact_bytes"] == row.artifact_bytes and verdict["code_sha256"] == row.code_sha256
    assert verdict["report_sha256"] == sha256_of(record.evaluation() / "audit.md")
    assert verdict["audited_with"] == own_code.digests() and verdict["audited_with"]["all"] in report

    result, sha256 = record.claim().result, record.claim().row["artifact_sha256"]
    kept = claim.read_columns(record.evaluation(), sha256, result)
    assert kept["audited"] is True and set(kept) == set(claim.AUDITED)
    assert claim.read_columns(record.evaluation(), "0" * 64, result) == {}
    assert claim.read_columns(record.evaluation(), sha256, {**result, "bpb_final": 1.0}) == {}
    assert claim.read_columns(record.folder, sha256, result) == {}


@pytest.mark.usefixtures("here")
def test_further_experts_pass_every_check_of_a_repeated_run(tmp_path: Path) -> None:
    config = replace(CONFIG, mixer=replace(CONFIG.mixer, experts=tuple(EXPERTS)))
    work = repeated(make(tmp_path / "runs", config))
    auditor.ranks_agree(work)
    assert work.findings and failed(work.findings) == []
    assert set(EXPERTS) < set(work.parts["replay"][0]["result"]["expert_names"])


def test_a_memory_passes_every_check_isolated(tmp_path: Path) -> None:
    """In processes that open the artifact and the text alone: what decompresses the memory is library code."""
    made = make(tmp_path / "runs", remembered=[text[:2000] for text in documents()[100:110]])
    findings = auditor.run(made.claim(), SHORT, lambda found: None, done_by=WORK)
    assert failed(findings) == []
    assert named(findings)["unseen"].figures["memory_tokens"] > 1000
    assert "in the artifact's memory of " in named(findings)["unseen"].statement


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("config", [ADAPTIVE, CACHE_OVER_TRAINED])
def test_experts_over_features_pass_every_check_and_a_cache_that_remembers_itself_does_not(
    tmp_path: Path, config: EvaluateConfig
) -> None:
    made = make(tmp_path / "runs", config)
    work = repeated(made)
    auditor.ranks_agree(work)
    assert work.findings and failed(work.findings) == []
    assert set(feature_experts.names(config)) < set(work.parts["replay"][0]["result"]["expert_names"])
    with cheats.remembers_itself():
        assert set(failed(repeated(made).findings)) == {"blind-to-target", "bits"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (cheats.unnormalised, {"normalised", "bits"}),
        (cheats.knows_target, {"blind-to-target", "bits"}),
        (cheats.knows_future, {"blind-to-future", "blind-to-target", "bits"}),
        (cheats.counted_early, {"blind-to-target", "bits"}),
        (cheats.scored_twice, {"order", "blind-to-target", "blind-to-future", "bits"}),
        (cheats.learned_first, {"order", "blind-to-target", "blind-to-future", "bits"}),
        (cheats.moved_unseen, {"order", "bits"}),
    ],
)
def test_a_cheating_evaluation_is_caught(
    record: Record, plant: Callable[[], AbstractContextManager[None]], caught: set[str]
) -> None:
    """`bits` fails too, since the claim was made without the fault; what it is, the other check says."""
    with plant():
        work = repeated(record)
    assert set(failed(work.findings)) == caught
    assert all(
        found.statement.startswith("Violated") for found in work.findings if found.name in caught - {"normalised"}
    )


@pytest.mark.usefixtures("here")
def test_a_fault_that_made_the_claim_too_is_caught_without_the_bits(record: Record) -> None:
    with cheats.knows_target():
        cheated = repeated(record, replace(PLAN, cuts=1)).parts["replay"][0]
    write_json(record.evaluation() / "result.json", {"key": "0", "result": cheated["result"]})
    lines = [json.dumps(line) for line in cheated["lines"]]
    (record.evaluation() / "trace.jsonl").write_text("\n".join(lines) + "\n")
    record.change(bpb_final=cheated["result"]["bpb_final"])
    with cheats.knows_target():
        assert failed(repeated(record, replace(PLAN, cuts=1)).findings) == ["blind-to-target"]


@pytest.mark.usefixtures("here")
def test_the_published_rule_is_no_score(record: Record) -> None:
    work = repeated(record, name="published")
    assert failed(work.findings) == ["normalised"]
    figures = named(work.findings)["normalised"].figures
    assert figures["largest_log_sum"] == figures["published_largest_log_sum"] > 0.01
    assert figures["largest_nats_between_row_and_charge"] < 1e-6


def test_an_evaluation_that_reads_another_file_is_caught_and_the_rest_still_told(record: Record) -> None:
    work = repeated(record, done_by=replace(WORK, witness="support.cheats:reading_witness"))
    assert failed(work.findings) == ["self-contained"] and len(work.findings) == 6
    assert f"opening {cheats.SECRET}" in named(work.findings)["self-contained"].headline


@pytest.mark.usefixtures("here")
def test_ranks_with_different_weights_are_caught(record: Record) -> None:
    work = repeated(record, done_by=replace(WORK, rank="support.cheats:differing_rank"))
    auditor.ranks_agree(work)
    assert failed(work.findings) == ["world-size"]
    violations = named(work.findings)["world-size"].figures["violations"]
    assert any("different weights" in line for line in violations)


def lower_result(record: Record) -> None:
    path = record.evaluation() / "result.json"
    value = read_json(path)
    value["result"]["bpb_final"] *= 0.99
    write_json(path, value)
    record.change(bpb_final=value["result"]["bpb_final"])


def lower_trace(record: Record) -> None:
    """Trace, result and table agree, and are too low."""
    path = record.evaluation() / "trace.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["bits"]["final"] *= 0.99
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lower_result(record)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spoil", "caught"),
    [
        (lower_result, ["bits"]),
        (lower_trace, ["bits", "coded"]),
        (lambda record: record.change(bpb_final=1.0), ["bits"]),
    ],
)
def test_a_reported_score_below_what_is_coded_is_caught(
    record: Record, spoil: Callable[[Record], None], caught: list[str]
) -> None:
    spoil(record)
    work = repeated(record)
    work.find(auditor.really_coded(work, 640))
    assert failed(work.findings) == caught


@pytest.mark.usefixtures("here")
def test_the_first_tokens_are_whole_chunks_and_follow_the_whole_texts_schedule(record: Record) -> None:
    work = repeated(record, replace(SHORT, first_tokens=350))
    assert work.source.tokens == 640 and failed(work.findings) == []
    assert "2 chunks bitwise equal" in named(work.findings)["bits"].headline


@pytest.mark.usefixtures("here")
def test_work_that_fails_is_a_failure_of_what_it_was_for(record: Record) -> None:
    def dies(*given: Any) -> sandbox.Outcome:
        raise sandbox.WorkError("it broke")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "run", dies)
        findings = auditor.run(record.claim(), PLAN, done_by=WORK)
    assert [found.name for found in findings if found.passed] == ["limits", "unseen", "seconds"]
    assert named(findings)["bits"].headline == "it broke"
    assert not pd.read_parquet(record.table).set_index("seed").loc[7].audited


def test_what_is_drawn_covers_the_text(record: Record) -> None:
    work = auditor.start(record.claim(), PLAN, lambda found: None)
    stop = work.source.tokens
    positions = auditor.draw_positions(work.spans, work, 12)
    assert positions[0] == 1 and positions[-1] == stop - 1 and 12 <= len(positions) <= 14
    assert any(t < stop / 3 for t in positions[1:]) and any(2 * stop / 3 < t for t in positions[:-1])
    for seed in range(20):
        first, last = auditor.draw_cuts(work.spans, 2, seed)
        assert 1 <= first <= stop / 2 <= last <= stop - 2 and last >= work.spans[1].start
        assert auditor.draw_cuts(work.spans[:1], 1, seed)[0] <= work.spans[0].stop - 2


@pytest.mark.parametrize("field", ["draws", "cuts", "coded_tokens", "first_tokens"])
def test_a_plan_that_cannot_be_carried_out_is_refused(record: Record, field: str) -> None:
    with pytest.raises(RecipeError, match="must be positive"):
        auditor.start(record.claim(), replace(PLAN, **{field: -1}), lambda found: None)
