"""The recipes: functions returning one frozen configuration, and the check of everything that can be checked before
any work starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

from hedgemix import match, mixer, ngram, quantize, stream, train, ttt
from hedgemix.config import (
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    MixerConfig,
    ModelConfig,
    Recipe,
    RecipeError,
    TrainConfig,
    TTTConfig,
)
from hedgemix.model import validate as validate_model

LONG_BLOCKS = MixerConfig(block_tokens=512)
"""For 62 M tokens on GPUs, where launches count: 60 % fewer than with 128, 0.009 bits a token more; docs/mixers.md."""


def laptop() -> Recipe:
    """Real text in minutes on two CPU cores: 2.7 M parameters, one worker that has the machine to itself."""
    return Recipe(
        recipe="laptop",
        data=DataConfig(packages=("torch", "numpy", "pandas"), valid_fraction=0.03, max_valid_tokens=98_304),
        model=ModelConfig(
            layers=2,
            width=128,
            heads=2,
            kv_heads=2,
            mlp_hidden=448,
            bigram_buckets=32_768,
            bigram_width=64,
            value_embedding_layers=1,
            value_embedding_width=64,
        ),
        train=TrainConfig(
            budget_seconds=45,
            reserve_seconds=2,
            batch_tokens=2048,
            sequence_tokens=256,
            microbatch_sequences=8,
            warmup_steps=2,
            ema_decay=0.98,
            muon_momentum_start=0.85,
            muon_momentum=0.95,
            calibration_sequences=64,
            dtype="float32",
            compile=False,
        ),
        evaluate=EvaluateConfig(
            window_tokens=256,
            stride_tokens=32,
            segment_tokens=2048,
            overlap_tokens=256,
            chunk_tokens=8192,
            dtype="float32",
            ttt=TTTConfig(batch_sequences=8, sequence_tokens=256),
        ),
        compute=ComputeConfig(
            workers=1, gpus_per_worker=0, cpus_per_worker=0, evaluate_workers=1, checkpoint_seconds=10
        ),
    )


def single_gpu() -> Recipe:
    """One GPU, ten minutes a seed: the record's model and half its batch, on the FineWeb shards in data/fineweb."""
    return Recipe(
        recipe="single_gpu",
        data=fineweb(),
        model=ModelConfig(residual_dtype="bfloat16"),
        train=TrainConfig(batch_tokens=393_216),
        evaluate=EvaluateConfig(chunk_tokens=131_072, mixer=LONG_BLOCKS),
        compute=ComputeConfig(workers=1, gpus_per_worker=1, cpus_per_worker=0, evaluate_workers=1),
    )


def record() -> Recipe:
    """The reference's training: 8 GPUs a seed, 600 s, 33,317,980 parameters, FineWeb with 1,024 tokens. No late QAT:
    that is for the reference's 5-bit grid, and the export here chooses its own steps."""
    reference = TTTConfig(
        rate=1e-4, epochs=3, last_blocks=2, byte_weighted=True, cosine=True, ramp=3.0, ramp_fraction=0.3, polyak=0.998
    )
    return Recipe(
        recipe="record",
        data=fineweb(),
        model=ModelConfig(residual_dtype="bfloat16"),
        evaluate=EvaluateConfig(ttt=reference, mixer=LONG_BLOCKS),
    )


def fineweb() -> DataConfig:
    """What `hedgemix download --folder data/fineweb` leaves."""
    return DataConfig(source="shards", shards_dir="data/fineweb", vocab_size=1024)


RECIPES: dict[str, Callable[[], Recipe]] = {"laptop": laptop, "single_gpu": single_gpu, "record": record}


def validate(recipe: Recipe) -> None:
    """Raise RecipeError, naming field and fix, for anything wrong that needs no data and no machine to see."""
    compute = recipe.compute
    for name in ("workers", "evaluate_workers"):
        if getattr(compute, name) < 1:
            raise RecipeError(f"compute.{name} must be at least 1")
    for name in ("gpus_per_worker", "cpus_per_worker", "max_restarts"):
        if getattr(compute, name) < 0:
            raise RecipeError(f"compute.{name} must not be negative")
    if max(compute.workers, compute.evaluate_workers) > 1 and compute.gpus_per_worker % 1:
        raise RecipeError("compute.gpus_per_worker must be whole with several ranks: each needs a GPU of its own")
    for name, value in asdict(recipe.limits).items():
        if value <= 0 or math.isnan(value):
            raise RecipeError(f"limits.{name} must be positive")
    validate_model(recipe.model)
    if recipe.model.residual_dtype == "bfloat16" and recipe.train.dtype != "bfloat16":
        raise RecipeError("model.residual_dtype bfloat16 needs train.dtype bfloat16: set both to one type")
    train.validate(recipe, compute.workers)
    quantize.validate(recipe.quantize)
    stream.validate(recipe.evaluate, recipe.train.sequence_tokens)
    ttt.validate(recipe.evaluate.ttt, recipe.train.sequence_tokens)
    if recipe.data.vocab_size < 2:
        raise RecipeError("data.vocab_size must be at least 2")
    mixer.check(recipe.evaluate.mixer)
    ngram.check_orders(recipe.evaluate.mixer.orders)
    match.check_lengths(recipe.evaluate.mixer.match_lengths)
