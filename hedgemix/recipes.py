"""The recipes: functions returning one frozen configuration each. `validate` checks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hedgemix.config import (
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    LimitsConfig,
    MixerConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
    TTTConfig,
)

WEIGHTS_OF_THE_REFERENCE = TTTConfig(
    rate=1e-4, epochs=3, last_blocks=2, byte_weighted=True, cosine=True, ramp=3.0, ramp_fraction=0.3, polyak=0.998
)
"""What --evaluate.ttt.kind weights then is. The kind stays head: it needs no backward pass and no second forward pass.
On 62 M tokens and 8 GPUs cache and head take about 100 of evaluation's 190 seconds, computed, not measured."""
LONG_BLOCKS = MixerConfig(block_tokens=512)
"""For 62 M tokens on GPUs, where launches count: 60 % fewer than with 128, 0.009 bits a token more; docs/mixers.md."""


def laptop() -> Recipe:
    """Train on real text in minutes on two CPU cores: 0.4 M parameters, two workers that have the machine to
    themselves. Of the 1.4 MB, 1.15 go to training text that n-grams and match begin with: docs/data.md."""
    return Recipe(
        recipe="laptop",
        data=DataConfig(
            packages=("torch", "numpy", "pandas"),
            case_markers=True,
            valid_fraction=0.03,
            max_valid_tokens=98_304,
            memory_bytes=1_150_000,
        ),
        model=ModelConfig(
            layers=1,
            width=96,
            heads=2,
            kv_heads=2,
            mlp_hidden=320,
            input_mix=False,
            residual_scale=False,
            bigram_buckets=4096,
            bigram_width=32,
            value_embedding_layers=1,
            value_embedding_width=64,
        ),
        train=TrainConfig(
            budget_seconds=61,
            reserve_seconds=2,
            batch_tokens=1024,
            sequence_tokens=256,
            microbatch_sequences=2,
            warmup_steps=2,
            adam_beta2=0.99,
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
            mixer=MixerConfig(
                orders=(1, 2, 3, 4, 5, 6, 7, 8),
                gates=("order", "entropy", "both", "none"),
                memory_tokens=(1000.0, 1000.0, 1000.0, 1000.0),
                bias_rate=0.0,
                experts=("recency",),
            ),
        ),
        limits=LimitsConfig(total_bytes=1_400_000),
        compute=ComputeConfig(
            workers=2, gpus_per_worker=0, cpus_per_worker=0, evaluate_workers=1, checkpoint_seconds=10
        ),
    )


def single_gpu() -> Recipe:
    """Train the record's model at half its batch on one GPU, ten minutes a seed, on the shards in data/fineweb."""
    return Recipe(
        recipe="single_gpu",
        data=fineweb(),
        model=ModelConfig(residual_dtype="bfloat16"),
        train=TrainConfig(batch_tokens=393_216),
        evaluate=EvaluateConfig(chunk_tokens=131_072, mixer=LONG_BLOCKS),
        compute=ComputeConfig(workers=1, gpus_per_worker=1, cpus_per_worker=0, evaluate_workers=1),
    )


def record() -> Recipe:
    """Train as the reference does: 8 GPUs a seed, 600 s, 33,317,980 parameters, FineWeb with 1,024 tokens. No late QAT:
    that is for the reference's 5-bit grid, and the export here chooses its own steps."""
    return Recipe(
        recipe="record",
        data=fineweb(),
        model=ModelConfig(residual_dtype="bfloat16"),
        evaluate=EvaluateConfig(published_ranks=8, ttt=WEIGHTS_OF_THE_REFERENCE, mixer=LONG_BLOCKS),
    )


def frontier() -> Recipe:
    """Train as the best published entries do: 8 GPUs a seed, 600 s, FineWeb with 8,192 tokens, 35,945,623 parameters in
    11 layers, of which three run three times once 35 % of the run is over."""
    return Recipe(
        recipe="frontier",
        data=DataConfig(source="shards", shards_dir="data/fineweb_caseops", vocab_size=8192),
        model=ModelConfig(
            kv_heads=4,
            mlp_hidden=2048,
            rope_scaled_beyond_tokens=2048,
            qk_gain=5.0,
            zero_outputs=True,
            bigram_buckets=0,
            smear_by="input",
            skip_gates=True,
            head_gates=True,
            value_embedding_layers=0,
            looped_layers=(3, 4, 5),
            lane_layers=3,
            residual_dtype="bfloat16",
            within_documents=True,
        ),
        train=TrainConfig(
            reserve_seconds=8,
            embedding_rate=0.03,
            vector_rate=0.02,
            matrix_rate=0.028,
            weight_decay=0.095,
            embedding_decay=0.085,
            vector_decay=0.02,
            muon_equal_rows=True,
            newton_schulz="polar_express",
            adam_beta2=0.99,
            muon_momentum=0.97,
            muon_momentum_fraction=0.3,
            warmdown_fraction=0.85,
            rate_floor=0.1,
            growth_fractions=(0.1,),
            ema_decay=0.9965,
        ),
        evaluate=EvaluateConfig(mixer=LONG_BLOCKS),
    )


def frontier_wide() -> Recipe:
    """Train `frontier` with three layers more: what allocation saves in bits a weight buys 44,602,831 parameters in the
    same bytes. The third round of the loop is layers of its own, so that once it runs a step does the same work. Longer
    is the step before: computed 134 ms instead of 108, or 9 % fewer steps; never measured. docs/training.md."""
    narrow = frontier()
    return replace(narrow, recipe="frontier_wide", model=replace(narrow.model, layers=14, loop_passes=2))


def frontier_single_gpu() -> Recipe:
    """Train `frontier` at half its batch on one GPU, as `single_gpu` does `record`. Which of the two is better in ten
    minutes was not measured, so `single_gpu` stays what a machine with a GPU runs."""
    several, one = frontier(), single_gpu()
    train = replace(several.train, batch_tokens=one.train.batch_tokens)
    return replace(several, recipe="frontier_single_gpu", train=train, compute=one.compute)


def fineweb() -> DataConfig:
    """Read what `hedgemix download --folder data/fineweb` leaves."""
    return DataConfig(source="shards", shards_dir="data/fineweb", vocab_size=1024)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "laptop": laptop,
    "single_gpu": single_gpu,
    "record": record,
    "frontier": frontier,
    "frontier_wide": frontier_wide,
    "frontier_single_gpu": frontier_single_gpu,
}
