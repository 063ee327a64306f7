"""What is measured: sizes for a CPU, a GPU and a test, text and models trained on it, and the table's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.machine import Limits
from benchmarks.suite.timing import Comparison
from hedgemix import recipes
from hedgemix.config import MixerConfig, ModelConfig, Recipe, config_hash
from hedgemix.data import bpb, dataset, tokenizer
from hedgemix.data.dataloader import Batches
from hedgemix.data.dataset import Dataset
from hedgemix.model.transformer import Model
from hedgemix.train.trainer import Run


@dataclass(frozen=True)
class Sizes:
    """How much each stage does."""

    short: Recipe
    """Its model, batch and text; sliding windows of its `evaluate.window_tokens`."""
    long: Recipe
    """The same for windows of 2,048 tokens."""
    export: ModelConfig
    """The weights that are quantized and coded."""
    train_steps: int
    long_steps: int
    """Before anything is scored."""
    windows: int
    long_windows: int
    """Full windows that are scored."""
    mixed_tokens: int
    told_tokens: int
    """Mixed in blocks, and of these, mixed one by one."""
    rank_steps: int
    repeats: int
    heavy_repeats: int
    """Of stages that take seconds a call."""


def sizes(device: torch.device, quick: bool) -> Sizes:
    if quick:
        return quick_sizes()
    if device.type == "cuda":
        record = recipes.record()
        data = replace(recipes.laptop().data, max_text_bytes=20_000_000)
        train = replace(record.train, batch_tokens=record.train.batch_tokens // 8, late_qat=False)
        long = replace(record, data=data, train=train)
        short = replace(long, evaluate=replace(record.evaluate, window_tokens=256, overlap_tokens=256))
        return Sizes(short, long, record.model, 200, 200, 2048, 1024, 32_768, 512, 20, 7, 3)
    laptop = recipes.laptop()
    short = replace(laptop, data=replace(laptop.data, max_text_bytes=6_000_000))
    train = replace(laptop.train, sequence_tokens=2048, batch_tokens=4096, microbatch_sequences=2)
    evaluate = replace(laptop.evaluate, window_tokens=2048, overlap_tokens=2048, segment_tokens=8192, batch_windows=8)
    model = replace(laptop.model, width=64, mlp_hidden=224, bigram_buckets=8192)
    long = replace(short, model=model, train=train, evaluate=evaluate)
    return Sizes(short, long, ModelConfig(), 120, 60, 48, 8, 4096, 256, 10, 5, 2)


def quick_sizes() -> Sizes:
    """Seconds in all, for the test; its figures mean nothing."""
    laptop = recipes.laptop()
    model = ModelConfig(
        layers=2, width=64, heads=2, kv_heads=2, mlp_hidden=96, rope_dims=8, bigram_buckets=128, bigram_width=16,
        value_embedding_layers=1, value_embedding_width=16,
    )  # fmt: skip
    train = replace(laptop.train, batch_tokens=128, sequence_tokens=64, microbatch_sequences=2)
    mixer = MixerConfig(orders=(1, 2, 3), match_lengths=(4, 8), block_tokens=32)
    evaluate = replace(
        laptop.evaluate, window_tokens=64, stride_tokens=16, overlap_tokens=64, segment_tokens=128, mixer=mixer
    )
    data = replace(laptop.data, packages=("numpy",), max_text_bytes=200_000, valid_fraction=0.2, vocab_size=384)
    recipe = replace(laptop, data=data, model=model, train=train, evaluate=evaluate)
    return Sizes(recipe, recipe, model, 8, 8, 4, 4, 128, 64, 2, 2, 1)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    what: str
    size: str
    baseline: str
    baseline_seconds: float
    seconds: float
    ratio: float
    """Baseline over hedgemix, of medians."""
    ratio_low: float
    ratio_high: float
    """The least and largest of the pairs'."""
    baseline_quartile_low: float
    baseline_quartile_high: float
    quartile_low: float
    quartile_high: float
    repeats: int
    unit: str
    units: float
    """What one call works through: so many of these."""
    units_per_second: float
    operations: float
    n_bytes: float
    limit_seconds: float
    """What the machine's measured rates allow for these operations and bytes."""
    limit_share: float
    """limit_seconds over seconds."""
    agreement: float
    """The largest difference between what both computed."""
    tolerance: float
    agreement_of: str
    note: str
    baseline_bpb: float
    bpb: float
    """Bits per byte, where text was scored by two ways that differ; else nan."""

    @property
    def agrees(self) -> bool:
        return self.agreement <= self.tolerance


@dataclass(frozen=True)
class Costs:
    """Of one call of hedgemix's side."""

    unit: str
    units: float
    operations: float
    n_bytes: float
    dtype: str = "float32"


@dataclass(frozen=True)
class Agreement:
    of: str
    difference: float
    tolerance: float


@dataclass
class Bench:
    """Text, trained models and limits that stages share; each is made once."""

    device: torch.device
    sizes: Sizes
    limits: Limits
    folder: Path
    """Text is kept here from run to run."""
    log: Callable[[str], None] = print
    models: dict[str, Model] = field(default_factory=dict)

    def row(
        self,
        labels: tuple[str, str, str, str],
        compared: Comparison,
        costs: Costs,
        agreement: Agreement,
        note: str = "",
        bits: tuple[float, float] = (float("nan"), float("nan")),
    ) -> Row:
        """labels: stage, what, size, baseline."""
        limit = self.limits.seconds(costs.operations, costs.n_bytes, costs.dtype)
        return Row(
            *labels, compared.a_seconds, compared.b_seconds, compared.ratio, *compared.ratio_range,
            *compared.a_quartiles, *compared.b_quartiles, compared.repeats, costs.unit, costs.units,
            costs.units / compared.b_seconds, costs.operations, costs.n_bytes, limit, limit / compared.b_seconds,
            agreement.difference, agreement.tolerance, agreement.of, note, *bits,
        )  # fmt: skip

    def text(self, recipe: Recipe) -> Dataset:
        folder = self.folder / f"text-{config_hash(recipe.data)}"
        if not (folder / dataset.FILE_NAME).exists():
            folder.mkdir(parents=True, exist_ok=True)
            dataset.save(dataset.prepare(recipe.data, folder, self.log), folder)
        return dataset.load(folder)

    def valid_tokens(self, recipe: Recipe) -> Tensor:
        stream = dataset.valid_stream(self.text(recipe))
        return torch.from_numpy(stream.read(0, len(stream)).astype(np.int64)).to(self.device)

    def token_bytes(self, recipe: Recipe, tokens_N: Tensor) -> int:
        """Bytes of text of all tokens but the first."""
        tables = bpb.byte_tables(tokenizer.load(self.text(recipe).tokenizer))
        return bpb.count_bytes(tables, tokens_N.cpu().numpy())

    def batches(self, recipe: Recipe) -> Batches:
        train = recipe.train
        stream = dataset.train_stream(self.text(recipe))
        return Batches(stream, train.sequence_tokens, train.batch_tokens // train.sequence_tokens, seed=1)

    def fresh(self, recipe: Recipe) -> Model:
        torch.manual_seed(1)
        return Model(recipe.model, recipe.data.vocab_size, recipe.train.sequence_tokens).to(self.device)

    def trained(self, recipe: Recipe, steps: int) -> Model:
        """A model after so many steps of the recipe, its rates falling to zero as in a whole run."""
        key = config_hash(recipe.data, recipe.model, recipe.train, steps)
        if key not in self.models:
            model = self.fresh(recipe)
            run = Run(model, recipe.train, self.batches(recipe), self.device)
            for step in range(steps):
                run.train_step(step / steps)
            run.ema.swap()
            self.models[key] = model.eval().requires_grad_(False)
        return self.models[key]
