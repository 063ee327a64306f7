"""What `--plan` prints: figures that are known from the recipe, and computed ones that say so."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from hedgemix.config import Recipe
from hedgemix.recipes import RECIPES
from hedgemix.standalone import script
from pipeline.forecast import gpu_plan
from pipeline.plan import bytes_line, plan_lines, seconds_lines


def test_the_plan_lines_the_record_is_the_reference_run() -> None:
    plan = plan_lines(RECIPES["record"](), (1337, 42, 7))
    assert plan["parameters"] == "33,317,980"
    assert plan["training job"] == "8 workers on one node: 8 GPU, 160 CPU"
    assert plan["training loop"].startswith("582 s")
    assert plan["step"] == "786,432 tokens = 384 sequences of 2,048"
    recipe = RECIPES["record"]()
    grown = replace(recipe, train=replace(recipe.train, growth_fractions=(0.1, 0.7)))
    assert plan_lines(grown, (7,))["step"] == "786,432 tokens = 384 sequences of 2,048, which grow from 512"
    assert plan["each worker"] == "98,304 tokens a step = 48 sequences in 1 microbatch"
    assert plan["limits"].startswith("16,000,000 bytes, 600 s")
    # Of 11 layers, the projections of bigram and value embedding, and the output layer.
    operations = 6 * (11 * 2_883_584 + 2 * 128 * 512 + 1024 * 512) / 1e6
    assert plan["operations"] == f"{operations:.1f} million a token in training, of matrices"


def test_the_plan_tells_what_a_loop_of_layers_adds() -> None:
    plan = plan_lines(RECIPES["frontier"](), (1337,))
    assert plan["parameters"] == "35,945,623"
    # 11 layers of 2,883,584 weights and the table's 8,192 x 512, six operations each; then six layers more.
    before, after = (6 * (layers * 2_883_584 + 8192 * 512) / 1e6 for layers in (11, 17))
    assert plan["operations"] == (
        f"{before:.1f} million a token in training, of matrices; {after:.1f} million from 35% of the run on, when "
        "layers 3 to 5 run 3 times"
    )


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


def test_bytes_are_shared_out_up_to_the_limit() -> None:
    recipe = RECIPES["frontier"]()
    low, high, limit, code, tokenizer, memory, rest, bits, weights, *_ = numbers(plan_lines(recipe, (7,))["bytes"])
    assert (limit, code, memory, weights) == (16_000_000, script.n_bytes(recipe), 0, 35_913_728)
    assert code + tokenizer + rest + weights * bits / 8 == pytest.approx(limit, rel=0.002)
    assert 0.999 * limit < high <= limit and low == pytest.approx(high - (bits - 3.3) * weights / 8, rel=0.002)
    coarse = replace(recipe, quantize=replace(recipe.quantize, loss_nats=0.008))  # sixteen times, so two bits less
    model = gpu_plan.built(recipe)
    assert "needed 1.3 to 3.4 for quantize.loss_nats 0.008" in bytes_line(coarse, model)
    published = replace(recipe, quantize=replace(recipe.quantize, method="reference"))
    assert bytes_line(published, model).startswith("not computed")


def test_seconds_are_those_of_the_one_plan() -> None:
    recipe = RECIPES["frontier"]()
    plan, rates = plan_lines(recipe, (7,)), gpu_plan.Rates()
    early, late, calibration, quantization, coding, index, *stages = gpu_plan.plan(
        recipe, rates, gpu_plan.COUNTED, gpu_plan.TOKENS_OF_SHARDS[8192]
    )
    assert plan["train seconds"].startswith(f"a step {1e3 * early.seconds:.1f} ms, then {1e3 * late.seconds:.1f} ms: ")
    assert late.what in plan["train seconds"]
    assert numbers(plan["train seconds"])[-1] == round(calibration.seconds, 1)
    assert numbers(plan["export seconds"])[:2] == [round(quantization.seconds, 1), round(coding.seconds, 1)]
    seconds = [round(stage.seconds) for stage in stages]
    total, tokens, *each, before = numbers(plan["score seconds"])
    assert (tokens, each, before) == (47_853_344, seconds, round(index.seconds))
    assert total == round(gpu_plan.evaluation_seconds(stages))
    assert "not measured" in plan["computed"] and f"8 x {gpu_plan.DEVICE}" in plan["computed"]


def changed(recipe: Recipe, part: str, **values: Any) -> Recipe:
    return replace(recipe, **{part: replace(getattr(recipe, part), **values)})


def test_nothing_is_told_that_is_not_known() -> None:
    frontier, laptop = RECIPES["frontier"](), RECIPES["laptop"]()

    def scored(part: str, **values: Any) -> str:
        return seconds_lines(changed(frontier, part, **values))["score seconds"]

    assert scored("evaluate", segment_tokens=4096).startswith("not computed: how many launches")
    assert scored("data", vocab_size=12_288).startswith("not computed: how long")
    assert " of 1,000,000 tokens: " in scored("data", max_valid_tokens=10**6)
    assert ": 100 steps;" in seconds_lines(changed(frontier, "train", steps=100))["train seconds"]
    [line] = seconds_lines(laptop).values()
    assert line.startswith("61, by the clock")
    assert seconds_lines(changed(laptop, "train", steps=9))["train seconds"].startswith("what its steps take")
