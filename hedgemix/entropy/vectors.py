"""Lists of integer vectors as bytes: steps and widths, noisy or smooth, each of one width (see `gaussian_tables`).

What is coded of a vector is the distance of its integers to their mean (mode 0), to the one before (mode 1), or to the
last vector of the same length, minus the mean of these distances (mode 2).

    content   bytes
    header    for each vector that is not empty two varints: 256 * mode + width + 32, and mean (0, -1, 1, -2, ...)
    stream    one `rans` stream of all vectors' integers; what else is coded may follow them

Lengths are not stored. A varint has 7 bits in a byte, low ones first, the high bit set in all but its last byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hedgemix.entropy import gaussian_tables, rans
from hedgemix.entropy.gaussian_tables import NARROWEST, WIDEST
from hedgemix.entropy.rans import CoderError, Decoder, Ints

LARGEST = gaussian_tables.LARGEST // 2
"""Integers from -LARGEST to LARGEST can be coded."""
MODES = 3
VARINT_BYTES = 5


def encode(vectors: Sequence[Ints]) -> bytes:
    """Code integer vectors (N,) of any lengths. Raises ValueError for magnitudes above LARGEST."""
    header, residuals, residual_widths = describe(vectors)
    return header + rans.encode(gaussian_tables.encode(residuals, residual_widths), rans.lanes_for(len(residuals)))


def decode(data: bytes, lengths: Sequence[int]) -> list[NDArray[np.int64]]:
    """Decode what `encode` was given, int64 (N,), with its lengths.

    For data that was cut or altered it raises CoderError or returns other integers: keep a checksum.
    """
    decoder, vectors = read(data, lengths)
    decoder.close()
    return vectors


def describe(vectors: Sequence[Ints]) -> tuple[bytes, NDArray[np.int64], NDArray[np.int16]]:
    """Make the header, and all that `gaussian_tables.encode` must code of the vectors: integers (N,) and their widths
    (N,).

    Raises ValueError for magnitudes above LARGEST.
    """
    header, residuals, spread = bytearray(), [np.empty(0, np.int64)], [np.empty(0, np.int16)]
    earlier: dict[int, NDArray[np.int64]] = {}
    for vector in vectors:
        if not len(vector):
            continue
        if vector.dtype.kind not in "iu" or int(vector.min()) < -LARGEST or int(vector.max()) > LARGEST:
            raise ValueError(f"a vector's integers must be integers within +-{LARGEST:,}")
        values = vector.astype(np.int64)
        candidates = [_centred(0, values), (1, int(values[0]), np.diff(values, prepend=values[0]))]
        if len(values) in earlier:
            candidates.append(_centred(2, values - earlier[len(values)]))
        earlier[len(values)] = values
        mode, mean, residual = min(candidates, key=lambda candidate: _width(candidate[2]))
        width = _width(residual)
        header += _varint(256 * mode + width - NARROWEST) + _varint(gaussian_tables.zigzag(mean))
        residuals.append(residual)
        spread.append(np.full(len(values), width, np.int16))
    return bytes(header), np.concatenate(residuals), np.concatenate(spread)


def read(data: bytes, lengths: Sequence[int], further: int = 0) -> tuple[Decoder, list[NDArray[np.int64]]]:
    """Decode the vectors of a stream in which `further` more integers follow them: the decoder, past them, and the
    vectors.

    Raises CoderError for data that was cut or altered.
    """
    plans: list[tuple[int, int]] = []
    spread = [np.empty(0, np.int16)]
    position = 0
    for length in filter(None, lengths):
        plan, position = _parse(data, position)
        folded, position = _parse(data, position)
        mode, width = plan >> 8, (plan & 255) + NARROWEST
        if mode >= MODES or width > WIDEST:
            raise CoderError(f"a vector of mode {mode} and width {width}; the data was altered")
        plans.append((mode, gaussian_tables.unzigzag(folded)))
        spread.append(np.full(length, width, np.int16))
    decoder = Decoder(data[position:], rans.lanes_for(sum(lengths) + further))
    residuals = gaussian_tables.decode(decoder, np.concatenate(spread)).astype(np.int64)
    vectors: list[NDArray[np.int64]] = []
    earlier: dict[int, NDArray[np.int64]] = {}
    start, remaining = 0, iter(plans)
    for length in lengths:
        vector = residuals[start : start + length]
        start += length
        if length:
            mode, mean = next(remaining)
            vector = mean + (vector.cumsum() if mode == 1 else vector)
            if mode == 2:
                if length not in earlier:
                    raise CoderError("a vector is told from an earlier one that is not there; the data was altered")
                vector += earlier[length]
            if np.abs(vector).max() > LARGEST:
                raise CoderError(f"a vector has integers beyond +-{LARGEST:,}; the data was altered")
            earlier[length] = vector
        vectors.append(vector)
    return decoder, vectors


def _centred(mode: int, vector: NDArray[np.int64]) -> tuple[int, int, NDArray[np.int64]]:
    mean = int(np.rint(vector.mean()))
    return mode, mean, vector - mean


def _width(residual: NDArray[np.int64]) -> int:
    square = float(np.square(residual, dtype=np.float64).mean())
    return int(np.clip(np.rint(4 * np.log2(max(square, 2.0**-8))), NARROWEST, WIDEST))


def _varint(number: int) -> bytes:
    content = bytearray()
    while number > 127:
        content.append((number & 127) | 128)
        number >>= 7
    return bytes([*content, number])


def _parse(data: bytes, position: int) -> tuple[int, int]:
    """The varint at the position, and the position after it."""
    number = 0
    for k, byte in enumerate(data[position : position + VARINT_BYTES]):
        number |= (byte & 127) << (7 * k)
        if byte < 128:
            return number, position + k + 1
    raise CoderError("a number of the header does not end; the data was cut or altered")
