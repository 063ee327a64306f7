"""Only a full plan's pass counts, and nobody knows before an audit what it will draw."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pyarrow.parquet as pq
import pytest

from hedgemix.audit import auditor, plan, streamed
from hedgemix.audit.findings import Finding
from hedgemix.audit.plan import Plan, from_json, told, weaker
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.runtime.files import read_json
from pipeline.submission.evidence import AUDITED
from support.tiny_run import Record

WEAKER: list[tuple[dict[str, Any], str]] = [
    ({"first_tokens": 640}, "first_tokens 640 of 50,000"),
    ({"streamed_tokens": 49_999}, "streamed_tokens 49,999 of 131,072"),
    ({"coded_tokens": 100}, "coded_tokens 100 of 1,024"),
    ({"windows": 10}, "windows 10 of 1,000"),
    ({"tolerance": 1e-5}, "tolerance 1e-05 instead of 1e-06"),
    ({"tolerance": float("nan")}, "tolerance nan instead of 1e-06"),
    ({"seed": 3}, "draws of a known seed, 3"),
]


@pytest.mark.parametrize(("fields", "said"), WEAKER)
def test_a_plan_that_looks_at_less_is_weaker(fields: dict[str, Any], said: str) -> None:
    assert weaker(Plan(**fields).drawn(), 50_000) == [said]


def test_a_plan_that_looks_at_no_less_is_full() -> None:
    more = Plan(streamed_tokens=10**6, coded_tokens=10**6, windows=5000, tolerance=0.0, first_tokens=50_000)
    for each in (Plan(), more):
        assert told(each.drawn(), 50_000) == plan.FULL
    assert told(Plan(streamed_tokens=4000, coded_tokens=1024).drawn(), 4000) == plan.FULL  # all there is
    assert weaker(Plan(), 50_000) == ["draws of a known seed, None"]  # nothing was drawn


def test_every_audit_draws_anew_and_a_given_seed_draws_the_same(record: Record) -> None:
    def draws(asked: Plan) -> list[Piece]:
        work = auditor.start(record.claim(), replace(asked, streamed_tokens=1200), lambda finding: None)
        return streamed.draw(work.spans, work.claim.recipe.evaluate, 1200, auditor.drawn_seed(work))[0]

    assert len({Plan().drawn().seed for _ in range(20)}) == 20
    assert draws(Plan()) != draws(Plan())
    assert draws(Plan(seed=3)) == draws(Plan(seed=3)) != draws(Plan(seed=4))
    assert not Plan(seed=3).drawn().unforeseen and Plan().drawn().unforeseen


@pytest.mark.parametrize(
    ("fields", "fails", "audited", "said"),
    [
        ({}, False, True, "full"),
        ({}, True, False, "full"),
        ({"streamed_tokens": 300}, False, None, "streamed_tokens 300 of 131,072"),
        ({"tolerance": 1.0}, False, None, "tolerance 1 instead of 1e-06"),
        ({"seed": 3}, False, None, "draws of a known seed, 3"),
        ({"streamed_tokens": 300}, True, False, "streamed_tokens 300 of 131,072"),
    ],
)
def test_the_table_tells_the_plan_and_a_weaker_one_never_sets_audited(
    record: Record, fields: dict[str, Any], fails: bool, audited: bool | None, said: str
) -> None:
    work = auditor.start(record.claim(), Plan(**fields), lambda finding: None)
    work.findings = [Finding(name, not (fails and name == "bits"), "", f"{name}.") for name in AUDITED]
    auditor.write(work)
    row = pq.read_table(record.table).to_pylist()[0]
    assert (row["audited"], row["audit_plan"], row["audit_failed"]) == (audited, said, ["bits"] * fails)
    kept = read_json(record.evaluation() / "audit.json")
    assert from_json(kept["plan"]) == work.plan and isinstance(kept["plan"]["seed"], int)
    assert f"- plan: {said}" in (record.evaluation() / "audit.md").read_text()


def test_what_is_no_plan_is_refused() -> None:
    drawn = Plan().drawn()
    assert from_json(asdict(drawn)) == drawn
    for wrong in (
        {"windows": "many"},
        {"windows": 64.0},
        {"draws": 64},
        {"other": 1},
        {"seed": None},
        {"unforeseen": 1},
    ):
        with pytest.raises(TypeError):
            from_json(asdict(drawn) | wrong)
    assert from_json(asdict(replace(drawn, tolerance=0)))
