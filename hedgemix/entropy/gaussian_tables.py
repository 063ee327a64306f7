"""Integers whose widths are known, as symbols and tables for `rans`: the model behind quantized weights.

A width is a logarithmic standard deviation in eighths of an octave: an integer of width w is about Gaussian with
deviation 2^(w/8). Each width from 1/16 to 16 has a table of its own; above that the low bits, which are then uniform,
are split off, and the rest has a width in the top octave. A table begins as a discretised Gaussian (1 in 256 of it four
times as wide) that counts as 512 symbols, and follows what was coded under it: tables change after 1024, 2048,
4096, ... integers. So no table is transmitted; a few thousand weights are coded about as well as a Gaussian can, and
millions as well as by their own histograms.

The symbol of an integer is q + 127 (after the split), or ESCAPE where that is outside 0..254 or has no frequency;
escaped integers follow the others in Elias's gamma code (1975). Everything that decides a table or a context is
integer arithmetic, so the bytes mean the same on every machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hedgemix.entropy.rans import SLOTS, Decoder, Ints, Run

Bits = NDArray[np.float64]
Signed = TypeVar("Signed", int, NDArray[np.int64])

NARROWEST, WIDEST_TABLE, WIDEST = -32, 32, 200
"""Widths lie between NARROWEST and WIDEST; above WIDEST_TABLE low bits are split off."""
TABLES = WIDEST_TABLE - NARROWEST + 1
CENTRE = 127
ESCAPE = 255
LARGEST = 1 << 24
"""Integers from -LARGEST to LARGEST can be coded."""
SAMPLES = 8
"""Points in each integer's cell at which the Gaussian is summed."""
PRIOR_BITS, COUNT_BITS = 16, 7
"""A table begins with a mass of 2^16, and each symbol coded adds 2^7."""
WIDE_SHARE, WIDE_EIGHTHS = 256, 16
FIRST_CHUNK = 1024
PIECE_BITS = 8
LENGTH_BITS = 5


@functools.cache
def prior() -> NDArray[np.int64]:
    """Give where every table begins: masses int64 (TABLES, 256), each row summing to 2^16."""
    points = 2 * np.arange((CENTRE + 1) * SAMPLES) + 1 - SAMPLES
    masses = np.zeros((TABLES, 256), np.int64)
    for row in range(TABLES):
        widths = row + NARROWEST, row + NARROWEST + WIDE_EIGHTHS
        cells = [_density(points, width).reshape(-1, SAMPLES).sum(1) for width in widths]
        narrow, wide = ((cell << 20) // (2 * cell.sum() - cell[0]) for cell in cells)
        mixed = (((WIDE_SHARE - 1) * narrow + wide) // WIDE_SHARE) >> (20 - PRIOR_BITS)
        masses[row, CENTRE : 2 * CENTRE + 1] = mixed
        masses[row, : CENTRE + 1] = mixed[::-1]
        masses[row, ESCAPE] = 1
        masses[row, CENTRE] += (1 << PRIOR_BITS) - masses[row].sum()
    return masses


def _density(points: Ints, width: int) -> NDArray[np.int64]:
    """2^30 * exp(-x^2 / (2 * 4^(width/8))) at x = points / (2 * SAMPLES), without a float."""
    octaves = _root(240 - width, 2)  # 2^(60 - width/4)
    factor = (7213475204 * octaves // 10**10) >> 30  # 1 / (2 ln 2) = 0.7213475204
    exponents = np.minimum((points**2 * factor) >> 30, 40 << 8)  # to base 2, in units of 2^-8
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
    """Make tables int64 (TABLES, 256) for `rans` after these counts (TABLES, 256) of coded symbols.

    Symbols that would get less than an eighth of a slot get none and are escaped.
    """
    masses = prior() + (counts << COUNT_BITS)
    totals = masses.sum(1, keepdims=True)
    present = masses * (8 * SLOTS) >= totals
    present[:, ESCAPE] = True
    masses[:, ESCAPE] += np.where(present, 0, masses).sum(1)
    masses *= present
    tables = present + masses * (SLOTS - present.sum(1, keepdims=True)) // totals
    rows = np.arange(TABLES)
    tables[rows, masses.argmax(1)] += SLOTS - tables.sum(1)
    return tables


@functools.cache
def _uniform() -> NDArray[np.int64]:
    """(9, 256): table b has 2^b equal symbols."""
    return np.array([[SLOTS >> b] * (1 << b) + [0] * (256 - (1 << b)) for b in range(PIECE_BITS + 1)], np.int64)


def encode(values: Ints, widths: NDArray[np.int16]) -> list[Run]:
    """Make runs for integers (N,) of given widths (N,), which `decode` takes in this order."""
    tables, wide, shifts = tables_of(widths)
    shifted = rounded(values[wide], shifts)
    symbols = _symbols(values)
    symbols[wide] = _symbols(shifted)
    runs, counts = [], np.zeros((TABLES, 256), np.int64)
    for part in _chunks(len(values)):
        current = frequencies(counts)
        _escape(tables[part], symbols[part], current == 0)
        _count(counts, tables[part], symbols[part])
        runs.append(Run(symbols[part], tables[part], current))
    plain = symbols[wide] != ESCAPE
    runs += _encode_bits(values[wide][plain] + half(shifts[plain]), shifts[plain])
    escaped = values[symbols == ESCAPE]
    if len(escaped):
        bounds, lengths = _gamma(escaped)
        runs.append(Run(lengths, np.full(len(lengths), LENGTH_BITS, np.uint8), _uniform()))
        runs += _encode_bits(bounds, lengths - 1)
    return runs


def decode(decoder: Decoder, widths: NDArray[np.int16]) -> NDArray[np.int32]:
    """Decode the integers int32 (N,) of given widths (N,) that come next; wrong ones, or CoderError, if the data was
    altered."""
    tables, wide, shifts = tables_of(widths)
    values, counts = np.empty(len(widths), np.int32), np.zeros((TABLES, 256), np.int64)
    escapes = [np.empty(0, np.int64)]
    for part in _chunks(len(widths)):
        symbols = decoder.take(tables[part], frequencies(counts))
        _count(counts, tables[part], symbols)
        np.subtract(symbols, CENTRE, out=values[part], dtype=np.int32)
        escapes.append(np.flatnonzero(symbols == ESCAPE) + part.start)
    escaped = np.concatenate(escapes)
    plain = values[wide] != ESCAPE - CENTRE
    wide, shifts = wide[plain], shifts[plain]
    values[wide] = (values[wide].astype(np.int64) << shifts) + _decode_bits(decoder, shifts) - half(shifts)
    if len(escaped):
        lengths = decoder.take(np.full(len(escaped), LENGTH_BITS, np.uint8), _uniform()).astype(np.int64)
        bounds = half(lengths) + _decode_bits(decoder, lengths - 1)
        values[escaped] = unzigzag(bounds)
    return values


def code_lengths(values: Ints, widths: NDArray[np.int16], runs: list[Run]) -> tuple[Bits, Bits]:
    """Count the bits of each integer (N,) in its `encode`d runs, float64: as its tables charge, and under the
    histograms of all N.

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
    extra = np.zeros(len(values))
    _, wide, shifts = tables_of(widths)
    extra[wide] = shifts
    escaped = symbols == ESCAPE
    extra[escaped] = LENGTH_BITS + np.maximum(_gamma(values[escaped])[1] - 1, 0)
    return charged + extra, ideal + extra


def tables_of(widths: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Find the table of each width (any shape), where in the flat array bits are split off (W,), and how many there
    (W,)."""
    wide = np.flatnonzero(widths > WIDEST_TABLE)
    shifts = (widths.ravel()[wide].astype(np.int64) - WIDEST_TABLE + 7) >> 3
    tables = (widths - NARROWEST).astype(np.uint8)
    tables.reshape(-1)[wide] -= (8 * shifts).astype(np.uint8)
    return tables, wide, shifts


def rounded(values: Ints, shifts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round integers (W,) to those without their low shifts (W,) bits."""
    return (values + half(shifts)) >> shifts


def half(shifts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give half of what shifts (W,) bits count, 2^(shift - 1), rounded down: 0 for no bits."""
    return (1 << shifts) >> 1


def zigzag(value: Signed) -> Signed:
    """Number integers (int64, or one of Python's) in the order 0, -1, 1, -2, ... from 0."""
    return (value << 1) ^ (value >> 63)


def unzigzag(number: Signed) -> Signed:
    """Give the integers of `zigzag`'s numbers."""
    return (number >> 1) ^ -(number & 1)


def _symbols(values: Ints) -> NDArray[np.uint8]:
    above = (values.astype(np.int32) + CENTRE).view(np.uint32)  # what is below zero becomes very large
    return np.minimum(above, ESCAPE).astype(np.uint8)


def _chunks(n: int) -> Iterator[slice]:
    start = 0
    while start < n:
        stop = min(max(2 * start, FIRST_CHUNK), n)
        yield slice(start, stop)
        start = stop


def _blocks(tables: Ints, symbols: Ints) -> Iterator[tuple[Ints, NDArray[np.int64]]]:
    """A million symbols at a time, and their places in a flat (TABLES, 256) array."""
    for first in range(0, len(symbols), 1 << 20):
        block = symbols[first : first + (1 << 20)]
        yield block, tables[first : first + (1 << 20)] * np.int64(256) + block


def _escape(tables: Ints, symbols: NDArray[np.uint8], missing: NDArray[np.bool_]) -> None:
    for block, places in _blocks(tables, symbols):
        block[missing.ravel().take(places)] = ESCAPE


def _count(counts: NDArray[np.int64], tables: Ints, symbols: Ints) -> None:
    for _, places in _blocks(tables, symbols):
        counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)


def _gamma(values: Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The integers' places in 0, -1, 1, -2, ..., and the bit lengths of these numbers."""
    bounds = zigzag(values.astype(np.int64))
    return bounds, np.frexp(bounds)[1].astype(np.int64)


def _encode_bits(values: Ints, lengths: Ints) -> list[Run]:
    """The low lengths (N,) bits of integers (N,), a byte at a time; none for lengths below 1."""
    runs = []
    for first in range(0, int(lengths.max(initial=0)), PIECE_BITS):
        here = np.flatnonzero(lengths > first)
        sizes = np.minimum(lengths[here] - first, PIECE_BITS)
        runs.append(Run((values[here] >> first) & ((1 << sizes) - 1), sizes, _uniform()))
    return runs


def _decode_bits(decoder: Decoder, lengths: Ints) -> NDArray[np.int64]:
    values = np.zeros(len(lengths), np.int64)
    for first in range(0, int(lengths.max(initial=0)), PIECE_BITS):
        here = np.flatnonzero(lengths > first)
        values[here] |= (
            decoder.take(np.minimum(lengths[here] - first, PIECE_BITS), _uniform()).astype(np.int64) << first
        )
    return values
