"""Lists of integer matrices as bytes: the codes of quantized weights.

The integers of a matrix are coded with widths (see `gaussian_tables`) that are the sum of a number for the row and one
for the column, both fitted and transmitted, in quarters of an octave, or in eighths where at least 512 integers share
one. A caller whose decoder knows the steps of rows and columns hands them in: weights of equal width have integers of
width -step, so the numbers become small corrections. Matrices of one shape share their tables.

The bytes are those of `vectors`, of each matrix's rows' numbers and its columns'; in the same stream the integers of
the matrices follow, shape by shape. Shapes are not stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hedgemix.entropy import gaussian_tables, rans, vectors
from hedgemix.entropy.gaussian_tables import CENTRE, LARGEST, NARROWEST, TABLES, WIDE_EIGHTHS, WIDE_SHARE, WIDEST
from hedgemix.entropy.rans import Ints

Shape = tuple[int, int]
Steps = Sequence[tuple[Ints, Ints]]
"""For each matrix, logarithms of its row steps (R,) and column steps (C,), in eighths of an octave."""
FINE_FROM = 512
ROUNDS = 2
RIDGE = 0.1
"""Second derivative, in bits for each squared eighth, of what a number is held to cost; a row that says little about
its width stays near the others."""
LONGEST_MOVE = 8
FLOOR = -24
"""Eighths below which a narrower width saves nothing."""
SLOPE_UNITS, CURVATURE_UNITS = 256, 16384
"""Of a bit, in the fit's derivatives."""


@dataclass(frozen=True)
class Sizes:
    """Tells where the bits of one matrix go."""

    weights: int
    ideal_bits: float
    """Entropy of its symbols under the histograms of its shape's tables, which no decoder knows."""
    coded_bits: float
    """What the tables in use charge for it; the file adds about 3 bytes a lane."""
    side_bits: float
    """The widths of its rows and columns."""


def encode(matrices: Sequence[Ints], steps: Steps | None = None) -> bytes:
    """Code integer matrices (R, C) of any sizes and magnitudes up to 2^24; the same ones give the same bytes.

    steps: what the decoder will know before. Raises ValueError for other magnitudes or steps of other lengths.
    """
    numbers, bases = _fitted(matrices, steps)
    header, residuals, residual_widths = vectors.describe(numbers)
    runs = gaussian_tables.encode(residuals, residual_widths)
    for members in _groups([matrix.shape for matrix in matrices]).values():
        runs += gaussian_tables.encode(*_joined(members, matrices, numbers, bases))
    return header + rans.encode(runs, rans.lanes_for(len(residuals) + sum(matrix.size for matrix in matrices)))


def decode(data: bytes, shapes: Sequence[Shape], steps: Steps | None = None) -> list[NDArray[np.int32]]:
    """Decode what `encode` was given, int32 (R, C), with the shapes and steps of that call.

    For data that was cut or altered it raises CoderError or returns other integers: keep a checksum.
    """
    bases = _bases(shapes, steps)
    decoder, numbers = vectors.read(
        data, [n for shape in shapes for n in shape], sum(math.prod(shape) for shape in shapes)
    )
    matrices: dict[int, NDArray[np.int32]] = {}
    for shape, members in _groups(shapes).items():
        spread = np.concatenate([_spread(bases[k], numbers[2 * k], numbers[2 * k + 1]).ravel() for k in members])
        values = gaussian_tables.decode(decoder, spread).reshape(len(members), *shape)
        matrices.update(zip(members, values, strict=True))
    decoder.close()
    return [matrices[k] for k in range(len(shapes))]


def sizes(matrices: Sequence[Ints], steps: Steps | None = None) -> list[Sizes]:
    """Count the bits that each matrix takes in `encode`, and those it ideally would.

    Raises ValueError as `encode` does.
    """
    numbers, bases = _fitted(matrices, steps)
    _, residuals, residual_widths = vectors.describe(numbers)
    spent, _ = gaussian_tables.code_lengths(
        residuals, residual_widths, gaussian_tables.encode(residuals, residual_widths)
    )
    ends = np.cumsum([0, *map(len, numbers)])
    side = np.diff(np.append(0.0, spent.cumsum())[ends]).reshape(-1, 2).sum(1) if numbers else np.empty(0)
    result: dict[int, Sizes] = {}
    for members in _groups([matrix.shape for matrix in matrices]).values():
        values, spread = _joined(members, matrices, numbers, bases)
        pair = gaussian_tables.code_lengths(values, spread, gaussian_tables.encode(values, spread))
        coded, ideal = (bits.reshape(len(members), -1).sum(1).tolist() for bits in pair)
        for place, k in enumerate(members):
            result[k] = Sizes(matrices[k].size, ideal[place], coded[place], float(side[k]))
    return [result[k] for k in range(len(matrices))]


def _groups(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """The indices of each shape's matrices, shapes in the order in which they first appear."""
    groups: dict[Shape, list[int]] = {}
    for k, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(k)
    return groups


def _joined(
    members: Sequence[int], matrices: Sequence[Ints], numbers: Sequence[Ints], bases: Sequence[tuple[Ints, Ints]]
) -> tuple[Ints, NDArray[np.int16]]:
    values = np.concatenate([matrices[k].ravel() for k in members])
    return values, np.concatenate([_spread(bases[k], numbers[2 * k], numbers[2 * k + 1]).ravel() for k in members])


def _bases(shapes: Sequence[Shape], steps: Steps | None) -> list[tuple[Ints, Ints]]:
    """The widths of rows and columns before correction: minus the steps."""
    if steps is None:
        return [(np.zeros(rows, np.int64), np.zeros(columns, np.int64)) for rows, columns in shapes]
    if [(len(rows), len(columns)) for rows, columns in steps] != [tuple(shape) for shape in shapes]:
        raise ValueError("the steps are not one for each row and column of the matrices")
    return [(-rows.astype(np.int64), -columns.astype(np.int64)) for rows, columns in steps]


def _units(shape: Shape) -> tuple[int, int]:
    """Eighths that a number of a row and of a column stand for."""
    rows, columns = shape
    return 1 if columns >= FINE_FROM else 2, 1 if rows >= FINE_FROM else 2


def _spread(base: tuple[Ints, Ints], rows: Ints, columns: Ints) -> NDArray[np.int16]:
    """The widths (R, C) that numbers for the rows (R,) and the columns (C,) give."""
    units = _units((len(rows), len(columns)))
    parts = [np.clip(b + unit * n, -(2**13), 2**13) for b, unit, n in zip(base, units, (rows, columns), strict=True)]
    total = parts[0].astype(np.int16)[:, None] + parts[1].astype(np.int16)
    return np.clip(total, NARROWEST, WIDEST, out=total)


def _fitted(matrices: Sequence[Ints], steps: Steps | None) -> tuple[list[Ints], list[tuple[Ints, Ints]]]:
    """For each matrix its rows' numbers and its columns', in one list, and the bases that they correct."""
    for matrix in matrices:
        if matrix.dtype.kind not in "iu" or max(int(matrix.max(initial=0)), -int(matrix.min(initial=0))) > LARGEST:
            raise ValueError(f"only integers within +-{LARGEST:,} can be coded; found {matrix.dtype}, or larger ones")
    bases = _bases([matrix.shape for matrix in matrices], steps)
    return [numbers for pair in map(_fit, matrices, bases) for numbers in pair], bases


def _fit(matrix: Ints, base: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    """The numbers of rows (R,) and columns (C,): from mean squares first, then Newton steps on the code length."""
    if not matrix.size:
        return np.zeros(matrix.shape[0], np.int64), np.zeros(matrix.shape[1], np.int64)
    units = _units(matrix.shape)
    slopes, curvatures = _derivatives()
    numbers = [np.rint(width / unit).astype(np.int64) for width, unit in zip(_start(matrix, base), units, strict=True)]
    magnitudes = np.minimum(np.abs(matrix), CENTRE).astype(np.uint8)
    for _ in range(ROUNDS):
        for axis in (0, 1):
            tables, wide, shifts = gaussian_tables.tables_of(_spread(base, *numbers))
            entries = tables * np.int64(CENTRE + 1)  # places in the flat table of slopes
            entries += magnitudes
            if len(wide):
                shifted = np.minimum(np.abs(gaussian_tables.rounded(matrix.ravel()[wide], shifts)), CENTRE)
                entries.ravel()[wide] += shifted - magnitudes.ravel()[wide]
            slope = slopes.take(entries).sum(1 - axis) / SLOPE_UNITS
            curvature = curvatures.take(entries).sum(1 - axis) / CURVATURE_UNITS
            moved = _newton_step(numbers[axis] * units[axis], slope, curvature)
            numbers[axis] = np.rint(moved / units[axis]).astype(np.int64)
    return numbers[0], numbers[1]


def _start(matrix: Ints, base: tuple[Ints, Ints]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corrections of the base widths by the mean squares of rows and columns, after division by 2^(base/8)."""
    middles = [float(np.median(part)) for part in base]
    shifts = [np.clip(part - middle, -128, 128) for part, middle in zip(base, middles, strict=True)]
    factors = [np.exp2(shift / -8).astype(np.float32) for shift in shifts]
    squares = np.square(matrix.astype(np.float32) * factors[0][:, None] * factors[1])
    rows, columns = (
        np.maximum(4 * np.log2(np.maximum(squares.mean(1 - axis, dtype=np.float64), 1e-30)), FLOOR - shifts[axis])
        for axis in (0, 1)
    )
    return rows - sum(middles), columns - np.average(columns)


def _newton_step(held: Ints, slope: NDArray[np.float64], curvature: NDArray[np.float64]) -> NDArray[np.float64]:
    """Widths (N,), in eighths, a Newton step further down the code length; the ridge holds them near their median."""
    slope = slope + RIDGE * (held - np.median(held))
    move: NDArray[np.float64] = np.clip(slope / (curvature + RIDGE), -LONGEST_MOVE, LONGEST_MOVE)
    return held - move


@functools.cache
def _derivatives() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flat tables (TABLES * 128,), by table and magnitude, of a symbol's bits derived by the width: the slope, in 1/256
    bit, and the expected curvature, in 1/16384 bit, equal for all magnitudes of a table.

    Only the fit uses them, so they may be computed in floating point; they are integers so that no order of summation
    shows in the bytes.
    """
    deviations = [2 ** (width / 8) for width in range(NARROWEST - 1, NARROWEST + TABLES + 1 + WIDE_EIGHTHS)]
    edges = [[math.erf((2 * a - 1) / (8**0.5 * deviation)) for a in range(CENTRE + 2)] for deviation in deviations]
    cells = np.diff(edges) / 2
    mixed = cells[:-WIDE_EIGHTHS] + (cells[WIDE_EIGHTHS:] - cells[:-WIDE_EIGHTHS]) / WIDE_SHARE
    bits = -np.log2(np.maximum(mixed, 1e-30))
    slopes = (bits[2:] - bits[:-2]) / 2
    shares = mixed[1:-1] * np.where(np.arange(CENTRE + 1), 2, 1)
    curvatures = (shares * slopes**2).sum(1, keepdims=True) * math.log(2)
    curvatures = np.broadcast_to(curvatures, slopes.shape)
    whole = np.rint(slopes * SLOPE_UNITS), np.rint(curvatures * CURVATURE_UNITS)
    return whole[0].astype(np.int64).ravel(), whole[1].astype(np.int64).ravel()
