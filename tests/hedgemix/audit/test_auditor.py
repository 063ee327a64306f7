"""The audit passes what is sound, and each of its checks catches the violation planted for it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pandas as pd
import pytest

from hedgemix.audit import auditor, claim, limits, own_code, sandbox, streamed
from hedgemix.audit.auditor import Audit, Work
from hedgemix.audit.findings import Finding, failed
from hedgemix.audit.plan import Plan, weaker
from hedgemix.audit.streamed import Committed
from hedgemix.config import EvaluateConfig, RecipeError
from hedgemix.evaluate.scoring_order import Piece, chunks
from hedgemix.experts import feature_experts
from hedgemix.experts.registry import EXPERTS
from hedgemix.runtime.files import read_json, sha256_of, write_json
from pipeline.submission.evidence import AUDITED
from support import cheats
from support.sound_audit import ELSEWHERE, SHORT_TOKENS, WORK, Sound, run_here
from support.text_data import documents
from support.tiny_artifact import ADAPTIVE, CACHE_OVER_TRAINED, CONFIG
from support.tiny_run import Record, make

FULL = Plan(seed=5, unforeseen=True)
"""As an audit draws one; the seed is known so that a failure is repeated."""
PLAN = replace(FULL, coded_tokens=640)
SHORT = replace(PLAN, first_tokens=SHORT_TOKENS)
"""Two chunks, of which the second is scored after something was learned."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "run", run_here)


@pytest.fixture(scope="module")
def sound(made: Record, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    record, told = made.moved(tmp_path_factory.mktemp("sound") / "runs"), list[Finding]()
    commit, committed = streamed.commit, list[Committed]()

    def keeping(*given: Any) -> Any:
        found = commit(*given)
        committed.append(found[0])
        return found

    with patch.object(sandbox, "run", run_here), patch.object(streamed, "commit", keeping):
        findings = auditor.run(record.claim(), FULL, told.append, done_by=WORK)
    return Sound(record, findings, told, committed[0].nats_N)


def repeated(
    record: Record, plan: Plan = SHORT, name: str = "final", done_by: Work = WORK, rows: Sound | None = None
) -> Audit:
    """rows: whose committed rows are taken, where no fault is planted in what commits them."""
    work = auditor.start(record.claim(name), plan, lambda found: None, done_by)
    with patch.object(streamed, "commit", rows.commit if rows else streamed.commit):
        proof = auditor.prove(work)
    auditor.repeat(work, 640)
    work.find(proof())
    return work


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {found.name: found for found in findings}


def test_a_sound_run_passes_every_check_and_the_findings_are_kept(sound: Sound) -> None:
    record, findings = sound.record, sound.findings
    assert [found.headline for found in findings if not found.passed] == [] and sound.told == findings
    assert {found.name for found in findings} == set(AUDITED)
    found = named(findings)
    assert 0 < found["streamed"].figures["largest_sum_off_1"] < 2e-6
    assert found["streamed"].figures["share_proved"] == 1 and not found["streamed"].figures["missed_with_probability"]
    assert 0 < found["streamed"].figures["largest_difference_nats"] < 1e-4
    assert (
        found["order"].figures["tokens"]
        == len(record.claim().trace) * 320 - 1 - 320 + record.claim().trace[-1]["tokens"]
    )
    assert found["order"].figures["chunks_learned"] == len(record.claim().trace) - 1
    assert "bitwise equal" in found["bits"].headline
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


def test_a_memory_passes_every_check_isolated(tmp_path: Path) -> None:
    """In processes that open the artifact and the text alone: what decompresses the memory is library code."""
    made = make(tmp_path / "runs", remembered=[text[:2000] for text in documents()[100:110]], texts=3)
    work = repeated(made, replace(PLAN, first_tokens=320))
    work.find(limits.unseen(work.claim, 1000, 0))
    assert len(work.findings) == 5
    assert failed(work.findings) == ["self-contained"], "the tests' own modules are of no package"
    refused = named(work.findings)["self-contained"].figures["refused"]
    assert all(each.startswith("unknown code") and "/tests/support/" in each for each in refused), refused
    assert named(work.findings)["unseen"].figures["memory_tokens"] > 1000
    assert "in the artifact's memory of " in named(work.findings)["unseen"].statement


@pytest.mark.usefixtures("here")
def test_a_cache_over_trained_weights_passes_every_check_and_one_that_remembers_itself_does_not(tmp_path: Path) -> None:
    made = make(tmp_path / "runs", CACHE_OVER_TRAINED, texts=3)
    work = repeated(made)
    assert work.findings and failed(work.findings) == []
    assert set(feature_experts.names(CACHE_OVER_TRAINED)) < set(work.replay["result"]["expert_names"])
    with cheats.remembers_itself():
        spoiled = repeated(made, replace(SHORT, first_tokens=320))
        assert set(failed(spoiled.findings)) == {"streamed", "bits"}


IN_BOTH = cheats.unnormalised, cheats.heavy_at_few
"""Faults of the predictor too, which has to commit rows with them; the others are the evaluation's alone."""


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (cheats.unnormalised, {"streamed", "bits"}),
        (cheats.heavy_at_few, {"order", "streamed"}),
        (cheats.knows_target, {"streamed", "bits"}),
        (cheats.knows_future, {"streamed", "bits"}),
        (cheats.knows_one_in_33, {"streamed", "bits"}),
        (cheats.knows_the_last_chunk, {"streamed", "bits"}),
        (cheats.counted_early, {"streamed", "bits"}),
        (cheats.hard_tokens_uncharged, {"streamed", "bits"}),
        (cheats.better_of_two, {"streamed", "bits"}),
        (cheats.scored_twice, {"order", "streamed", "bits"}),
        (cheats.learned_first, {"order", "streamed", "bits"}),
        (cheats.moved_unseen, {"order", "streamed", "bits"}),
    ],
)
def test_a_cheating_evaluation_is_caught(
    record: Record, sound: Sound, plant: Callable[[], AbstractContextManager[None]], caught: set[str]
) -> None:
    """`bits` fails too, since the claim was made without the fault; what it is, the other check says."""
    rows = None if plant in IN_BOTH else sound
    with plant():
        work = repeated(record, PLAN if plant is cheats.knows_the_last_chunk else SHORT, rows=rows)
        if rows:  # not rightly, if the fault were in these too
            begun = streamed.commit(WORK.predictor, work.source, [Piece(1, 40)], [], 512, lambda _: None)[0]
            assert np.array_equal(begun.nats_N[1:40], rows.nats_N[1:40])
    assert set(failed(work.findings)) == caught
    assert all(found.statement.startswith("Violated") for found in work.findings if found.name in caught)


@pytest.mark.usefixtures("here")
def test_a_fault_that_made_the_claim_too_is_caught_without_the_bits(record: Record, sound: Sound) -> None:
    with cheats.knows_one_in_33():
        cheated = repeated(record, PLAN, rows=sound).replay
    assert cheated is not None
    write_json(record.evaluation() / "result.json", {"key": "0", "result": cheated["result"]})
    lines = [json.dumps(line) for line in cheated["lines"]]
    (record.evaluation() / "trace.jsonl").write_text("\n".join(lines) + "\n")
    record.change(bpb_final=cheated["result"]["bpb_final"])
    with cheats.knows_one_in_33():
        assert failed(repeated(record).findings) == ["streamed"]


@pytest.mark.usefixtures("here")
def test_who_memorised_the_draws_of_a_seed_is_caught_by_another_and_passes_nothing_by_it(
    record: Record, sound: Sound
) -> None:
    plan = replace(SHORT, streamed_tokens=200, unforeseen=False)
    work = auditor.start(record.claim(), plan, lambda found: None, WORK)
    known = streamed.draw(work.spans, work.claim.recipe.evaluate, 200, 5)[0]
    with cheats.honest_where(known), patch.object(sandbox, "run", run_here):
        seen = repeated(record, plan, rows=sound)
        other = replace(seen, plan=replace(plan, seed=6), findings=[])
        with patch.object(streamed, "commit", sound.commit):
            other.find(auditor.prove(other)())
    assert failed(seen.findings) == ["bits"] and "draws of a known seed, 5" in weaker(plan, SHORT_TOKENS)
    assert failed(other.findings) == ["streamed"]
    assert known != streamed.draw(work.spans, work.claim.recipe.evaluate, 200, 6)[0]


def test_a_decoder_that_has_the_text_from_elsewhere_is_caught(record: Record, sound: Sound) -> None:
    decoder = "support.sandbox_work:decode_from_the_text"

    def run(work: str, *given: Any, **more: Any) -> sandbox.Outcome:
        return (ELSEWHERE if work == decoder else sound.run)(work, *given, **more)

    with patch.object(sandbox, "run", run):
        work = repeated(record, done_by=replace(WORK, decoder=decoder), rows=sound)
        sha256 = hashlib.sha256(work.source.read().astype("<u2").tobytes()).hexdigest()
        work.claim.artifact.with_name("the-text").write_text(sha256)
        found = auditor.really_coded(work, SHORT_TOKENS)
    assert not found.passed and "isolated: opening" in found.headline


@pytest.mark.usefixtures("here")
def test_the_published_rule_is_no_score(record: Record, sound: Sound) -> None:
    work = repeated(record, name="published", rows=sound)
    assert failed(work.findings) == ["streamed"]
    figures = named(work.findings)["streamed"].figures
    assert figures["positions_charged_otherwise"] > 600 and figures["largest_sum_off_1"] < 2e-6


def isolated(record: Record, **works: str) -> Audit:
    return repeated(record, replace(PLAN, first_tokens=320), done_by=replace(WORK, **works))


def test_who_kept_the_text_in_its_process_has_none_where_rows_are_committed(record: Record) -> None:
    work = isolated(
        record, witness="support.cheats:remembering_witness", predictor="support.cheats:remembering_predictor"
    )
    assert failed(work.findings) == ["bits", "self-contained", "streamed"]
    assert named(work.findings)["streamed"].figures["positions_charged_otherwise"] > 250


def test_no_token_is_to_be_had_before_its_row_is_committed(record: Record) -> None:
    work = auditor.start(record.claim(), replace(PLAN, first_tokens=60, streamed_tokens=100), lambda found: None, WORK)
    stretches, *_ = streamed.draw(work.spans, work.claim.recipe.evaluate, 100, 0)
    spent = "support.cheats:impatient_predictor"
    committed, outcome, _ = streamed.commit(spent, work.source, stretches, [work.claim.artifact], 512, lambda _: None)
    assert outcome.value == {"ready": 0, "asked": int((~np.isnan(committed.nats_N)).sum())}
    assert outcome.confined.opened == [str(work.claim.artifact)]


def test_an_evaluation_that_reads_another_file_is_caught_and_the_rest_still_told(record: Record, sound: Sound) -> None:
    work = repeated(record, done_by=replace(WORK, witness="support.cheats:reading_witness"), rows=sound)
    assert failed(work.findings) == ["self-contained"] and len(work.findings) == 4
    assert f"opening {cheats.SECRET}" in named(work.findings)["self-contained"].headline


@pytest.mark.usefixtures("here")
def test_ranks_with_different_weights_are_caught(record: Record, sound: Sound) -> None:
    with patch.object(sandbox, "run", sound.run):
        work = repeated(record, done_by=replace(WORK, rank="support.cheats:differing_rank"), rows=sound)
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
    record: Record, sound: Sound, spoil: Callable[[Record], None], caught: list[str]
) -> None:
    spoil(record)
    with patch.object(sandbox, "run", sound.run):
        work = repeated(record, rows=sound)
        work.find(auditor.really_coded(work, 640))
    assert failed(work.findings) == caught


@pytest.mark.usefixtures("here")
def test_the_first_tokens_are_whole_chunks_and_follow_the_whole_texts_schedule(record: Record, sound: Sound) -> None:
    work = repeated(record, replace(SHORT, first_tokens=350), rows=sound)
    assert work.source.tokens == 640 and failed(work.findings) == []
    assert "2 chunks bitwise equal" in named(work.findings)["bits"].headline


@pytest.mark.usefixtures("here")
def test_work_that_fails_is_a_failure_of_what_it_was_for(record: Record) -> None:
    def dies(*given: Any, **named: Any) -> sandbox.Outcome:
        raise sandbox.WorkError("it broke")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "run", dies)
        findings = auditor.run(record.claim(), PLAN, done_by=WORK)
    assert [found.name for found in findings if found.passed] == ["limits", "unseen", "bytes", "seconds"]
    assert named(findings)["bits"].headline == "it broke"
    assert not pd.read_parquet(record.table).set_index("seed").loc[7].audited


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("seed", "config"), list(enumerate([CONFIG, CACHE_OVER_TRAINED, replace(ADAPTIVE, order="sliding")]))
)
def test_of_a_long_text_what_is_drawn_is_proved(tmp_path: Path, seed: int, config: EvaluateConfig) -> None:
    """Behind what was told of the text between two stretches: trained weights, experts, counts and mixing weights. With
    further experts every check of a repeated run passes."""
    config = replace(config, mixer=replace(config.mixer, experts=tuple(EXPERTS)))
    made = make(tmp_path / "runs", config, texts=3)
    plan = replace(PLAN, streamed_tokens=288, seed=seed)
    commit, kept = streamed.commit, list[Any]()

    def keeping(*given: Any) -> Any:
        kept.append(commit(*given))
        return kept[-1]

    with patch.object(streamed, "commit", keeping):
        work = repeated(made, plan)
    assert work.findings and failed(work.findings) == [], [each.headline for each in work.findings]
    assert work.replay and set(EXPERTS) < set(work.replay["result"]["expert_names"])
    found = named(work.findings)["streamed"]
    assert 0.1 < found.figures["share_proved"] < 0.6
    assert 0 < found.figures["missed_with_probability"]["10% of the text"] < 1
    told = Mock(commit=lambda *given: kept[0])  # the fault is none of what commits rows
    with cheats.knows_the_last_chunk():
        assert not named(repeated(made, plan, rows=told).findings)["streamed"].passed


def test_what_is_drawn_has_first_and_last_and_others_drawn_anew() -> None:
    config = EvaluateConfig(segment_tokens=100, chunk_tokens=1000)
    spans, seen = chunks(5001, 1000), set()
    for seed in range(40):
        stretches, between, count = streamed.draw(spans, config, 1000, seed)
        assert stretches[0].start == 1 and stretches[-1].stop == 5001 and (between, count) == (49, 8)
        assert all(a.stop < b.start for a, b in itertools.pairwise(stretches))
        places = {at // 100 for each in stretches for at in range(each.start, each.stop)}
        assert len(places) == 10
        seen |= places
    assert seen == set(range(51))
    assert streamed.draw(spans, config, 5000, 0) == ([Piece(1, 5001)], 49, 49)
    assert streamed.draw(chunks(50, 1000), config, 10, 0)[0] == [Piece(1, 50)]


def test_what_a_leak_can_hide_is_what_drawing_says() -> None:
    assert streamed.missed(0.1, 20, 3) == pytest.approx(18 / 20 * 17 / 19 * 16 / 18)
    assert streamed.missed(0.01, 20, 20) == 0 and streamed.missed(0.5, 4, 3) == 0
    random = np.random.default_rng(0)
    hidden = np.mean([not (random.choice(20, 3, replace=False) < 2).any() for _ in range(4000)])
    assert hidden == pytest.approx(streamed.missed(0.1, 20, 3), abs=0.03)


@pytest.mark.parametrize("field", ["streamed_tokens", "coded_tokens", "first_tokens"])
def test_a_plan_that_cannot_be_carried_out_is_refused(record: Record, field: str) -> None:
    with pytest.raises(RecipeError, match="must be positive"):
        auditor.start(record.claim(), replace(PLAN, **{field: -1}), lambda found: None)
