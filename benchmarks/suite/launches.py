"""Array operations of a piece of an evaluation, counted by tracing it: what `pipeline.forecast.gpu_plan` multiplies by
the seconds from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hedgemix.config import EvaluateConfig, ModelConfig
from hedgemix.data.bpb import ByteTables
from hedgemix.data.device_text import Text
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.experts import feature_experts, neural_cache, ngram_index
from hedgemix.mixers import published
from hedgemix.mixers.batch_mixer import SPAN_TOKENS, BatchMixer, Scores
from hedgemix.model.transformer import Model
from pipeline.forecast.gpu_plan import Launches, row_set_names

FREE = torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default
"""Array operations that start nothing on a device, beside those that torch calls views."""


class Counter(TorchDispatchMode):
    """Counts the array operations inside it that do work: views are free, and so is memory that is not filled."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func in FREE)
        return func(*args, **(kwargs or {}))


class Graphs:
    """In the place of CUDA graphs where there are none: what would be replayed is run, and counted."""

    def __init__(self) -> None:
        self.replays = self.operations = 0

    def record(self, work: Callable[[], object], device: torch.device) -> Callable[[], object]:
        def replay() -> None:
            self.replays += 1
            self.operations += counted(work)

        return replay


def count_launches(config: EvaluateConfig, vocab_size: int) -> Launches:
    """Of one piece of an evaluation, counted on a CPU on random tokens, as a GPU would work: with a
    resident index, and what is in graphs apart. They are the same for any vocabulary."""
    size = config.segment_tokens
    tokens = np.random.default_rng(0).integers(0, vocab_size, 3 * size).astype(np.uint16)
    index = ngram_index.build(tokens, config.mixer.orders, vocab_size, config.mixer.match_lengths)
    said = {name: torch.rand(size, vocab_size).softmax(1) for name in feature_experts.names(config)}
    asked, replayed = count_mixing(
        config, index, said | {name: torch.randn(size, vocab_size) for name in row_set_names(config)}
    )
    rows = {name: torch.randn(size, vocab_size) for name in ("frozen", "adapted")}
    tables = ByteTables(
        np.ones(vocab_size, np.int16), *np.ones((2, vocab_size), bool), *np.zeros((2, vocab_size), bool)
    )
    shape = ModelConfig(
        layers=1, width=64, heads=1, kv_heads=1, mlp_hidden=64, bigram_buckets=0, value_embedding_layers=0
    )
    model = Model(shape, vocab_size, 64, draw=False)
    trained = replace(config.ttt, enabled=True, kind="weights")
    settings = replace(config, ttt=trained, cache=replace(config.cache, enabled=False))
    work = Evaluation(model, Text(tokens, torch.device("cpu")), tables, index, settings)
    work.published.counted = size**2  # long past its beginning, when it has nothing to do
    published.open_chunk(work.published, config.chunk_tokens)
    mixing = 0

    def score(*args: Any) -> Scores:
        nonlocal mixing
        with Counter() as counter:
            scores = mix(*args)
        mixing = counter.count
        return scores

    mix, work.mixer.score = work.mixer.score, score  # type: ignore[method-assign]
    first = {name: of[1:] for name, of in rows.items()}
    rule = counted(lambda: work.score(Piece(1, size), first)) - mixing
    return Launches(asked, replayed, rule, *count_adapting(config, vocab_size))


def count_adapting(config: EvaluateConfig, vocab_size: int) -> tuple[int, int]:
    """Of a piece that is no text's first, for the experts over features in a GPU's blocks: operations that the host
    asks for, and those in graphs."""
    size, width, graphs = config.segment_tokens, 16, Graphs()
    with patch.dict(neural_cache.BLOCK_TOKENS, cpu=neural_cache.BLOCK_TOKENS["cuda"]):
        experts = feature_experts.FeatureExperts(config, vocab_size, width)
    given = torch.randn(size, vocab_size), torch.randn(size, width), torch.zeros(size, dtype=torch.int64)
    if not experts.names:
        return 0, 0
    if experts.head:
        experts.head.record = graphs.record
    experts.rows(*(each[1:] for each in given))
    experts.rows(*given)
    if experts.head and experts.head.span:
        experts.head.span[2].unchecked = 0
    graphs.replays = graphs.operations = 0
    total = counted(lambda: experts.rows(*given))
    return total - graphs.operations + graphs.replays, graphs.operations


def count_mixing(config: EvaluateConfig, index: ngram_index.NgramIndex, rows: dict[str, Tensor]) -> tuple[int, int]:
    """Of a piece that is no text's first: operations that the host asks for, and those in graphs."""
    size, graphs = config.segment_tokens, Graphs()
    span = min(SPAN_TOKENS["cuda"], size)
    names, given = row_set_names(config), feature_experts.names(config)
    options: dict[str, Any] = {"names": names, "given": given, "plain": names[:1], "resident": True}
    mixer = BatchMixer(config.mixer, index.vocab_size, index, span_tokens=span, **options)
    for sets in mixer.sets:
        sets.record = graphs.record
    mixer.score({name: of[1:] for name, of in rows.items()}, 1, size)
    mixer.score(rows, size, 2 * size)
    for sets in mixer.sets:
        assert sets.spans is not None and sets.call is not None, "pieces are no whole spans: nothing is replayed"
        sets.spans.unchecked = sets.call[2].unchecked = 0
    graphs.replays = graphs.operations = 0
    total = counted(lambda: mixer.score(rows, 2 * size, 3 * size))
    return total - graphs.operations + graphs.replays, graphs.operations


def counted(work: Callable[[], Any]) -> int:
    with Counter() as counter:
        work()
    return counter.count
