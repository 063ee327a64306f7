"""How much of the validation text occurs word for word in the training text: drawn windows of 64 tokens, by hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hedgemix.data import overlap
from hedgemix.data.shards import TokenStream

WINDOW = 64


@dataclass(frozen=True)
class Windows:
    """Holds windows (W, 64) of validation tokens, uint16, and the shard that each was drawn from (W,)."""

    tokens: np.ndarray
    shard: np.ndarray


def draw(shards: Sequence[np.ndarray], count: int, seed: int) -> Windows:
    """Draw `count` windows of each shard, evenly spread with a drawn start; of a shorter shard all there are."""
    generator = np.random.default_rng(seed)
    tokens: list[np.ndarray] = []
    origin: list[int] = []
    for number, shard in enumerate(shards):
        places = len(shard) - WINDOW + 1
        if places < 1:
            continue
        starts = np.unique((np.arange(count) + generator.random(count)) * places / count).astype(np.int64)
        tokens += [np.asarray(shard[start : start + WINDOW], np.uint16) for start in np.unique(starts)]
        origin += [number] * (len(tokens) - len(origin))
    return Windows(np.array(tokens, np.uint16).reshape(-1, WINDOW), np.array(origin, np.int64))


def occurring(windows: Windows, shards: Sequence[np.ndarray]) -> np.ndarray:
    """Find which windows occur in one of the training shards (uint16 arrays, mapped files too): bool (W,)."""
    starts = np.arange(len(windows.tokens)) * WINDOW
    hashes = overlap.window_hashes(windows.tokens.ravel(), starts, starts + WINDOW)
    drawn = overlap.Windows([hashes])
    return np.isin(hashes, drawn.hashes[overlap.seen_in_tokens(drawn, TokenStream(shards), WINDOW)])
