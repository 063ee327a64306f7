"""An artifact small enough to be scored in a test, and the text to score it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.config import CacheConfig, EvaluateConfig, MixerConfig, ModelConfig, QuantizeConfig, TTTConfig
from hedgemix.data import memory, tokenizer
from hedgemix.data.shards import TokenStream
from hedgemix.evaluate.evaluator import EvaluateResult, Evaluation, evaluate_artifact
from hedgemix.experts import ngram_index
from hedgemix.model.transformer import Model
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.quantizer import quantize_model
from support import text_data
from support.text_data import documents

CPU, CONTEXT = torch.device("cpu"), 64
CONFIG = EvaluateConfig(
    window_tokens=32, stride_tokens=8, segment_tokens=96, overlap_tokens=64, batch_windows=7, chunk_tokens=320,
    dtype="float32",
    ttt=TTTConfig(
        kind="weights",
        rate=3e-3,
        epochs=2,
        batch_sequences=3,
        sequence_tokens=32,
        last_blocks=1,
        polyak=0.9,
        byte_weighted=True,
        cosine=True,
        ramp=3.0,
    ),
    cache=CacheConfig(enabled=False),
    mixer=MixerConfig(orders=(1, 2, 3), match_lengths=(4, 8), block_tokens=32),
)  # fmt: skip
ADAPTIVE = replace(CONFIG, cache=CacheConfig(memory_tokens=300), ttt=TTTConfig(kind="head"))
"""With the experts over features, in place of trained weights."""
CACHE_OVER_TRAINED = replace(CONFIG, cache=CacheConfig(memory_tokens=300))
MODEL = ModelConfig(
    layers=2, width=32, heads=2, kv_heads=1, mlp_hidden=64, rope_dims=8, bigram_buckets=256, bigram_width=16,
    value_embedding_layers=1, value_embedding_width=16,
)  # fmt: skip

WITHIN_DOCUMENTS = replace(MODEL, within_documents=True)


@dataclass(frozen=True)
class Case:
    """A folder with an artifact, and a text whose n-grams are counted in the folder."""

    folder: Path
    text: bytes
    tokens: np.ndarray

    @property
    def artifact(self) -> Path:
        return self.folder / "model.hmx"

    def model(self) -> Model:
        return load_model(artifact.read(self.artifact))

    def score(self, config: EvaluateConfig = CONFIG, **options: Any) -> EvaluateResult:
        stream, counts = TokenStream([self.tokens]), self.folder / "counts"
        return evaluate_artifact(self.artifact, stream, counts, config, CPU, **options)

    def begin(self, config: EvaluateConfig = CONFIG, tokens: np.ndarray | None = None) -> Evaluation:
        """What `score` begins with, also for other tokens."""
        tokens = self.tokens if tokens is None else tokens
        return Evaluation.begin(artifact.read(self.artifact), tokens, config, CPU)


def untrained(config: ModelConfig = MODEL) -> tuple[Model, Moments]:
    """Random weights, and the moments of inputs that have nothing to do with each other."""
    torch.manual_seed(0)
    model = Model(config, text_data.processor().vocab_size(), CONTEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    columns = {name: torch.eye(each.shape[1]) for name, each in model.named_parameters() if each.dim() == 2}
    return model, Moments(columns, {name: torch.ones(len(model.get_parameter(name))) for name in columns})


def make(
    folder: Path,
    remembered: Sequence[str] = (),
    texts: int = 4,
    markers: bool = False,
    config: ModelConfig = MODEL,
    **made_of: Any,
) -> Case:
    """A model with random weights, quantized and written, with a memory of some documents; `texts` other documents,
    about 1,400 tokens of four and 950 of three. made_of: what the header says besides."""
    processor = text_data.marked_processor if markers else text_data.processor
    model, moments = untrained(config)
    tensors, _ = quantize_model(model, moments, QuantizeConfig(loss_nats=1.0), 10**9, lambda _: 0)
    header = {"model": asdict(config), "vocab_size": model.vocab_size, "context_tokens": CONTEXT, **made_of}
    packed = memory.compress(remembered) if remembered else None
    artifact.write(folder / "model.hmx", header, processor().serialized_model_proto(), tensors, 3, packed)
    read = ["Größe \u2581 \U0001f600\n" + text[:800] for text in documents()[10 : 10 + texts]]
    tokens = np.concatenate(tokenizer.encode_batch(processor(), read))
    mixer = CONFIG.mixer
    memory_M = memory.tokens(processor(), remembered)
    counts = folder / "counts"
    ngram_index.build(tokens, mixer.orders, model.vocab_size, mixer.match_lengths, counts, memory_M=memory_M)
    return Case(folder, "".join(read).encode(), tokens)
