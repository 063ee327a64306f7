"""Integers whose widths are known, as symbols and tables for `rans`: the model behind quantized weights.

A width is a logarithmic standard deviation in eighths of an octave: an integer of width w is about Gaussian with
deviation 2^(w/8). Each width from 1/16 to 16 has a table of its own; above that the low bits, which are then uniform,
are split off, and the rest has a width in the top octave. A table begins as a discretised Gaussian (1 in 64 of it four
times as wide) that counts as 256 symbols, and follows what was coded under it: tables change after 4096, 8192,
16384, ... integers. So no table is transmitted; a few thousand weights are coded about as well as a Gaussian can, and
millions as well as by their own histograms.

The symbol of an integer is q + 127 (after the split), or ESCAPE where that is outside 0..254 or has no frequency;
escaped integers follow the others in Elias's gamma code (1975). Everything that decides a table or a context is
integer arithmetic, so the bytes mean the same on every machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hedgemix.rans import SLOTS, Decoder, Ints, Run

Bits = NDArray[np.float64]

NARROWEST, WIDEST_TABLE, WIDEST = -32, 32, 200
"""Widths lie between NARROWEST and WIDEST; above WIDEST_TABLE low bits are split off."""
TABLES = WIDEST_TABLE - NARROWEST + 1
CENTRE = 127
ESCAPE = 255
LARGEST = 1 << 24
"""Integers from -LARGEST to LARGEST can be coded."""
SAMPLES = 8
"""Points in each integer's cell at which the Gaussian is summed."""
PRIOR_BITS, COUNT_BITS = 16, 8
"""A table begins with a mass of 2^16, and each symbol coded adds 2^8."""
WIDE_SHARE, WIDE_EIGHTHS = 64, 16
FIRST_CHUNK = 4096
PIECE_BITS = 8
LENGTH_BITS = 5


@functools.cache
def prior() -> NDArray[np.int64]:
    """(TABLES, 256) masses, each row summing to 2^16: where every table begins."""
    points = 2 * np.arange((CENTRE + 1) * SAMPLES) + 1 - SAMPLES
    masses = np.zeros((TABLES, 256), np.int64)
    for row in range(TABLES):
        widths = row + NARROWEST, row + NARROWEST + WIDE_EIGHTHS
        cells = [_density(points, width).reshape(-1, SAMPLES).sum(1) for width in widths]
        narrow, wide = ((cell << 20) // (2 * cell.sum() - cell[0]) for cell in cells)
        mixed = ((WIDE_SHARE - 1) * narrow + wide) // WIDE_SHARE >> 20 - PRIOR_BITS
        masses[row, CENTRE : 2 * CENTRE + 1] = mixed
        masses[row, : CENTRE + 1] = mixed[::-1]
        masses[row, ESCAPE] = 1
        masses[row, CENTRE] += (1 << PRIOR_BITS) - masses[row].sum()
    return masses


def _density(points: Ints, width: int) -> NDArray[np.int64]:
    """2^30 * exp(-x^2 / (2 * 4^(width/8))) at x = points / (2 * SAMPLES), without a float."""
    octaves = _root(240 - width, 2)  # 2^(60 - width/4)
    factor = 7213475204 * octaves // 10**10 >> 30  # 1 / (2 ln 2) = 0.7213475204
    exponents = np.minimum(points**2 * factor >> 30, 40 << 8)  # to base 2, in units of 2^-8
    return _powers()[exponents & 255] >> (exponents >> 8)


@functools.cache
def _powers() -> NDArray[np.int64]:
    """2^(30 - i/256), rounded down, for i below 256."""
    return np.array([_root(30 * 256 - i, 8) for i in range(256)], np.int64)


def _root(exponent: int, halvings: int) -> int:
    """2^(exponent / 2^halvings), rounded down: the floor of a root of a floor is the floor of the root."""
    value = 1 << exponent
    for _ in range(halvings):
        value = math.isqrt(value)
    return value


def frequencies(counts: Ints) -> NDArray[np.int64]:
    """Tables (TABLES, 256) for `rans` after these counts (TABLES, 256) of coded symbols.

    Symbols that would get less than an eighth of a slot get none and are escaped.
    """
    masses = prior() + (counts << COUNT_BITS)
    totals = masses.sum(1, keepdims=True)
    kept = masses * (8 * SLOTS) >= totals
    kept[:, ESCAPE] = True
    masses[:, ESCAPE] += np.where(kept, 0, masses).sum(1)
    masses *= kept
    tables = kept + masses * (SLOTS - kept.sum(1, keepdims=True)) // totals
    rows = np.arange(TABLES)
    tables[rows, masses.argmax(1)] += SLOTS - tables.sum(1)
    return tables


@functools.cache
def _uniform() -> NDArray[np.int64]:
    """(9, 256): table b has 2^b equal symbols."""
    return np.array([[SLOTS >> b] * (1 << b) + [0] * (256 - (1 << b)) for b in range(PIECE_BITS + 1)], np.int64)


def encode(values: Ints, widths: NDArray[np.int16]) -> list[Run]:
    """Runs for integers (N,) of given widths (N,); `decode` takes them in this order."""
    rounded, tables, shifts = split(values, widths)
    runs, counts = [], np.zeros((TABLES, 256), np.int64)
    symbols = np.where(np.abs(rounded) <= CENTRE, rounded + CENTRE, ESCAPE).astype(np.uint8)
    for part in _chunks(len(values)):
        current, contexts = frequencies(counts), tables[part]
        symbols[part][current.ravel().take(contexts * np.int64(256) + symbols[part]) == 0] = ESCAPE
        runs.append(Run(symbols[part], contexts, current))
        _count(counts, contexts, symbols[part])
    escaped = symbols == ESCAPE
    if shifts is not None:
        low = np.flatnonzero((shifts > 0) & ~escaped)
        lengths = shifts[low].astype(np.int64)
        runs += _encode_bits(values[low] + (1 << lengths >> 1), lengths)
    if escaped.any():
        bounds, lengths = _gamma(values[escaped])
        runs.append(Run(lengths, np.full(len(lengths), LENGTH_BITS, np.uint8), _uniform()))
        runs += _encode_bits(bounds, lengths - 1)
    return runs


def decode(decoder: Decoder, widths: NDArray[np.int16]) -> NDArray[np.int32]:
    """The integers (N,) of given widths (N,) that come next; wrong ones, or CoderError, if the data was altered."""
    tables, shifts = _tables(widths)
    values, counts = np.empty(len(widths), np.int32), np.zeros((TABLES, 256), np.int64)
    escapes = []
    for part in _chunks(len(widths)):
        contexts = tables[part]
        symbols = decoder.take(contexts, frequencies(counts))
        _count(counts, contexts, symbols)
        np.subtract(symbols, CENTRE, out=values[part], dtype=np.int32)
        escapes.append(np.flatnonzero(symbols == ESCAPE) + part.start)
    escaped = np.concatenate(escapes) if escapes else np.empty(0, np.int64)
    if shifts is not None:
        split_off = shifts > 0
        split_off[escaped] = False
        low = np.flatnonzero(split_off)
        lengths = shifts[low].astype(np.int64)
        values[low] = (values[low].astype(np.int64) << lengths) + _decode_bits(decoder, lengths) - (1 << lengths >> 1)
    if len(escaped):
        lengths = decoder.take(np.full(len(escaped), LENGTH_BITS, np.uint8), _uniform()).astype(np.int64)
        bounds = np.where(lengths > 0, 1 << np.maximum(lengths - 1, 0), 0) + _decode_bits(decoder, lengths - 1)
        values[escaped] = (bounds >> 1) ^ -(bounds & 1)
    return values


def code_lengths(values: Ints, widths: NDArray[np.int16], runs: list[Run]) -> tuple[Bits, Bits]:
    """Bits of each integer (N,) in its `encode`d runs: as its tables charge, and under the histograms of all N.

    The second is what a decoder that knew the histograms would need; escapes and bits split off are in both.
    """
    charged, ideal = np.empty(len(values)), np.empty(len(values))
    chunks = [(part, run) for part, run in zip(_chunks(len(values)), runs, strict=False)]
    counts = np.zeros((TABLES, 256), np.int64)
    for _, run in chunks:
        _count(counts, run.contexts, run.symbols)
    entropy = (np.log2(np.maximum(counts.sum(1, keepdims=True), 1)) - np.log2(np.maximum(counts, 1))).ravel()
    for part, run in chunks:
        joint = run.contexts * np.int64(256) + run.symbols
        charged[part] = math.log2(SLOTS) - np.log2(run.frequencies.ravel().take(joint))
        ideal[part] = entropy.take(joint)
    symbols = np.concatenate([np.empty(0, np.uint8), *(run.symbols for _, run in chunks)])
    shifts = _tables(widths)[1]
    extra = np.zeros(len(values)) if shifts is None else np.where(symbols == ESCAPE, 0.0, shifts)
    escaped = np.flatnonzero(symbols == ESCAPE)
    extra[escaped] += LENGTH_BITS + np.maximum(_gamma(values[escaped])[1] - 1, 0)
    return charged + extra, ideal + extra


def split(values: Ints, widths: NDArray[np.int16]) -> tuple[Ints, NDArray[np.uint8], Ints | None]:
    """Integers rounded to the multiples their tables are for, the tables, and the bits split off (None: none at all).

    Any equal shapes.
    """
    tables, shifts = _tables(widths)
    if shifts is not None:
        values = values + (1 << shifts.astype(np.int64) >> 1) >> shifts
    return values, tables, shifts


def _tables(widths: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[np.int16] | None]:
    if not widths.size or widths.max() <= WIDEST_TABLE:
        return (widths - NARROWEST).astype(np.uint8), None
    shifts = np.maximum(widths - WIDEST_TABLE + 7 >> 3, 0)
    return (widths - 8 * shifts - NARROWEST).astype(np.uint8), shifts


def _chunks(n: int) -> Iterator[slice]:
    start = 0
    while start < n:
        stop = min(max(2 * start, FIRST_CHUNK), n)
        yield slice(start, stop)
        start = stop


def _count(counts: Ints, contexts: Ints, symbols: Ints) -> None:
    step = 1 << 20  # bounds the memory of the joint index
    for first in range(0, len(symbols), step):
        joint = contexts[first : first + step] * np.int64(256) + symbols[first : first + step]
        counts += np.bincount(joint, minlength=counts.size).reshape(counts.shape)


def _gamma(values: Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The integers as 0, -1, 1, -2, ... numbered from 0, and the bit lengths of these numbers."""
    wide = values.astype(np.int64)
    bounds = wide << 1 ^ wide >> 63
    return bounds, np.frexp(bounds)[1].astype(np.int64)


def _encode_bits(values: Ints, lengths: Ints) -> list[Run]:
    """The low lengths (N,) bits of integers (N,), a byte at a time; none for lengths below 1."""
    runs = []
    for first in range(0, int(lengths.max(initial=0)), PIECE_BITS):
        here = np.flatnonzero(lengths > first)
        sizes = np.minimum(lengths[here] - first, PIECE_BITS)
        runs.append(Run(values[here] >> first & (1 << sizes) - 1, sizes, _uniform()))
    return runs


def _decode_bits(decoder: Decoder, lengths: Ints) -> NDArray[np.int64]:
    values = np.zeros(len(lengths), np.int64)
    for first in range(0, int(lengths.max(initial=0)), PIECE_BITS):
        here = np.flatnonzero(lengths > first)
        values[here] |= (
            decoder.take(np.minimum(lengths[here] - first, PIECE_BITS), _uniform()).astype(np.int64) << first
        )
    return values
