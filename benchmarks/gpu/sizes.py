"""How much each section does: with recipe record's model on one GPU, and in seconds on a CPU for the test."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.suite.setup import quick_sizes
from hedgemix import recipes
from hedgemix.config import Recipe, RecipeError


@dataclass(frozen=True)
class Sizes:
    recipe: Recipe
    """One GPU's share of a step of recipe record; its evaluation is one rank's."""
    tiny: bool
    valid_fraction: float
    """Share of the text's documents that is held out."""
    smoke_sequences: int
    """Sequences of the eager steps and of calibration; as many GiB, about, at the record's size."""
    smoke_tokens: int
    """Scored by the smoke test, in two chunks."""
    compared_tokens: int
    """Rows made on the device and on the CPU."""
    compared_mixed_tokens: int
    steps: int
    """Timed, after those that compile."""
    eager_steps: int
    streamed_tokens: int
    slid_tokens: int
    mixed_tokens: int
    blocks: tuple[int, ...]
    """Tokens of the mixer's blocks."""
    repeated_tokens: int
    """Evaluated twice."""
    repeats: int
    """Of what is timed call by call."""
    train: Recipe
    """What the record call trains, but for the budget."""
    train_seconds: float
    """Its budget, unless the command line says another."""
    room_bytes: int
    """Most bytes of its artifact and code."""
    full_tokens: int
    """Held-out tokens scored before quantization."""
    evaluated_tokens: int
    """Held-out tokens of the whole evaluation."""
    varied_tokens: int
    """Of those, evaluated again with other settings."""
    ordered_tokens: int
    """Scored by sliding windows and by streaming."""
    audited_tokens: int
    replayed_steps: int


def sizes(device: str, tiny: bool, vocab_size: int) -> Sizes:
    recipe = one_device(tiny_recipe() if tiny else recipes.record(), device, vocab_size)
    if tiny:
        train = replace(recipe, train=replace(recipe.train, reserve_seconds=1.0))
        return Sizes(
            recipe, True, 0.2, smoke_sequences=2, smoke_tokens=512, compared_tokens=64, compared_mixed_tokens=256,
            steps=3, eager_steps=2, streamed_tokens=512, slid_tokens=128, mixed_tokens=512, blocks=(32, 16),
            repeated_tokens=256, repeats=2, train=train, train_seconds=1.5, room_bytes=500_000,
            full_tokens=256, evaluated_tokens=512, varied_tokens=256, ordered_tokens=256,
            audited_tokens=128, replayed_steps=2,
        )  # fmt: skip
    if device == "cpu":
        raise RecipeError("--device cpu: the record's sizes take hours there; add --tiny")
    share = replace(recipe.train, batch_tokens=recipe.train.batch_tokens // 8, late_qat=False)
    recipe = replace(recipe, train=share)
    train = replace(recipe, train=replace(share, batch_tokens=196_608, reserve_seconds=10.0))
    return Sizes(
        recipe, False, 0.08, smoke_sequences=16, smoke_tokens=65_536, compared_tokens=512, compared_mixed_tokens=8192,
        steps=30, eager_steps=3, streamed_tokens=524_288, slid_tokens=8192, mixed_tokens=65_536, blocks=(512, 128),
        repeated_tokens=16_384, repeats=5, train=train, train_seconds=215.0, room_bytes=16_000_000,
        full_tokens=1_000_000, evaluated_tokens=4_000_000, varied_tokens=524_288, ordered_tokens=32_768,
        audited_tokens=16_384, replayed_steps=5,
    )  # fmt: skip


def one_device(recipe: Recipe, device: str, vocab_size: int) -> Recipe:
    compute = replace(
        recipe.compute, workers=1, evaluate_workers=1, cpus_per_worker=0, gpus_per_worker=int(device == "cuda")
    )
    return replace(recipe, compute=compute, data=replace(recipe.data, vocab_size=vocab_size))


def tiny_recipe() -> Recipe:
    """With the reference's test-time training, which is the one that can use up a device's memory."""
    tiny, record = quick_sizes().short, recipes.record()
    ttt = replace(record.evaluate.ttt, kind="weights", last_blocks=1, batch_sequences=2, sequence_tokens=64)
    evaluate = replace(tiny.evaluate, chunk_tokens=256, ttt=ttt, batch_windows=4)
    train = replace(tiny.train, warmup_steps=1, calibration_sequences=4)
    return replace(tiny, evaluate=evaluate, train=train)


def seeded(seed: int) -> torch.Generator:
    """Of draws made on the CPU, the same for every device."""
    return torch.Generator().manual_seed(seed)
