"""How much of the validation text occurs word for word in the training text, at the speed of reading it.

A window of 64 validation tokens occurs at training position q whatever q is modulo 4: so the training tokens are read
as 64-bit words of four, once, and looked up among the words that start at the window's offsets 0 to 3. A table of 2^20
bits passes one word in a thousand; the others are compared in full. 100 M tokens take about a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 64
PIECE_TOKENS = 1 << 22
_BITS = 20
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


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
    count = len(windows.tokens)
    occurs = np.zeros(count, bool)
    if not count:
        return occurs
    words = np.concatenate([_words(windows.tokens[:, offset : offset + 4]) for offset in range(4)])
    order = np.argsort(words, kind="stable")
    words, window, offset = words[order], order % count, order // count
    likely = np.zeros(1 << _BITS, bool)
    likely[_slot(words)] = True
    for shard in shards:
        for start in range(0, len(shard) - WINDOW + 1, PIECE_TOKENS):
            piece = np.array(shard[start : start + PIECE_TOKENS + WINDOW])
            here = _words(piece[: len(piece) // 4 * 4].reshape(-1, 4))
            maybe = np.flatnonzero(likely[_slot(here)])
            low = np.searchsorted(words, here[maybe])
            times = np.searchsorted(words, here[maybe], "right") - low  # entries with the same word
            at = np.repeat(maybe, times)
            entry = np.repeat(low - np.cumsum(times) + times, times) + np.arange(len(at))
            begin = 4 * at - offset[entry]
            fits = (begin >= 0) & (begin + WINDOW <= len(piece)) & ~occurs[window[entry]]
            for chosen in np.array_split(np.flatnonzero(fits), max(1, fits.sum() // 100_000)):
                text = piece[begin[chosen, None] + np.arange(WINDOW)]
                occurs[window[entry[chosen]][(text == windows.tokens[window[entry[chosen]]]).all(1)]] = True
    return occurs


def _words(tokens_S4: np.ndarray) -> np.ndarray:
    """Rows of four tokens as one 64-bit word each."""
    return np.ascontiguousarray(tokens_S4, np.uint16).view(np.uint64)[:, 0]


def _slot(words: np.ndarray) -> np.ndarray:
    return (words * _SPREAD) >> np.uint64(64 - _BITS)
