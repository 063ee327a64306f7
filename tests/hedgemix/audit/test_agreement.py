"""All that a record says of a seed is held against the replay and its files: what was edited is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hedgemix.audit.agreement import NOT_REPLAYED, check_agreement, unpinned
from hedgemix.audit.claim import Claim
from hedgemix.audit.findings import Finding
from hedgemix.audit.seconds import check_seconds
from hedgemix.config import config_hash
from hedgemix.runtime.files import write_json
from support.tiny_run import Record

Spoil = Callable[[Claim], Claim]
PARTS = {"train-0": "trained", "quantize-0": "quantized", "evaluate-0": "result"}


@pytest.fixture(scope="module")
def honest(made: Record) -> Claim:
    return made.claim()


def held(honest: Claim, claim: Claim, tokens: int | None = None) -> Finding:
    """The claim against what a replay of the honest one finds: to the bit what its evaluation found."""
    found = {name: value for name, value in honest.result.items() if name not in NOT_REPLAYED}
    replay = {"result": found, "artifact_sha256": honest.row["artifact_sha256"]}
    return check_agreement(claim, replay, tokens or claim.dataset.valid_tokens, 1e-6)


def column(**values: Any) -> Spoil:
    return lambda claim: replace(claim, row=claim.row | values)


def result(step: str, **values: Any) -> Spoil:
    """Fields of a step's result.json, and of the row where it has them."""

    def spoil(claim: Claim) -> Claim:
        name = PARTS[step]
        row = claim.row | {column: value for column, value in values.items() if column in claim.row}
        return replace(claim, row=row, **{name: getattr(claim, name) | values})

    return spoil


def lines(name: str, change: Callable[[list[dict[str, Any]]], Any]) -> Spoil:
    def spoil(claim: Claim) -> Claim:
        copied = copy.deepcopy(getattr(claim, name))
        change(copied)
        return replace(claim, **{name: copied})

    return spoil


trace = partial(lines, "trace")
log = partial(lines, "log")


def test_an_honest_record_agrees(honest: Claim) -> None:
    assert (found := held(honest, honest)).passed, found.statement
    assert (found := check_seconds(honest)).passed and "cannot be proved" in found.statement, found.statement
    assert (found := held(honest, honest, 640)).passed and "only a part was replayed" in found.statement


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (trace(lambda held: held.append(held[-1] | {"chunk": len(held)})), "trace.jsonl has 6 chunks, the text 5"),
        (trace(lambda held: held.pop()), "trace.jsonl has 4 chunks, the text 5"),
        (trace(lambda held: held[2].update(chunk=7)), "line 3 of trace.jsonl is chunk 7 of 320 tokens"),
        (trace(lambda held: held.reverse()), "line 1 of trace.jsonl is chunk 4"),
        (trace(lambda held: held[1].update(tokens=319)), "should be chunk 1 of 320"),
        (trace(lambda held: held[1]["bits"].pop("hedge")), "line 2 of trace.jsonl has bits of final"),
        (trace(lambda held: held[1]["bits"].update(mixed=1.0)), "result.json says bpb_mixed"),
        (trace(lambda held: held[1].update(bytes=9)), "result.json says scored_bytes"),
        (trace(lambda held: held[-1]["weights"].update(hedge=[1.0])), "result.json says expert_weights"),
        (result("evaluate-0", bpb_quantized=1.0), "result.json says bpb_quantized 1.0, its trace adds up to"),
        (result("evaluate-0", nats_per_token=1.0), "result.json says nats_per_token 1.0"),
        (result("evaluate-0", published_mass=1.0), "result.json says published_mass 1.0, the replay"),
        (result("evaluate-0", scored_tokens=5), "result.json says scored_tokens 5, the trace"),
        (result("evaluate-0", ensemble_names=["neural"]), "result.json says ensemble_names"),
        (result("evaluate-0", bpb_better=0.1), "result.json has bpb_better, the replay not"),
        (column(bpb_quantized=1.0), "the row says bpb_quantized 1.0, result.json"),
        (column(nats_per_token=1.0), "the row says nats_per_token 1.0, result.json"),
        (column(steps=5000), "the row says steps 5000, result.json 4"),
        (column(valid_tokens=10), "the row says valid_tokens 10, it is "),
        (column(config_hash="0" * 12), "the row says config_hash '000000000000', it is "),
        (column(artifact_bytes=5), "the row says artifact_bytes 5, result.json"),
        (result("quantize-0", artifact_bytes=5), "the row says artifact_bytes 5, it is "),
        (column(total_bytes=5), "the row says total_bytes 5, it is "),
        (result("evaluate-0", code_bytes=5), "the row says code_bytes 5, it is "),
        (column(code_sha256="0" * 64), "the row says code_sha256 "),
        (column(requirements=["torch"]), "the row says requirements ['torch'], it is "),
        (column(requirements=None), "the row says requirements None, it is "),
    ],
)
def test_what_was_edited_is_named(honest: Claim, spoil: Spoil, message: str) -> None:
    found = held(honest, spoil(honest))
    assert not found.passed and found.statement.startswith("Violated")
    assert any(message in line for line in found.figures["violations"]), found.figures


def test_another_seeds_artifact_another_file_and_another_recipe_are_named(honest: Claim, tmp_path: Path) -> None:
    claim = replace(honest, seed=9, row=honest.row | {"seed": 9})
    assert "the artifact says it is of seed 7, the row 9" in held(honest, claim).figures["violations"]
    (tmp_path / "artifact.hmx").write_bytes(honest.artifact.read_bytes() + b"more")
    told = held(honest, replace(honest, artifact=tmp_path / "artifact.hmx")).figures["violations"]
    assert any(line.startswith("the row says artifact_sha256 ") for line in told) and len(told) == 3
    replay = {"result": honest.result, "artifact_sha256": "0" * 64}
    found = check_agreement(honest, replay, 640, 1e-6)
    assert not found.passed and "the replay read an artifact of sha256 000" in found.headline
    other = replace(honest.recipe, compute=replace(honest.recipe.compute, evaluate_workers=2))
    assert config_hash(other) != honest.row["config_hash"]
    assert "the row says config_hash" in held(honest, replace(honest, recipe=other)).headline


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (log(lambda held: held.pop()), "log.jsonl has not each of 4 steps once, in order: 3 lines, the last of step 3"),
        (log(lambda held: held[1].update(step=7)), "log.jsonl has not each of 4 steps"),
        (
            log(lambda held: held[2].update(elapsed_seconds=0.1)),
            "elapsed_seconds goes back, or is no number, at step 3",
        ),
        (log(lambda held: held[2].update(fraction=0.0)), "fraction goes back, or is no number, at step 3"),
        (log(lambda held: held[3].update(elapsed_seconds=0.9)), "the last step began after 0.9 s, the loop ended"),
        (log(lambda held: held[3].update(loss_nats=1.0)), "result.json says train_loss_nats 2.0, log.jsonl 1.0"),
        (log(lambda held: held[0].update(tokens=1)), "step 1 ends at token 1, not 512"),
        (log(lambda held: held[0].pop("fraction")), "seconds of log cannot be read"),
        (result("train-0", train_seconds=0.5), "train_seconds 0.5 are not loop_seconds 0.8"),
        (result("train-0", train_seconds=0.3, loop_seconds=0.1), "ms_per_step 200.0 for 4 steps is not loop_seconds"),
        (result("train-0", calibrate_seconds=-0.2, train_seconds=0.6), "seconds below 0"),
        (result("evaluate-0", evaluate_seconds=1e-6), "evaluate_seconds 1e-06 are fewer than"),
        (result("evaluate-0", mixing_seconds=900.0), "says mixing_seconds 900.0, the trace's chunks add up to"),
        (trace(lambda held: held[0]["seconds"].update(ttt=-5.0)), "line 1 has ttt seconds below 0"),
    ],
)
def test_seconds_that_contradict_each_other_are_named(honest: Claim, spoil: Spoil, message: str) -> None:
    found = check_seconds(spoil(honest))
    assert not found.passed and any(message in line for line in found.figures["violations"]), found.figures


@pytest.mark.parametrize("seconds", [700.0, 0.0, None])
def test_a_clock_that_tells_another_time_is_named(honest: Claim, tmp_path: Path, seconds: float | None) -> None:
    if seconds is not None:
        write_json(tmp_path / "clock.json", {"elapsed_seconds": seconds})
    said = f"clock.json {seconds}" if seconds is not None else "clock.json is not there"
    for place in ("training", "evaluation"):
        found = check_seconds(replace(honest, **{place: tmp_path}))
        assert not found.passed and said in found.headline


def test_a_training_by_the_clock_keeps_its_budget(honest: Claim) -> None:
    def under(budget_seconds: float) -> Finding:
        train = replace(honest.recipe.train, steps=0, budget_seconds=budget_seconds, reserve_seconds=0.1)
        return check_seconds(replace(honest, recipe=replace(honest.recipe, train=train)))

    assert under(0.9).passed
    assert "a step began after 0.6" in under(0.5).headline
    assert "loop_seconds 0.8 are fewer than the 1.9" in under(2.0).headline


@pytest.mark.parametrize(
    "line",
    ["torch", "torch>=2", "torch==2.*", "torch==2 --hash=x", "-r more.txt", "torch @ https://x", "torch==2;a", ""],
)
def test_only_pinned_packages_are_requirements(line: str) -> None:
    assert unpinned(["torch==2.13.0", "ruamel.yaml==0.18", "torch==2.13.0rc1", line]) == [line]
