"""Training and evaluation beside the plain ones; each stage takes a `Bench` and yields rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain.evaluation import sliding_nats
from benchmarks.plain.training import PlainRun
from benchmarks.suite.setup import Agreement, Bench, Costs, Row
from benchmarks.suite.timing import compare
from hedgemix.config import EvaluateConfig, Recipe
from hedgemix.evaluate.scoring_order import Piece, chunk_rows
from hedgemix.experts import ngram_index
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.mixers.online_mixer import OnlineMixer
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.train.trainer import Run
from pipeline.forecast import operations

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}
"""Of nats of one token, computed in another order."""
CLOSE_BITS = 0.05
"""Bits per byte by which streaming and sliding may differ: contexts differ, and so do the bits, a little."""


def training(bench: Bench) -> Iterator[Row]:
    """Steps of the recipe's batch from the same weights; the losses of both are compared step by step."""
    recipe = bench.sizes.short
    config = recipe.train
    runs: list[PlainRun | Run] = [
        kind(bench.fresh(recipe), config, bench.batches(recipe), bench.device) for kind in (PlainRun, Run)
    ]
    losses: list[list[float | Tensor]] = [[], []]
    steps = 4

    def work(side: int) -> None:
        for _ in range(steps):
            losses[side].append(runs[side].train_step(0.1))

    compared = compare(partial(work, 0), partial(work, 1), bench.sizes.repeats)
    pairs = zip(*([float(loss) for loss in side] for side in losses), strict=True)
    parameters = parameter_count(runs[1].model)
    muon = operations.muon_operations(operations.matrix_shapes(recipe.model), config.newton_schulz_steps)
    per_step = operations.train_operations(recipe.model, config, recipe.data.vocab_size) + muon
    yield bench.row(
        ("training", f"{steps} steps", f"{parameters:,} parameters, {config.batch_tokens:,} tokens", "plain step"),
        compared,
        Costs("tokens", steps * config.batch_tokens, steps * per_step, steps * operations.step_bytes(parameters),
              config.dtype),
        Agreement("nats, each step's loss", max(abs(a - b) for a, b in pairs), 20 * TOLERANCE[config.dtype]),
    )  # fmt: skip


def sliding(bench: Bench) -> Iterator[Row]:
    """Windows, both ways; every target's nats are compared."""
    for recipe, model, slice_N, n in subjects(bench):
        config = replace(recipe.evaluate, order="sliding", chunk_tokens=len(slice_N))
        compared = compare(
            partial(plain_sliding, model, slice_N, config),
            partial(scored, model, slice_N, Piece(1, len(slice_N)), config),
            bench.sizes.heavy_repeats,
        )
        window, stride = config.window_tokens, config.stride_tokens
        spent = operations.sliding_operations(recipe.model, model.vocab_size, n + stride, window, stride)
        yield bench.row(
            ("sliding", f"{window}/{stride}", f"{n // stride} windows after the first", "plain sliding"),
            compared,
            Costs("tokens", n + stride, spent, 8 * n * model.vocab_size, config.dtype),
            Agreement("nats of a target", difference(*compared.results), TOLERANCE[config.dtype]),
        )


def streaming(bench: Bench) -> Iterator[Row]:
    """One pass beside plain sliding, for the same number of tokens, and the bits of both for the same text."""
    for recipe, model, slice_N, n in subjects(bench):
        tokens_N, config = bench.valid_tokens(recipe), replace(recipe.evaluate, order="streaming")
        piece = first_piece(config)
        compared = compare(
            partial(plain_sliding, model, slice_N, config),
            partial(scored, model, tokens_N, piece, config),
            bench.sizes.heavy_repeats,
        )
        window, stride, segment = config.window_tokens, config.stride_tokens, piece.stop - piece.start
        text_bytes = bench.token_bytes(recipe, slice_N[window:])
        bits = [float(nats.double().sum()) / math.log(2) / text_bytes
                for nats in (compared.results[0][-n:], compared.results[1][:n])]  # fmt: skip
        spent = operations.streaming_operations(
            recipe.model, model.vocab_size, segment, window, segment, config.overlap_tokens
        )
        yield bench.row(
            ("streaming", f"context {window}", f"{segment:,} tokens behind {config.overlap_tokens:,}",
             f"plain sliding {window}/{stride}"),
            compared.scaled(segment / (n + stride)),
            Costs("tokens", segment, spent, 8 * segment * model.vocab_size, config.dtype),
            Agreement("bits per byte", abs(bits[0] - bits[1]), CLOSE_BITS),
            note=f"baseline scaled from {n + stride:,} tokens; bits of the same {n:,}",
            bits=(bits[0], bits[1]),
        )  # fmt: skip


def mixing(bench: Bench) -> Iterator[Row]:
    """All mixtures of one row set beside the evaluation of as many tokens, and beside the decoder's own mixing."""
    recipe, count = bench.sizes.short, bench.sizes.mixed_tokens
    model = bench.trained(recipe, bench.sizes.train_steps)
    tokens_N = bench.valid_tokens(recipe)[: count + 1]
    config, vocab_size = replace(recipe.evaluate, order="streaming"), model.vocab_size
    all_targets = Piece(1, len(tokens_N))
    rows = torch.cat([found["model"] for _, found in chunk_rows({"model": model}, tokens_N, all_targets, config)])
    mixer, text = config.mixer, tokens_N.cpu().numpy().astype(np.uint16)
    index = ngram_index.build(text, mixer.orders, vocab_size, mixer.match_lengths)
    nats_N = -rows.gather(1, tokens_N[1:, None])[:, 0]

    def mixed(stop: int) -> dict[str, Tensor]:
        mixer_now = BatchMixer(mixer, vocab_size, index, bench.device)
        return mixer_now.score({"neural": rows[: stop - 1]}, 1, stop).nll["neural"]

    def told(stop: int) -> Tensor:
        one_by_one, nats = OnlineMixer(mixer, vocab_size, text[:1]), []
        cpu_rows = rows[: stop - 1].cpu()
        for at in range(1, stop):
            nats.append(-torch.from_numpy(one_by_one.predict(cpu_rows[at - 1]))[int(text[at])])
            one_by_one.update(int(text[at]), ends_block=(at + 1) % mixer.block_tokens == 0)
        return torch.stack(nats)

    costs = operations.mixing_costs(vocab_size, mixer)

    def spent(tokens: int) -> Costs:
        return Costs("tokens", tokens, costs[0] * tokens, costs[1] * tokens)

    _, _, slice_N, n = next(subjects(bench))
    window, stride = config.window_tokens, config.stride_tokens
    windows = replace(config, order="sliding", chunk_tokens=len(slice_N))
    evaluations = [
        (f"hedgemix sliding {window}/{stride}", partial(scored, model, slice_N, Piece(1, len(slice_N)), windows),
         count / (n + stride)),
        ("hedgemix streaming", partial(scored, model, tokens_N, all_targets, config), 1.0),
        *large_evaluations(bench, tokens_N),
    ]  # fmt: skip
    for name, evaluation, factor in evaluations:
        compared = compare(evaluation, partial(mixed, len(tokens_N)), bench.sizes.heavy_repeats).scaled(factor)
        share = compared.b_seconds / (compared.a_seconds + compared.b_seconds)
        yield bench.row(
            ("mixing", "all mixtures of one row set", f"{count:,} tokens", name),
            compared,
            spent(count),
            Agreement("nats of a target, neural", difference(nats_N, compared.results[1]["neural"]), 1e-3),
            note=f"mixing is {share:.0%} of evaluation and mixing",
        )
    few = min(bench.sizes.told_tokens, count)
    if bench.device.type == "cpu" and mixer.kind == "ensemble":
        compared = compare(partial(told, few + 1), partial(mixed, few + 1), bench.sizes.heavy_repeats)
        apart = difference(compared.results[0], compared.results[1]["ensemble"])
        yield bench.row(
            ("mixing", "all mixtures of one row set", f"{few:,} tokens", "the decoder's, one token at a time"),
            compared,
            spent(few),
            Agreement("nats of a target, ensemble", apart, 1e-3),
        )


def subjects(bench: Bench) -> Iterator[tuple[Recipe, Model, Tensor, int]]:
    """Of both contexts: recipe, trained model, a slice of the held-out text whose first window's worth of targets is
    followed by n more, and n."""
    sizes = bench.sizes
    for recipe, steps, windows in (
        (sizes.short, sizes.train_steps, sizes.windows),
        (sizes.long, sizes.long_steps, sizes.long_windows),
    ):
        config = recipe.evaluate
        n, start = windows * config.stride_tokens, first_piece(config).start
        tokens_N = bench.valid_tokens(recipe)
        n = min(n, first_piece(config).stop - start)
        assert first_piece(config).stop <= len(tokens_N), "the held-out text is too short for these sizes"
        yield recipe, bench.trained(recipe, steps), tokens_N[start - 1 - config.window_tokens : start + n], n


def large_evaluations(bench: Bench, tokens_N: Tensor) -> Iterator[tuple[str, Callable[[], Tensor], float]]:
    """Scoring with a model of recipe record's size, untrained: by name, with the factor to all of the tokens."""
    config, vocab_size = bench.sizes.long.evaluate, bench.sizes.long.data.vocab_size
    model = Model(bench.sizes.export, vocab_size, bench.sizes.long.train.sequence_tokens).to(bench.device)
    name, count, window = f"{parameter_count(model) / 1e6:.1f} M parameters", len(tokens_N) - 1, config.window_tokens
    stop = min(window + 1 + 2 * config.stride_tokens, count + 1)
    windows, two = replace(config, order="sliding"), Piece(window + 1, stop)
    factor = count / (stop - window - 1)
    yield f"sliding {window}/{config.stride_tokens}, {name}", partial(scored, model, tokens_N, two, windows), factor
    one = replace(config, order="streaming", segment_tokens=count + 1)
    yield f"streaming {window}, {name}", partial(scored, model, tokens_N, Piece(1, count + 1), one), 1.0


def first_piece(config: EvaluateConfig) -> Piece:
    """The first segment with a full overlap in front."""
    segment = config.segment_tokens
    number = -(-(config.overlap_tokens + 1) // segment)
    return Piece(number * segment, (number + 1) * segment)


def scored(model: Model, tokens_N: Tensor, chunk: Piece, config: EvaluateConfig) -> Tensor:
    """Nats of each of the chunk's targets."""
    nats = []
    for piece, rows in chunk_rows({"model": model}, tokens_N, chunk, config):
        targets = tokens_N[piece.start : piece.stop]
        nats.append(-rows["model"].gather(1, targets[:, None])[:, 0])
    return torch.cat(nats)


def plain_sliding(model: Model, tokens_N: Tensor, config: EvaluateConfig) -> Tensor:
    with torch.autocast(tokens_N.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return sliding_nats(model, tokens_N, config.window_tokens, config.stride_tokens, config.batch_windows)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
