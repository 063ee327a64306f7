"""The plan's arithmetic: every rate moves its own stages, and no other."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hedgemix import recipes
from hedgemix.standalone import script
from pipeline.forecast import artifact_bytes, gpu_plan

PAGE = Path(__file__).resolve().parent.parent.parent.parent / "docs" / "training.md"


def test_the_plan_follows_its_rates() -> None:
    recipe, rates, counts = (
        recipes.record(),
        gpu_plan.Rates(measured=("coding",)),
        gpu_plan.Launches(100.0, 300.0, 50.0, 20.0, 600.0),
    )
    stages = {stage.name: stage for stage in gpu_plan.plan(recipe, rates, counts)}
    rule, experts = "published rule and sums", "experts over features"
    slower = {stage.name: stage for stage in gpu_plan.plan(recipe, replace(rates, launch_seconds=1e-5), counts)}
    pieces = gpu_plan.VALID_TOKENS / recipe.evaluate.segment_tokens
    assert stages["mixing"].launches == 100 * pieces and stages[rule].launches == 50 * pieces
    for name in ("mixing", rule, experts):
        assert slower[name].seconds - stages[name].seconds == pytest.approx(stages[name].launches * 2e-6)
    assert slower["scoring"] == stages["scoring"]
    replays = {s.name: s for s in gpu_plan.plan(recipe, replace(rates, replay_seconds=0.0), counts)}
    for name, count in (("mixing", 300), (experts, 600)):
        saved = stages[name].seconds - replays[name].seconds
        assert saved == pytest.approx(count * pieces * rates.replay_seconds)
    patient = {s.name: s for s in gpu_plan.plan(recipe, replace(rates, wait_seconds=0.0), counts)}
    waits = pieces + 6 * gpu_plan.VALID_TOKENS / recipe.evaluate.chunk_tokens
    assert stages[rule].seconds - patient[rule].seconds == pytest.approx(waits * rates.wait_seconds)
    assert patient["mixing"] == stages["mixing"]
    within = [stages[name].seconds for name in ("scoring", experts, "mixing", rule)]
    trained = replace(recipe, evaluate=replace(recipe.evaluate, ttt=replace(recipe.evaluate.ttt, kind="weights")))
    assert "test-time training" in {stage.name for stage in gpu_plan.plan(trained, rates, counts)}
    assert gpu_plan.evaluation_seconds(list(stages.values())) == pytest.approx(sum(within))
    assert gpu_plan.weakest(recipe, rates, counts)[0] == "peak"
    assert gpu_plan.weakest(recipe, rates, replace(counts, asked=9000.0))[0] == "launch_seconds"
    assert "coding" not in rates.assumed() and "peak" in rates.assumed()
    fewer = replace(recipe, compute=replace(recipe.compute, workers=1))
    assert {s.name: s for s in gpu_plan.plan(fewer, rates, counts)}["training step"].seconds > stages[
        "training step"
    ].seconds


def test_the_plan_of_a_loop_has_both_kinds_of_step() -> None:
    counts = gpu_plan.Launches(100.0, 300.0, 50.0, 20.0, 600.0)
    recipe, rates = recipes.frontier(), gpu_plan.Rates()
    early, late, *_ = gpu_plan.plan(recipe, rates, counts)
    assert (early.name, late.name) == ("training step, no loop yet", "training step")
    plain = gpu_plan.plan(replace(recipe, model=replace(recipe.model, looped_layers=())), rates, counts)[0]
    assert late.seconds > plain.seconds == pytest.approx(early.seconds, rel=1e-5)  # but for three skips
    steps = 592 * (0.35 / early.seconds + 0.65 / late.seconds)
    assert late.what == f"{steps:,.0f} steps in the budget"


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_launches_of_the_recipes_for_gpus_were_counted(name: str) -> None:
    evaluate = recipes.RECIPES[name]().evaluate
    if not recipes.RECIPES[name]().compute.gpus_per_worker:
        assert gpu_plan.launches_of(evaluate) is None
        return
    assert gpu_plan.launches_of(evaluate) == gpu_plan.COUNTED
    assert gpu_plan.launches_of(replace(evaluate, chunk_tokens=1)) == gpu_plan.COUNTED
    assert gpu_plan.launches_of(replace(evaluate, segment_tokens=1)) is None
    assert gpu_plan.launches_of(replace(evaluate, ttt=replace(evaluate.ttt, kind="weights"))) is None


def test_one_rank_exchanges_nothing_and_windows_score_positions_often() -> None:
    recipe, rates = recipes.single_gpu(), gpu_plan.Rates()
    slow = replace(rates, link=1.0)
    assert gpu_plan.plan(recipe, slow, gpu_plan.COUNTED) == gpu_plan.plan(recipe, rates, gpu_plan.COUNTED)
    windows = replace(recipe, evaluate=replace(recipe.evaluate, order="sliding", stride_tokens=512))
    streamed, slid = (gpu_plan.scoring_operations(each, 10**6) for each in (recipe, windows))
    # Four positions a token at half a window's keys, beside 1.25 at a whole band's, of a model that is mostly matrices.
    assert 2.5 < slid / streamed < 4 / 1.25


VARIANTS: dict[str, dict[str, Any]] = {
    "`frontier`": {},
    "13 layers, two rounds": {"layers": 13, "loop_passes": 2},
    "**`frontier_wide`**: 14 layers, two rounds": {"layers": 14, "loop_passes": 2},
    "14 layers, three rounds": {"layers": 14},
    "11 layers, MLP 2,816": {"mlp_hidden": 2816},
    "17 layers, no loop": {"layers": 17, "looped_layers": ()},
    "11 layers, 12,288 tokens": {},
}


def test_the_page_has_what_is_computed_of_the_frontier(monkeypatch: pytest.MonkeyPatch) -> None:
    n_bytes = script.n_bytes(recipes.frontier())
    monkeypatch.setattr(script, "n_bytes", lambda recipe: n_bytes)
    base, shown = recipes.frontier(), dict(re.findall(r"^\| ([^|]+?) \| (\d.+) \|$", PAGE.read_text(), re.MULTILINE))
    for name, parts in VARIANTS.items():
        vocab_size = 12_288 if "tokens" in name else base.data.vocab_size
        data, model = replace(base.data, vocab_size=vocab_size), replace(base.model, **parts)
        recipe = replace(base, data=data, model=model)
        shares = artifact_bytes.share_out(recipe, gpu_plan.built(recipe))
        *steps, _ = gpu_plan.training(recipe, gpu_plan.Rates())
        each = ", ".join(f"{1000 * step.seconds:.1f}" for step in steps)
        count = steps[-1].what.partition(" ")[0]
        weights, bits, *rest = shown[name].split(" | ")
        assert [weights, *rest] == [f"{shares.weights:,}", each, count], name
        assert float(bits) == pytest.approx(shares.bits, abs=0.011), name  # falls as the code grows
    assert recipes.frontier_wide().model == replace(
        base.model, **VARIANTS["**`frontier_wide`**: 14 layers, two rounds"]
    )
    evaluation = gpu_plan.evaluation(base, gpu_plan.Rates(), gpu_plan.COUNTED, gpu_plan.TOKENS_OF_SHARDS[8192])
    assert f"evaluation takes {gpu_plan.evaluation_seconds(evaluation):.0f} s" in PAGE.read_text()
