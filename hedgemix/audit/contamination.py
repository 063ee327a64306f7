"""How much of the validation text occurs word for word in the training text, by hash: drawn windows of 64 tokens of
every shard, and all windows of 16 tokens of every document of the text that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hedgemix.data import overlap
from hedgemix.data.shards import TokenStream

WINDOW = 64
SHORT_WINDOW = 16
MOST_TOKENS = 1 << 22
"""Of the text whose documents are looked at: its beginning, where there are more."""


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


def by_document(tokens_N: np.ndarray, is_control_V: np.ndarray, train: TokenStream) -> tuple[np.ndarray, np.ndarray]:
    """Find each token's document (N,), which a control token begins (as in `evaluate.breakdown`), and each document's
    share of windows of 16 tokens that occur in the training text (D,), NaN where it is shorter."""
    document_N = np.cumsum(is_control_V[tokens_N])
    starts = np.arange(max(len(tokens_N) - SHORT_WINDOW + 1, 0))
    starts = starts[document_N[starts] == document_N[starts + SHORT_WINDOW - 1]]
    hashes = overlap.window_hashes(tokens_N.astype(np.uint16), starts, starts + SHORT_WINDOW)
    drawn = overlap.Windows([hashes])
    seen = overlap.seen_in_tokens(drawn, train, SHORT_WINDOW)[np.searchsorted(drawn.hashes, hashes)]
    windows_D = np.bincount(document_N[starts], minlength=document_N[-1] + 1)
    seen_D = np.bincount(document_N[starts], seen, minlength=document_N[-1] + 1)
    return document_N, np.where(windows_D > 0, seen_D / np.maximum(windows_D, 1), np.nan)
