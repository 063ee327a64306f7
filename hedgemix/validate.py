"""Every check of a recipe that needs no data and no machine, section by section, in the order of `config`.

Each function raises RecipeError with a message that names the field and the fix, and returns nothing. The parts of a
recipe that are used alone (a model, a mixture, an evaluation of an artifact) are checked by the same functions where
they are used. This module knows the configuration only: what the code behind it can do (names of experts, levels of
quantization-aware training, ranks) is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

from hedgemix.config import (
    CacheConfig,
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    HeadConfig,
    LimitsConfig,
    MixerConfig,
    ModelConfig,
    QuantizeConfig,
    Recipe,
    RecipeError,
    TrainConfig,
    TTTConfig,
)
from hedgemix.model_config import GATE_CHANNELS

LARGEST_DAMPING = 10.0
"""Of a Hessian's mean diagonal: with more, the Hessian says nothing."""
LARGEST_STEP = 65504.0
"""The largest float16, which holds the published export's steps."""
MOST_GROWTHS = 3
"""Of sequences."""
MOST_KINDS = 8
"""Of step: torch compiles one model for no more."""
METRIC_TOKENS = 1024
"""At multiples of this the metric of features may change, and no block of the fast head lies across one."""
MOST_LOOPS = 16
MOST_SKIPPED = 31
"""Passes: the weights of half as many skips are fewer rows than what is quantized."""
LARGEST_THETA = 40.0
"""Of the neural cache: exp(2 theta), the ratio of its largest weight to its least, stays within float32."""


def check_recipe(recipe: Recipe, qat_levels: int, expert_names: Collection[str]) -> None:
    """Check a whole recipe; the first field that cannot work is named.

    qat_levels: the largest code that quantization-aware training rounds to. expert_names: the further experts there
    are.
    """
    evaluate, context_tokens = recipe.evaluate, recipe.train.sequence_tokens
    check_compute(recipe.compute)
    check_limits(recipe.limits)
    check_model(recipe.model)
    if recipe.model.residual_dtype == "bfloat16" and recipe.train.dtype != "bfloat16":
        raise RecipeError("model.residual_dtype bfloat16 needs train.dtype bfloat16: set both to one type")
    check_train(recipe, recipe.compute.workers, qat_levels)
    check_quantize(recipe.quantize)
    check_evaluate(evaluate, context_tokens)
    check_ttt(evaluate.ttt, context_tokens)
    check_data(recipe.data)
    check_memory(recipe)
    check_cache(evaluate.cache)
    check_mixer(evaluate.mixer, expert_names)
    check_orders(evaluate.mixer.orders)
    check_match_lengths(evaluate.mixer.match_lengths)


def check_compute(config: ComputeConfig) -> None:
    """Check counts of ranks and what each is given."""
    for name in ("workers", "evaluate_workers"):
        if getattr(config, name) < 1:
            raise RecipeError(f"compute.{name} must be at least 1")
    for name in ("gpus_per_worker", "cpus_per_worker", "max_restarts"):
        if getattr(config, name) < 0:
            raise RecipeError(f"compute.{name} must not be negative")
    if max(config.workers, config.evaluate_workers) > 1 and config.gpus_per_worker % 1:
        raise RecipeError("compute.gpus_per_worker must be whole with several ranks: each needs a GPU of its own")


def check_data(config: DataConfig) -> None:
    """Check the numbers of a text's configuration; whether the text is there shows when it is made."""
    if config.vocab_size < 2:
        raise RecipeError("data.vocab_size must be at least 2")
    if config.vocab_size > 65536:
        raise RecipeError(f"data.vocab_size is {config.vocab_size}; tokens have 16 bits, so 65536 is the most")
    if not 0 < config.valid_fraction < 1:
        raise RecipeError(
            f"data.valid_fraction is {config.valid_fraction}; it must be above 0 and below 1, such as 0.02"
        )
    if config.max_valid_tokens < 0 or config.max_text_bytes < 0:
        raise RecipeError("data.max_valid_tokens and data.max_text_bytes cannot be negative; 0 means all")
    if config.memory_bytes < 0:
        raise RecipeError(f"data.memory_bytes is {config.memory_bytes}; 0 means none")
    if config.overlap_words not in (0, *range(4, 65)):
        raise RecipeError(
            f"data.overlap_words is {config.overlap_words}; it must be 0 (nothing is left out) or from 4 "
            "(fewer words in a row are common phrases) to 64"
        )


READ_BY = {"packages": "docs", "paths": "text", "text_field": "text", "shards_dir": "shards", "tokenizer": "shards"}
"""Fields of the data that one source reads."""


def check_read(config: DataConfig, default: DataConfig) -> None:
    """Check that what a person gave in place of the default is read at all."""
    for field, source in READ_BY.items():
        if config.source != source and getattr(config, field) != getattr(default, field):
            raise RecipeError(
                f"data.{field} is given, and data.source {config.source} does not read it; set data.source {source}, "
                "or leave it out"
            )
    if config.source == "shards" and config.case_markers != default.case_markers:
        raise RecipeError(
            "data.case_markers is given, and whether shards have them is told by their tokenizer; leave it out"
        )


def check_limits(config: LimitsConfig) -> None:
    """Check that there is room and time at all."""
    for name, value in asdict(config).items():
        if value <= 0 or math.isnan(value):
            raise RecipeError(f"limits.{name} must be positive")


def check_model(config: ModelConfig) -> None:
    """Check that the shapes can be built."""
    positive = ["layers", "width", "heads", "kv_heads", "mlp_hidden"]
    positive += ["rope_base", "rope_scaled_beyond_tokens", "logit_cap"]
    positive += ["bigram_width"] if config.bigram_buckets else []
    positive += ["value_embedding_width"] if config.value_embedding_layers else []
    for field in positive:
        _require("model", config, getattr(config, field) > 0, field, "above 0")
    if config.width % config.heads:
        raise RecipeError(f"model.width {config.width} is not a multiple of model.heads")
    if config.heads % config.kv_heads:
        raise RecipeError(f"model.kv_heads {config.kv_heads} does not divide model.heads")
    head_width = config.width // config.heads
    if config.rope_dims % 2 or not 0 <= config.rope_dims <= head_width:
        raise RecipeError(f"model.rope_dims {config.rope_dims} must be even and at most the head width {head_width}")
    if config.bigram_buckets < 0 or config.bigram_buckets == 1:
        raise RecipeError("model.bigram_buckets must be 0 (none) or at least 2")
    for field in ("value_embedding_layers", "lane_layers"):
        if not 0 <= getattr(config, field) <= config.layers:
            raise RecipeError(f"model.{field} {getattr(config, field)} must be between 0 and model.layers")
    if config.skip_gates and not config.skips:
        raise RecipeError("model.skip_gates needs model.skips: turn it on, or leave skip_gates out")
    if config.smear_by != "channel" and not config.smear_gate:
        raise RecipeError("model.smear_by needs model.smear_gate: turn it on, or leave smear_by out")
    if (config.head_gates or config.smear_by == "input") and config.width < GATE_CHANNELS:
        raise RecipeError(f"model.width {config.width} is less than the {GATE_CHANNELS} channels that decide gates")
    check_loop(config)


def check_loop(config: ModelConfig) -> None:
    """Check the layers that run several times, and how many passes there are in all."""
    loop, lanes = config.looped_layers, config.layers - config.lane_layers
    in_a_row = all(after == layer + 1 for layer, after in pairwise(loop))
    if loop and not (in_a_row and loop[0] >= 0 and loop[-1] < config.layers):
        raise RecipeError(f"model.looped_layers {loop}: give layers one after the other, from 0 to {config.layers - 1}")
    if loop and loop[0] < lanes <= loop[-1]:
        raise RecipeError(f"model.lane_layers {config.lane_layers} begin inside model.looped_layers {loop}")
    if loop and not 2 <= config.loop_passes <= MOST_LOOPS:
        raise RecipeError(f"model.loop_passes is {config.loop_passes}; it must be from 2 to {MOST_LOOPS}")
    passes = config.layers + (config.loop_passes - 1) * len(loop)
    if config.skips and passes > MOST_SKIPPED:
        raise RecipeError(f"model.skips takes at most {MOST_SKIPPED} layers, each pass counted; there are {passes}")


def check_train(recipe: Recipe, workers: int, qat_levels: int) -> None:
    """Check the batch's arithmetic over this many ranks, the budget, and what is exported of what was trained for."""
    config, export = recipe.train, recipe.quantize
    for name, value in asdict(config).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _require("train", config, 0 <= value < math.inf, name, "finite and not negative")
    for name in ("batch_tokens", "sequence_tokens", "microbatch_sequences", "log_every_steps", "calibration_sequences"):
        if getattr(config, name) < 1:
            raise RecipeError(f"train.{name} must be at least 1")
    if config.batch_tokens % (config.sequence_tokens * workers):
        raise RecipeError(
            f"train.batch_tokens {config.batch_tokens} is not a multiple of train.sequence_tokens "
            f"{config.sequence_tokens} times {workers} workers; use "
            f"{max(1, config.batch_tokens // (config.sequence_tokens * workers)) * config.sequence_tokens * workers}"
        )
    if config.late_qat and export.method == "reference" and 2 ** (export.matrix_bits - 1) - 1 != qat_levels:
        raise RecipeError(f"train.late_qat trains for 5 bits; quantize.matrix_bits is {export.matrix_bits}")
    loops = bool(recipe.model.looped_layers)
    switches = {
        "late_qat": config.late_qat,
        "growth_fractions": bool(config.growth_fractions),
        "model.looped_layers": loops,
    }
    kinds = (1 + config.late_qat) * (1 + len(config.growth_fractions)) * (1 + loops)
    if config.compile and config.warmup_steps < kinds > 1:
        named = " and ".join(name for name, on in switches.items() if on)
        raise RecipeError(
            f"train.warmup_steps must be at least {kinds} with {named}: each kind of step is compiled once"
        )
    if config.compile and kinds > MOST_KINDS:
        raise RecipeError(
            f"train.late_qat, train.growth_fractions and model.looped_layers make {kinds} kinds of step, and torch "
            f"compiles a model for at most {MOST_KINDS}; leave one out, or set train.compile to false"
        )
    if loops and config.loop_from_fraction >= 1:
        raise RecipeError(
            f"train.loop_from_fraction is {config.loop_from_fraction:g}; it must be below 1: the loop is what is scored"
        )
    _require("train", config, config.rate_floor < 1, "rate_floor", "below 1")
    if config.late_qat and 0 < config.late_qat_below <= config.rate_floor:
        raise RecipeError(
            f"train.rate_floor {config.rate_floor} is not below train.late_qat_below {config.late_qat_below}, where "
            "late_qat begins; lower it"
        )
    check_growth(config)
    check_muon(config)
    if not config.steps and config.budget_seconds <= config.reserve_seconds:
        raise RecipeError(
            f"train.budget_seconds {config.budget_seconds:g} leaves nothing after train.reserve_seconds "
            f"{config.reserve_seconds:g}"
        )


def check_growth(config: TrainConfig) -> None:
    """Check that sequences grow to their whole length, from pieces of whole tokens."""
    at = config.growth_fractions
    if not all(a < b for a, b in pairwise((0.0, *at, 1.0))):
        raise RecipeError(f"train.growth_fractions is {at}; give rising fractions above 0 and below 1, or none")
    if config.sequence_tokens % 2 ** len(at):
        raise RecipeError(
            f"train.sequence_tokens {config.sequence_tokens} cannot be cut into {2 ** len(at)} pieces, as "
            f"train.growth_fractions {at} asks; give fewer fractions or another length"
        )
    if len(at) > MOST_GROWTHS:
        raise RecipeError(f"train.growth_fractions has {len(at)} fractions; {MOST_GROWTHS} are the most")


def check_muon(config: TrainConfig) -> None:
    """Check Muon's polynomials."""
    if config.newton_schulz == "polar_express":
        steps = config.newton_schulz_steps
        _require("train", config, 1 <= steps <= 5, "newton_schulz_steps", "1 to 5 with polar_express")


def check_quantize(config: QuantizeConfig) -> None:
    """Check the settings of both exports."""
    for name in ("matrix_bits", "table_bits"):
        _require("quantize", config, 2 <= getattr(config, name) <= 8, name, "between 2 and 8")
    _require("quantize", config, 0 < config.loss_nats < math.inf, "loss_nats", "above 0, such as 0.0005")
    if config.target_bytes < 0:
        raise RecipeError(f"quantize.target_bytes is {config.target_bytes}; 0 means what the limit leaves")
    if not 0 <= config.prune_fraction < 1:
        raise RecipeError("quantize.prune_fraction must be at least 0 and below 1")
    if not 1 <= config.zstd_level <= 22:
        raise RecipeError("quantize.zstd_level must be between 1 and 22")
    check_rounding(config.damping, config.block_columns, config.clip_quantiles, config.scale_floor, "quantize.")


def check_rounding(
    damping: float, block_columns: int, clip_quantiles: tuple[float, ...], scale_floor: float, section: str = ""
) -> None:
    """Check what GPTQ and the published export round by; messages begin with `section` and the field."""
    if not 0 <= damping <= LARGEST_DAMPING:
        raise RecipeError(f"{section}damping is {damping}; choose 0 to {LARGEST_DAMPING:g}")
    if block_columns < 1:
        raise RecipeError(f"{section}block_columns is {block_columns}; it must be positive")
    if not clip_quantiles or not all(0 < quantile <= 1 for quantile in clip_quantiles):
        raise RecipeError(f"{section}clip_quantiles is {clip_quantiles}; give at least one, each above 0 and at most 1")
    if not 0 <= scale_floor <= LARGEST_STEP:
        raise RecipeError(f"{section}scale_floor is {scale_floor}; float16 steps reach from 0 to {LARGEST_STEP:g}")


def check_evaluate(config: EvaluateConfig, context_tokens: int) -> None:
    """Check the order of scoring, of a model whose training context was this long."""
    counts = "window_tokens", "stride_tokens", "segment_tokens", "batch_windows", "chunk_tokens", "published_ranks"
    for name in counts:
        if getattr(config, name) < 1:
            raise RecipeError(f"evaluate.{name} must be at least 1")
    if config.overlap_tokens < 0:
        raise RecipeError("evaluate.overlap_tokens must not be negative")
    if config.order == "sliding" and config.stride_tokens > config.window_tokens:
        raise RecipeError("evaluate.stride_tokens is larger than evaluate.window_tokens; tokens would lack context")
    if config.window_tokens > context_tokens:
        raise RecipeError(
            f"evaluate.window_tokens {config.window_tokens} is longer than the training context "
            f"(train.sequence_tokens {context_tokens}); the model has never seen positions so far apart"
        )


def check_ttt(config: TTTConfig, context_tokens: int) -> None:
    """Check test-time training of the kind chosen, unless it is off, of a model whose training context was this
    long."""
    if not config.enabled:
        return
    require = partial(_require, "evaluate.ttt", config)
    require(config.kind in ("head", "weights"), "kind", "head or weights")
    if config.kind == "head":
        check_head(config.head)
        return
    for field in ("epochs", "batch_sequences", "sequence_tokens"):
        require(getattr(config, field) >= 1, field, "at least 1")
    require(0 < config.rate < math.inf, "rate", "positive")
    for field in ("context_tokens", "gradient_clip", "last_blocks", "ramp", "ramp_fraction"):
        require(0 <= getattr(config, field) < math.inf, field, "finite and not negative")
    for field in ("decay", "polyak"):
        require(0 <= getattr(config, field) < 1, field, "at least 0 and below 1")
    rule = f"at most train.sequence_tokens, {context_tokens}"
    require(config.sequence_tokens <= context_tokens, "sequence_tokens", rule)
    room = context_tokens - config.sequence_tokens
    require(
        config.context_tokens <= room, "context_tokens", f"at most {room}, train.sequence_tokens less sequence_tokens"
    )


def check_memory(recipe: Recipe) -> None:
    """Check that the artifact has room for the training text that it is to carry, and for something beside it."""
    memory, room = recipe.data.memory_bytes, recipe.quantize.target_bytes or recipe.limits.total_bytes
    if memory >= room:
        raise RecipeError(f"data.memory_bytes {memory:,} fills the {room:,} bytes that the artifact may have; lower it")


def check_head(config: HeadConfig) -> None:
    """Check the fast head's steps."""
    require = partial(_require, "evaluate.ttt.head", config)
    for field in ("rate", "ridge"):
        require(0 < getattr(config, field) < math.inf, field, "positive")
    require(1 <= config.memory_tokens < math.inf, "memory_tokens", "at least 1")
    block = config.block_tokens
    require(1 <= block <= METRIC_TOKENS and METRIC_TOKENS % block == 0, "block_tokens", f"a divisor of {METRIC_TOKENS}")


def check_cache(config: CacheConfig) -> None:
    """Check the neural cache, unless it is off."""
    if not config.enabled:
        return
    require = partial(_require, "evaluate.cache", config)
    require(config.memory_tokens >= 1, "memory_tokens", "at least 1")
    require(0 <= config.theta <= LARGEST_THETA, "theta", f"from 0 to {LARGEST_THETA:g}")
    require(1 <= config.decay_tokens < math.inf, "decay_tokens", "at least 1")
    require(0 < config.floor < 1, "floor", "above 0 and below 1")
    require(0 < config.ridge < math.inf, "ridge", "positive")


def check_mixer(config: MixerConfig, expert_names: Collection[str]) -> None:
    """Check the mixture, whose further experts are of `expert_names`; its n-gram orders and match lengths are checked
    by `check_orders` and `check_match_lengths`."""
    require = partial(_require, "evaluate.mixer", config)
    share = config.hedge_share
    require(share == 0 or 1e-6 <= share < 1, "hedge_share", "0, or from 1e-6 to below 1")
    require(0 < config.discount < 1, "discount", "above 0 and below 1")
    require(len(config.gates) > 0, "gates", "one or more")
    require(config.kind != "linear" or len(config.linear_gates) > 0, "linear_gates", "one or more for this kind")
    require(0 < config.linear_rate < 1, "linear_rate", "above 0 and below 1")
    require(len(config.memory_tokens) == len(config.gates), "memory_tokens", "one number for each of gates")
    require(all(memory > 0 for memory in config.memory_tokens), "memory_tokens", "above 0")
    require(0 <= config.bias_rate < 1, "bias_rate", "at least 0 and below 1")
    require(config.logistic_ridge > 0, "logistic_ridge", "above 0")
    require(config.block_tokens >= 1, "block_tokens", "at least 1")
    require(config.entropy_sets >= 1, "entropy_sets", "at least 1")
    check_experts(config.experts, expert_names)


def check_experts(names: Sequence[str], expert_names: Collection[str]) -> None:
    """Check that every name is one of `expert_names`, given once."""
    if unknown := [name for name in names if name not in expert_names]:
        raise RecipeError(f"evaluate.mixer.experts has {unknown[0]!r}; choose from {', '.join(expert_names)}")
    if len(set(names)) != len(names):
        raise RecipeError(f"evaluate.mixer.experts is {tuple(names)}; name each once")


def check_orders(orders: tuple[int, ...]) -> None:
    """Check that n-gram orders rise, from 1 at least to 8 at most."""
    if not orders or list(orders) != sorted(set(orders)) or orders[0] < 1 or orders[-1] > 8:
        raise RecipeError(f"evaluate.mixer.orders {orders}: give rising orders from 1 to 8")


def check_match_lengths(lengths: tuple[int, ...]) -> None:
    """Check that match lengths rise, from 1 at least to 4096 at most; none means no expert."""
    if list(lengths) != sorted(set(lengths)) or any(not 1 <= m <= 4096 for m in lengths):
        raise RecipeError(f"evaluate.mixer.match_lengths {lengths}: give rising lengths from 1 to 4096, or none")


def _require(section: str, config: Any, fits: bool, field: str, rule: str) -> None:
    if not fits:
        raise RecipeError(f"{section}.{field} is {getattr(config, field)}; it must be {rule}")
