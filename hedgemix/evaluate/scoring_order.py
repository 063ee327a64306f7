"""In which order and with which context tokens are scored, each exactly once.

Shapes: N tokens of the text, W context tokens, V vocabulary. Target t (1 <= t < N) is predicted from tokens before t;
token 0 is given. Both orders cut a chunk of targets into pieces that do not depend on the number of ranks; rank r
computes pieces r, r + world, …, and every rank receives all rows in order.

- streaming: one pass with banded attention over segments, each behind an overlap of earlier tokens that is run again;
  one forward position a token (plus the overlap).
- sliding: windows of W tokens, each scoring its last `stride_tokens`; the text's first W targets are one window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hedgemix.config import EvaluateConfig
from hedgemix.data.device_text import Text
from hedgemix.model.layers import autocast
from hedgemix.model.transformer import Model
from hedgemix.runtime import collectives

FEATURES = "features"


@dataclass(frozen=True)
class Piece:
    """Targets start .. stop - 1, computed in one forward pass."""

    start: int
    stop: int


def cut(start: int, stop: int, size: int) -> list[Piece]:
    """start .. stop - 1 in pieces that end at multiples of `size`."""
    edges = [start, *range((start // size + 1) * size, stop, size), stop]
    return [Piece(*pair) for pair in itertools.pairwise(edges)] if stop > start else []


def chunks(n_tokens: int, chunk_tokens: int) -> list[Piece]:
    """Cut the targets 1 .. n_tokens - 1 in chunks that end at multiples of `chunk_tokens`."""
    return cut(1, n_tokens, chunk_tokens)


def pieces(chunk: Piece, config: EvaluateConfig) -> list[Piece]:
    """Cut the chunk's targets, in order, into the pieces that one forward pass scores."""
    if config.order == "streaming":
        return cut(chunk.start, chunk.stop, config.segment_tokens)
    full = min(max(chunk.start, config.window_tokens + 1), chunk.stop)  # from here on windows are full
    beginning = [Piece(chunk.start, full)] if full > chunk.start else []
    size = config.stride_tokens * config.batch_windows
    return beginning + [Piece(at, min(at + size, chunk.stop)) for at in range(full, chunk.stop, size)]


def contexts(piece: Piece, config: EvaluateConfig) -> list[tuple[int, Piece]]:
    """Cut the same piece for a model that runs one token at a time: targets, and the first token their context may use.

    Until the targets' end the context only grows; within it, in streaming order, a layer sees `window_tokens`.
    """
    window, stride = config.window_tokens, config.stride_tokens
    if config.order == "streaming":
        return [(max(0, piece.start - 1 - config.overlap_tokens), piece)]
    if piece.start <= window:
        return [(max(0, piece.stop - 1 - window), piece)]
    starts = range(piece.start, piece.stop, stride)
    windows = [Piece(start, min(start + stride, piece.stop)) for start in starts]
    return [(targets.stop - 1 - window, targets) for targets in windows]


@torch.inference_mode()
def piece_features(model: Model, tokens_N: Tensor | Text, piece: Piece, config: EvaluateConfig) -> Tensor:
    """Compute the model's final features, (piece.stop - piece.start, D), from which the piece's targets are predicted.

    `tokens_N`: the text, whose slices are int64 on the model's device; nothing from piece.stop - 1 on is read.
    """
    count, window = piece.stop - piece.start, config.window_tokens
    with autocast(config.dtype, tokens_N.device):
        if config.order == "streaming":
            begin = max(0, piece.start - 1 - config.overlap_tokens)
            return model.features(tokens_N[begin : piece.stop - 1][None], band=window, last=count)[0]
        if piece.start <= window:  # the text's beginning, while the window is not yet full
            begin = max(0, piece.stop - 1 - window)
            return model.features(tokens_N[begin : piece.stop - 1][None], last=count)[0]
        stride = config.stride_tokens
        full, rest = divmod(count, stride)
        parts = []
        if full:
            # Overlapping windows of one stretch of the text: a view, no gather.
            begin = piece.start + stride - 1 - window
            windows = tokens_N[begin : begin + (full - 1) * stride + window].unfold(0, window, stride)
            parts.append(model.features(windows, last=stride).flatten(0, 1))
        if rest:  # the last window scores fewer, and ends with them
            parts.append(model.features(tokens_N[piece.stop - 1 - window : piece.stop - 1][None], last=rest)[0])
        return torch.cat(parts)


@torch.inference_mode()
def feature_rows(model: Model, features_BD: Tensor, config: EvaluateConfig) -> Tensor:
    """Compute log-probabilities in nats, float32 (B, V), of what comes after features (B, D)."""
    with autocast(config.dtype, features_BD.device):
        return torch.log_softmax(model.logits(features_BD), dim=-1)


def piece_rows(model: Model, tokens_N: Tensor | Text, piece: Piece, config: EvaluateConfig) -> Tensor:
    """Compute log-probabilities in nats, float32 (piece.stop - piece.start, V), of the piece's targets; as
    `piece_features`."""
    return feature_rows(model, piece_features(model, tokens_N, piece, config), config)


def chunk_rows(
    models: dict[str, Model], tokens_N: Tensor | Text, chunk: Piece, config: EvaluateConfig, features_of: str = ""
) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
    """Yield every piece of the chunk in order with each model's rows, on every rank; with features_of, one of the
    models' names, also that one's features (B, D), float32, as FEATURES."""
    todo, world = pieces(chunk, config), collectives.world_size()
    largest = max((piece.stop - piece.start for piece in todo), default=0)
    for first in range(0, len(todo), world):
        together = todo[first : first + world]
        mine = together[collectives.rank()] if collectives.rank() < len(together) else None
        gathered: dict[str, list[Tensor]] = {}
        for name, model in models.items():
            features = piece_features(model, tokens_N, mine, config) if mine else None
            rows = feature_rows(model, features, config) if features is not None else None
            gathered[name] = gather_rows(rows, largest, model.vocab_size, tokens_N.device)
            if name == features_of:
                features = features.float() if features is not None else None
                gathered[FEATURES] = gather_rows(features, largest, model.config.width, tokens_N.device)
        for index, piece in enumerate(together):
            count = piece.stop - piece.start
            yield piece, {name: parts[index][:count] for name, parts in gathered.items()}


def gather_rows(rows: Tensor | None, largest: int, width: int, device: torch.device) -> list[Tensor]:
    """Gather the rows (B, V) of every rank, in the order of ranks, padded to `largest`."""
    if not collectives.active():
        assert rows is not None
        return [rows]
    padded = torch.zeros(largest, width, device=device)
    if rows is not None:
        padded[: len(rows)] = rows
    return collectives.gather(padded)
