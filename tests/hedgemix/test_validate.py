"""Every field of a recipe that can be wrong by itself, and what is said of it: one table, whole messages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from hedgemix import validate
from hedgemix.config import EvaluateConfig, ModelConfig, QuantizeConfig, Recipe, RecipeError, TTTConfig
from hedgemix.experts.registry import EXPERTS
from hedgemix.model.linear import QAT_LEVELS
from hedgemix.recipes import RECIPES

NAN, INF = math.nan, math.inf


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """The configuration with fields given by their dotted names."""
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        config = replace(config, **{name: changed(getattr(config, name), {rest: value}) if rest else value})
    return config


def check(changes: dict[str, Any]) -> None:
    recipe: Recipe = changed(RECIPES["laptop"](), changes)
    validate.check_recipe(recipe, QAT_LEVELS, EXPERTS)


FINITE = "it must be finite and not negative"
ROUNDED = "give at least one, each above 0 and at most 1"
WARMUP = "train.warmup_steps must be at least 2 with late_qat: each kind of step is compiled once"
BATCH = "train.batch_tokens {} is not a multiple of train.sequence_tokens 256 times {} workers; use {}"
WEIGHTS = {"evaluate.ttt.kind": "weights"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"compute.workers": 0}, "compute.workers must be at least 1"),
    ({"compute.evaluate_workers": 0}, "compute.evaluate_workers must be at least 1"),
    ({"compute.gpus_per_worker": -1}, "compute.gpus_per_worker must not be negative"),
    ({"compute.cpus_per_worker": -1}, "compute.cpus_per_worker must not be negative"),
    ({"compute.max_restarts": -1}, "compute.max_restarts must not be negative"),
    (
        {"compute.evaluate_workers": 2, "compute.gpus_per_worker": 0.5},
        "compute.gpus_per_worker must be whole with several ranks: each needs a GPU of its own",
    ),
    ({"limits.total_bytes": 0}, "limits.total_bytes must be positive"),
    ({"limits.train_seconds": NAN}, "limits.train_seconds must be positive"),
    ({"limits.evaluate_seconds": -1.0}, "limits.evaluate_seconds must be positive"),
    *(
        ({f"model.{field}": value}, f"model.{field} is {value}; it must be above 0")
        for field, value in {
            "layers": 0,
            "width": 0,
            "heads": 0,
            "kv_heads": 0,
            "mlp_hidden": -1,
            "rope_base": 0.0,
            "rope_scaled_beyond_tokens": 0,
            "logit_cap": NAN,
            "bigram_width": 0,
            "value_embedding_width": 0,
        }.items()
    ),
    ({"model.width": 129}, "model.width 129 is not a multiple of model.heads"),
    ({"model.kv_heads": 3}, "model.kv_heads 3 does not divide model.heads"),
    ({"model.rope_dims": 3}, "model.rope_dims 3 must be even and at most the head width 48"),
    ({"model.rope_dims": 66}, "model.rope_dims 66 must be even and at most the head width 48"),
    ({"model.rope_dims": -2}, "model.rope_dims -2 must be even and at most the head width 48"),
    ({"model.bigram_buckets": 1}, "model.bigram_buckets must be 0 (none) or at least 2"),
    ({"model.bigram_buckets": -1}, "model.bigram_buckets must be 0 (none) or at least 2"),
    ({"model.value_embedding_layers": 3}, "model.value_embedding_layers 3 must be between 0 and model.layers"),
    ({"model.value_embedding_layers": -1}, "model.value_embedding_layers -1 must be between 0 and model.layers"),
    ({"model.lane_layers": 2}, "model.lane_layers 2 must be between 0 and model.layers"),
    (
        {"model.skip_gates": True, "model.skips": False},
        "model.skip_gates needs model.skips: turn it on, or leave skip_gates out",
    ),
    (
        {"model.smear_by": "input", "model.smear_gate": False},
        "model.smear_by needs model.smear_gate: turn it on, or leave smear_by out",
    ),
    (
        {"model.width": 8, "model.rope_dims": 4, "model.head_gates": True},
        "model.width 8 is less than the 12 channels that decide gates",
    ),
    *(
        (
            {"model.layers": 4, "model.looped_layers": loop},
            f"model.looped_layers {loop}: give layers one after the other, from 0 to 3",
        )
        for loop in ((4,), (-1, 0), (0, 2), (2, 1), (1, 1))
    ),
    *(
        (
            {"model.looped_layers": (0,), "model.loop_passes": passes},
            f"model.loop_passes is {passes}; it must be from 2 to 16",
        )
        for passes in (0, 1, 17)
    ),
    (
        {"model.layers": 4, "model.looped_layers": (1, 2), "model.lane_layers": 2},
        "model.lane_layers 2 begin inside model.looped_layers (1, 2)",
    ),
    (
        {"model.layers": 4, "model.looped_layers": (0, 1, 2), "model.loop_passes": 11},
        "model.skips takes at most 31 layers, each pass counted; there are 34",
    ),
    (
        {"model.looped_layers": (0,), "train.loop_from_fraction": 1.0},
        "train.loop_from_fraction is 1; it must be below 1: the loop is what is scored",
    ),
    ({"train.matrix_rate": NAN}, f"train.matrix_rate is nan; {FINITE}"),
    ({"train.budget_seconds": INF}, f"train.budget_seconds is inf; {FINITE}"),
    ({"train.gradient_clip": -1}, f"train.gradient_clip is -1; {FINITE}"),
    ({"train.steps": -1}, f"train.steps is -1; {FINITE}"),
    ({"train.batch_tokens": 0}, "train.batch_tokens must be at least 1"),
    ({"train.sequence_tokens": 0}, "train.sequence_tokens must be at least 1"),
    ({"train.microbatch_sequences": 0}, "train.microbatch_sequences must be at least 1"),
    ({"train.log_every_steps": 0}, "train.log_every_steps must be at least 1"),
    ({"train.calibration_sequences": 0}, "train.calibration_sequences must be at least 1"),
    ({"train.batch_tokens": 1000}, BATCH.format(1000, 2, 512)),
    ({"train.batch_tokens": 16}, BATCH.format(16, 2, 512)),
    ({"compute.workers": 3}, BATCH.format(1024, 3, 768)),
    (
        {"train.late_qat": True, "quantize.method": "reference", "quantize.matrix_bits": 6},
        "train.late_qat trains for 5 bits; quantize.matrix_bits is 6",
    ),
    ({"train.late_qat": True, "train.compile": True, "train.warmup_steps": 1}, WARMUP),
    (
        {"train.late_qat": True, "model.looped_layers": (0,), "train.compile": True, "train.warmup_steps": 2},
        WARMUP.replace("2 with late_qat", "4 with late_qat and model.looped_layers"),
    ),
    (
        {"train.late_qat": True, "train.compile": True, "train.warmup_steps": 3, "train.growth_fractions": (0.5,)},
        "train.warmup_steps must be at least 4 with late_qat and growth_fractions: each kind of step is compiled once",
    ),
    (
        {
            "train.late_qat": True,
            "model.looped_layers": (0,),
            "train.growth_fractions": (0.1, 0.5),
            "train.compile": True,
            "train.warmup_steps": 20,
        },
        "train.late_qat, train.growth_fractions and model.looped_layers make 12 kinds of step, and torch compiles a "
        "model for at most 8; leave one out, or set train.compile to false",
    ),
    ({"train.rate_floor": 1.0}, "train.rate_floor is 1.0; it must be below 1"),
    (
        {"train.late_qat": True, "train.late_qat_below": 0.1, "train.rate_floor": 0.2},
        "train.rate_floor 0.2 is not below train.late_qat_below 0.1, where late_qat begins; lower it",
    ),
    *(
        (
            {"train.growth_fractions": fractions},
            f"train.growth_fractions is {fractions}; give rising fractions above 0 and below 1, or none",
        )
        for fractions in ((0.0,), (1.0,), (0.5, 0.5), (0.6, 0.3), (NAN,))
    ),
    (
        {"train.sequence_tokens": 258, "train.batch_tokens": 516, "train.growth_fractions": (0.1, 0.5)},
        "train.sequence_tokens 258 cannot be cut into 4 pieces, as train.growth_fractions (0.1, 0.5) asks; give fewer "
        "fractions or another length",
    ),
    ({"train.growth_fractions": (0.1, 0.2, 0.3, 0.4)}, "train.growth_fractions has 4 fractions; 3 are the most"),
    ({"train.embedding_decay": -1.0}, f"train.embedding_decay is -1.0; {FINITE}"),
    (
        {"train.newton_schulz": "polar_express", "train.newton_schulz_steps": 6},
        "train.newton_schulz_steps is 6; it must be 1 to 5 with polar_express",
    ),
    (
        {"train.budget_seconds": 2.0},
        "train.budget_seconds 2 leaves nothing after train.reserve_seconds 2",
    ),
    ({"quantize.matrix_bits": 1}, "quantize.matrix_bits is 1; it must be between 2 and 8"),
    ({"quantize.matrix_bits": 9}, "quantize.matrix_bits is 9; it must be between 2 and 8"),
    ({"quantize.table_bits": 1}, "quantize.table_bits is 1; it must be between 2 and 8"),
    ({"quantize.loss_nats": 0.0}, "quantize.loss_nats is 0.0; it must be above 0, such as 0.0005"),
    ({"quantize.loss_nats": NAN}, "quantize.loss_nats is nan; it must be above 0, such as 0.0005"),
    ({"quantize.loss_nats": INF}, "quantize.loss_nats is inf; it must be above 0, such as 0.0005"),
    ({"quantize.target_bytes": -1}, "quantize.target_bytes is -1; 0 means what the limit leaves"),
    ({"quantize.prune_fraction": 1.0}, "quantize.prune_fraction must be at least 0 and below 1"),
    ({"quantize.prune_fraction": NAN}, "quantize.prune_fraction must be at least 0 and below 1"),
    ({"quantize.zstd_level": 23}, "quantize.zstd_level must be between 1 and 22"),
    ({"quantize.damping": -0.1}, "quantize.damping is -0.1; choose 0 to 10"),
    ({"quantize.damping": 10.1}, "quantize.damping is 10.1; choose 0 to 10"),
    ({"quantize.block_columns": 0}, "quantize.block_columns is 0; it must be positive"),
    ({"quantize.clip_quantiles": ()}, f"quantize.clip_quantiles is (); {ROUNDED}"),
    ({"quantize.clip_quantiles": (0.0, 1.0)}, f"quantize.clip_quantiles is (0.0, 1.0); {ROUNDED}"),
    ({"quantize.scale_floor": -1.0}, "quantize.scale_floor is -1.0; float16 steps reach from 0 to 65504"),
    ({"quantize.scale_floor": 1e6}, "quantize.scale_floor is 1000000.0; float16 steps reach from 0 to 65504"),
    *(
        ({f"evaluate.{field}": 0}, f"evaluate.{field} must be at least 1")
        for field in ("window_tokens", "stride_tokens", "segment_tokens", "batch_windows", "chunk_tokens")
    ),
    ({"evaluate.overlap_tokens": -1}, "evaluate.overlap_tokens must not be negative"),
    (
        {"evaluate.order": "sliding", "evaluate.stride_tokens": 257},
        "evaluate.stride_tokens is larger than evaluate.window_tokens; tokens would lack context",
    ),
    (
        {"evaluate.window_tokens": 257},
        "evaluate.window_tokens 257 is longer than the training context (train.sequence_tokens 256); "
        "the model has never seen positions so far apart",
    ),
    (WEIGHTS | {"evaluate.ttt.epochs": 0}, "evaluate.ttt.epochs is 0; it must be at least 1"),
    (WEIGHTS | {"evaluate.ttt.batch_sequences": 0}, "evaluate.ttt.batch_sequences is 0; it must be at least 1"),
    (WEIGHTS | {"evaluate.ttt.sequence_tokens": 0}, "evaluate.ttt.sequence_tokens is 0; it must be at least 1"),
    (WEIGHTS | {"evaluate.ttt.rate": 0.0}, "evaluate.ttt.rate is 0.0; it must be positive"),
    (WEIGHTS | {"evaluate.ttt.rate": NAN}, "evaluate.ttt.rate is nan; it must be positive"),
    (WEIGHTS | {"evaluate.ttt.gradient_clip": -1.0}, f"evaluate.ttt.gradient_clip is -1.0; {FINITE}"),
    (WEIGHTS | {"evaluate.ttt.last_blocks": -1}, f"evaluate.ttt.last_blocks is -1; {FINITE}"),
    (WEIGHTS | {"evaluate.ttt.ramp": INF}, f"evaluate.ttt.ramp is inf; {FINITE}"),
    (WEIGHTS | {"evaluate.ttt.ramp_fraction": NAN}, f"evaluate.ttt.ramp_fraction is nan; {FINITE}"),
    (WEIGHTS | {"evaluate.ttt.polyak": 1.0}, "evaluate.ttt.polyak is 1.0; it must be at least 0 and below 1"),
    (WEIGHTS | {"evaluate.ttt.decay": 1.0}, "evaluate.ttt.decay is 1.0; it must be at least 0 and below 1"),
    (WEIGHTS | {"evaluate.ttt.context_tokens": -1}, f"evaluate.ttt.context_tokens is -1; {FINITE}"),
    (
        WEIGHTS | {"evaluate.ttt.sequence_tokens": 64, "evaluate.ttt.context_tokens": 193},
        "evaluate.ttt.context_tokens is 193; it must be at most 192, train.sequence_tokens less sequence_tokens",
    ),
    (WEIGHTS | {"evaluate.ttt.polyak": -0.1}, "evaluate.ttt.polyak is -0.1; it must be at least 0 and below 1"),
    (
        WEIGHTS | {"evaluate.ttt.sequence_tokens": 257},
        "evaluate.ttt.sequence_tokens is 257; it must be at most train.sequence_tokens, 256",
    ),
    ({"evaluate.ttt.kind": "lora"}, "evaluate.ttt.kind is lora; it must be head or weights"),
    ({"evaluate.ttt.head.rate": 0.0}, "evaluate.ttt.head.rate is 0.0; it must be positive"),
    ({"evaluate.ttt.head.ridge": NAN}, "evaluate.ttt.head.ridge is nan; it must be positive"),
    ({"evaluate.ttt.head.memory_tokens": 0.5}, "evaluate.ttt.head.memory_tokens is 0.5; it must be at least 1"),
    *(
        (
            {"evaluate.ttt.head.block_tokens": value},
            f"evaluate.ttt.head.block_tokens is {value}; it must be a divisor of 1024",
        )
        for value in (0, 48, 2048)
    ),
    *(
        ({f"evaluate.cache.{field}": value}, f"evaluate.cache.{field} is {value}; it must be {rule}")
        for field, value, rule in (
            ("memory_tokens", 0, "at least 1"),
            ("theta", 41.0, "from 0 to 40"),
            ("theta", -1.0, "from 0 to 40"),
            ("decay_tokens", 0.0, "at least 1"),
            ("floor", 0.0, "above 0 and below 1"),
            ("floor", 1.0, "above 0 and below 1"),
            ("ridge", 0.0, "positive"),
        )
    ),
    ({"data.vocab_size": 1}, "data.vocab_size must be at least 2"),
    ({"data.vocab_size": 65537}, "data.vocab_size is 65537; tokens have 16 bits, so 65536 is the most"),
    *(
        (
            {"data.valid_fraction": fraction},
            f"data.valid_fraction is {fraction}; it must be above 0 and below 1, such as 0.02",
        )
        for fraction in (0.0, 1.0, float("nan"))
    ),
    ({"data.memory_bytes": -1}, "data.memory_bytes is -1; 0 means none"),
    (
        {"data.memory_bytes": 500, "quantize.target_bytes": 500},
        "data.memory_bytes 500 fills the 500 bytes that the artifact may have; lower it",
    ),
    ({"data.max_text_bytes": -1}, "data.max_valid_tokens and data.max_text_bytes cannot be negative; 0 means all"),
    *(
        (
            {"data.overlap_words": words},
            f"data.overlap_words is {words}; it must be 0 (nothing is left out) or from 4 (fewer words in a row are "
            "common phrases) to 64",
        )
        for words in (-1, 3, 65)
    ),
    *(
        ({f"evaluate.mixer.{field}": value}, f"evaluate.mixer.{field} is {value}; it must be {rule}")
        for field, value, rule in (
            ("hedge_share", 1.0, "0, or from 1e-6 to below 1"),
            ("hedge_share", 1e-7, "0, or from 1e-6 to below 1"),
            ("gates", (), "one or more"),
            ("linear_rate", 0.0, "above 0 and below 1"),
            ("memory_tokens", (1.0,), "one number for each of gates"),
            ("memory_tokens", (1.0, 1.0, 1.0, 0.0), "above 0"),
            ("bias_rate", 1.0, "at least 0 and below 1"),
            ("logistic_ridge", 0.0, "above 0"),
            ("block_tokens", 0, "at least 1"),
            ("entropy_sets", 0, "at least 1"),
        )
    ),
    (
        {"evaluate.mixer.kind": "linear", "evaluate.mixer.linear_gates": ()},
        "evaluate.mixer.linear_gates is (); it must be one or more for this kind",
    ),
    (
        {"evaluate.mixer.experts": ("recent",)},
        "evaluate.mixer.experts has 'recent'; choose from recency",
    ),
    (
        {"evaluate.mixer.experts": ("recency", "recency")},
        "evaluate.mixer.experts is ('recency', 'recency'); name each once",
    ),
    *(
        ({"evaluate.mixer.orders": orders}, f"evaluate.mixer.orders {orders}: give rising orders from 1 to 8")
        for orders in ((), (0, 1), (1, 9), (2, 1), (2, 2))
    ),
    *(
        (
            {"evaluate.mixer.match_lengths": lengths},
            f"evaluate.mixer.match_lengths {lengths}: give rising lengths from 1 to 4096, or none",
        )
        for lengths in ((0,), (8, 4), (4, 4), (5000,))
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_field_that_cannot_work_is_named_with_the_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check(changes)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"compute.gpus_per_worker": 0.5, "compute.workers": 1},
        {"model.bigram_buckets": 0, "model.bigram_width": 0},
        {"model.value_embedding_layers": 0, "model.value_embedding_width": 0},
        {"model.rope_dims": 48},
        {"train.steps": 5, "train.budget_seconds": 0.0},
        {"train.late_qat": True, "quantize.matrix_bits": 6},
        {"train.late_qat": True, "train.warmup_steps": 0},
        {"model.layers": 4, "model.looped_layers": (2, 3), "model.loop_passes": 14, "model.lane_layers": 2},
        {"model.loop_passes": 0, "train.loop_from_fraction": 1.0},
        {"train.growth_fractions": (0.1, 0.2, 0.999), "train.embedding_decay": 0.0, "train.rate_floor": 0.99},
        {"train.newton_schulz_steps": 6, "train.muon_momentum": 1.0},
        {"quantize.matrix_bits": 2, "quantize.table_bits": 8, "quantize.zstd_level": 22, "quantize.damping": 0.0},
        {"evaluate.overlap_tokens": 0, "evaluate.stride_tokens": 999},
        {"evaluate.order": "sliding", "evaluate.stride_tokens": 256},
        {"evaluate.ttt.enabled": False, "evaluate.ttt.epochs": 0, "evaluate.ttt.sequence_tokens": 999},
        WEIGHTS | {"evaluate.ttt.sequence_tokens": 256, "evaluate.ttt.polyak": 0.0},
        WEIGHTS | {"evaluate.ttt.head.rate": 0.0},
        {"evaluate.ttt.epochs": 0, "evaluate.ttt.head.block_tokens": 1024, "evaluate.ttt.head.memory_tokens": 1.0},
        {"evaluate.cache.enabled": False, "evaluate.cache.floor": 0.0},
        {"evaluate.cache.theta": 40.0, "evaluate.cache.memory_tokens": 1, "evaluate.cache.decay_tokens": 1.0},
        {"evaluate.mixer.hedge_share": 0.0, "evaluate.mixer.linear_gates": ()},
        {"evaluate.mixer.orders": (6,), "evaluate.mixer.match_lengths": (), "evaluate.mixer.experts": ("recency",)},
    ],
)
def test_what_is_at_the_edge_or_unused_is_accepted(changes: dict[str, Any]) -> None:
    check(changes)


def test_what_the_code_can_do_is_handed_in() -> None:
    recipe = changed(RECIPES["laptop"](), {"train.late_qat": True, "quantize.method": "reference"})
    validate.check_recipe(recipe, QAT_LEVELS, EXPERTS)
    with pytest.raises(RecipeError, match="late_qat"):
        validate.check_recipe(recipe, QAT_LEVELS + 1, EXPERTS)
    validate.check_train(recipe, 4, QAT_LEVELS)
    with pytest.raises(RecipeError, match=r"256 times 3 workers"):
        validate.check_train(recipe, 3, QAT_LEVELS)
    validate.check_experts(("mine",), ("mine", "yours"))
    with pytest.raises(RecipeError, match="choose from mine, yours"):
        validate.check_experts(("recency",), ("mine", "yours"))


def test_parts_are_checked_alone() -> None:
    """As an artifact's model or a decoder's settings are."""
    validate.check_model(ModelConfig())
    validate.check_quantize(QuantizeConfig())
    validate.check_evaluate(EvaluateConfig(window_tokens=64), 64)
    validate.check_ttt(TTTConfig(sequence_tokens=64), 64)
    with pytest.raises(RecipeError, match="^damping is -1; choose"):
        validate.check_rounding(-1, 1, (1.0,), 0.0)
