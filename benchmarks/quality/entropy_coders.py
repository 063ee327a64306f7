"""Quantized weights by this library's coder and by others.

    python benchmarks/quality/entropy_coders.py [WEIGHTS] [--hessians FILE] [--bits 2.0 2.5 3.0 3.5] [--no-slow]
    [--no-synthetic]

WEIGHTS is an artifact or a weights.pt. Its matrices are rounded at steps that equalise the loss: theta / sqrt(D_k) for
column k, with D the pivots of the damped Hessian where --hessians has one, and a log-normal spread over the rows; theta
such that ideal Gaussian widths of rows and columns would take about so many bits. The other set has the shapes of
recipe record, Gaussian, with log-normal widths of rows and columns and no steps known. Every coder's output is decoded
and compared. Prints markdown tables: bits a weight with all side information but steps, and CPU seconds on one thread.
"""

from __future__ import annotations

import lzma
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brotli
import constriction
import numpy as np
import torch
import tyro
import zstandard

from hedgemix.artifact import format as artifact
from hedgemix.entropy import matrices

Matrix = np.ndarray
Steps = tuple[np.ndarray, np.ndarray]
RECORD_SHAPES = [(512, 512)] * 44 + [(1792, 512)] * 11 + [(512, 1792)] * 11 + [(1024, 512), (6144, 128), (1024, 128)]
DAMPING = 0.01
SPREAD = 0.5
"""Standard deviation of the natural logarithm of row and column widths."""


@dataclass(frozen=True)
class Options:
    weights: tyro.conf.Positional[Path | None] = None
    """An artifact or a weights.pt (none: only the synthetic set)."""
    hessians: Path | None = None
    """The hessians.pt that belongs to it."""
    bits: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5)
    """About so many bits a weight."""
    synthetic_bits: float = 2.5
    synthetic: bool = True
    slow: bool = True
    """Also zstd-22, brotli-11 and lzma, which take minutes at the record's size."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if options.weights:
        tensors = load(options.weights)
        hessians = load_hessians(options.hessians)
        for bits in options.bits:
            names = [name for name, tensor in tensors.items() if tensor.ndim == 2 and min(tensor.shape) >= 16]
            rounded = {name: quantized(tensors[name], hessians.get(owner(name)), bits) for name in names}
            for known, what in ((True, "matrices with Hessians"), (False, "other tensors")):
                part = [pair for name, pair in rounded.items() if (owner(name) in hessians) == known]
                if part:
                    table(f"{what}, about {bits} bits", [pair[0] for pair in part], [pair[1] for pair in part], options)
    if options.synthetic:
        table(f"record's shapes, about {options.synthetic_bits} bits", synthetic(options.synthetic_bits), None, options)


def table(title: str, found: list[Matrix], steps: list[Steps] | None, options: Options) -> None:
    weights = sum(matrix.size for matrix in found)
    print(f"{title}: {len(found)} matrices, {weights:,} weights\n")
    print("| coder | bits a weight | bytes | encode s | decode s |")
    print("|---|---:|---:|---:|---:|")
    coders: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {"hedgemix": (ours, ours_back)}
    if steps:
        coders["hedgemix, steps known"] = (
            lambda each: matrices.encode(each, steps),
            lambda data, each: matrices.decode(data, [matrix.shape for matrix in each], steps),
        )
    coders |= {name: general(*pair) for name, pair in GENERAL.items() if options.slow or name not in SLOW}
    coders |= CONSTRICTION
    for name, (encode, decode) in coders.items():
        began = time.process_time()
        data = encode(found)
        between = time.process_time()
        back = decode(data, found)
        ended = time.process_time()
        if not all(map(np.array_equal, back, found)):
            sys.exit(f"error: {name} gave other integers back")
        size = len(data) if isinstance(data, bytes) else sum(words.nbytes + side for words, side, _ in data)
        print(
            f"| {name} | {8 * size / weights:.3f} | {size:,} | {between - began:.2f} | {ended - between:.2f} |",
            flush=True,
        )
    ideal = matrices.sizes(found, steps)
    parts = [sum(getattr(s, field) for s in ideal) / weights for field in ("ideal_bits", "coded_bits", "side_bits")]
    print("\nhedgemix: ideal {:.4f}, coded {:.4f}, widths of rows and columns {:.4f} bits a weight\n".format(*parts))


def load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    return artifact.read(path).tensors


def load_hessians(path: Path | None) -> dict[str, torch.Tensor]:
    if path is None:
        return {}
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {name: total.double() / content["count"] for name, total in content["sums"].items()}


def owner(name: str) -> str:
    """The matrix whose Hessian it shares."""
    return name.replace(".attention.k.", ".attention.q.").replace(".attention.v.", ".attention.q.")


def quantized(weight: torch.Tensor, hessian: torch.Tensor | None, bits: float) -> tuple[Matrix, Steps]:
    """Integers (R, C) and their steps, logarithms (R,) and (C,) in eighths of an octave."""
    rows, columns = weight.shape
    generator = np.random.default_rng(rows * columns)
    spread = np.zeros(rows) if hessian is None else generator.normal(0, SPREAD / math.log(2), rows)
    by_column = np.zeros(columns)
    if hessian is not None:
        damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
        by_column = -torch.linalg.cholesky(damped.flip(0, 1)).diagonal().flip(0).log2().numpy()
    values = weight.double().numpy()
    low, high = -40.0, 40.0
    for _ in range(30):
        theta = (low + high) / 2
        steps = np.rint(8 * (spread + theta)), np.rint(8 * by_column)
        integers = np.rint(values * np.exp2(steps[0] / -8)[:, None] * np.exp2(steps[1] / -8))
        low, high = (theta, high) if gaussian_bits(integers) > bits else (low, theta)
    return integers.astype(np.int32), (steps[0].astype(np.int16), steps[1].astype(np.int16))


def gaussian_bits(integers: np.ndarray) -> float:
    squares = integers**2 + 1 / 12
    widths = squares.mean(1, keepdims=True) * squares.mean(0) / squares.mean()
    return float(np.maximum(0.5 * np.log2(2 * math.pi * math.e * widths), 0.05).mean())


def synthetic(bits: float, shapes: Sequence[tuple[int, int]] = RECORD_SHAPES) -> list[Matrix]:
    generator = np.random.default_rng(0)
    middle = 2**bits / math.sqrt(2 * math.pi * math.e)
    return [
        np.rint(
            generator.standard_normal((rows, columns), np.float32)
            * (middle * np.exp(generator.normal(0, SPREAD, (rows, 1)))).astype(np.float32)
            * np.exp(generator.normal(0, SPREAD, columns)).astype(np.float32)
        ).astype(np.int32)
        for rows, columns in shapes
    ]


def ours(found: list[Matrix]) -> bytes:
    return matrices.encode(found)


def ours_back(data: bytes, found: list[Matrix]) -> list[Matrix]:
    return matrices.decode(data, [matrix.shape for matrix in found])


GENERAL: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "bytes + zstd -1": (zstandard.ZstdCompressor(level=1).compress, zstandard.decompress),
    "bytes + zstd --ultra -22": (zstandard.ZstdCompressor(level=22).compress, zstandard.decompress),
    "bytes + brotli -q 11": (lambda data: brotli.compress(data, quality=11), brotli.decompress),
    "bytes + xz -9e": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
}
SLOW = ("bytes + zstd --ultra -22", "bytes + brotli -q 11", "bytes + xz -9e")


def general(compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]) -> tuple[Any, Any]:
    """A compressor of the integers one after the other, in bytes where a matrix has none beyond +-127, else in two."""

    def type_of(matrix: Matrix) -> type:
        return np.int8 if np.abs(matrix).max() < 128 else np.int16

    def encode(found: list[Matrix]) -> bytes:
        return compress(b"".join(matrix.astype(type_of(matrix)).tobytes() for matrix in found))

    def decode(data: bytes, found: list[Matrix]) -> list[Matrix]:
        plain, position, result = decompress(data), 0, []
        for matrix in found:
            result.append(np.frombuffer(plain, type_of(matrix), matrix.size, position).reshape(matrix.shape))
            position += result[-1].nbytes
        return result

    return encode, decode


Ans = constriction.stream.stack.AnsCoder
Coded = list[tuple[np.ndarray, int, Any]]
"""Of each matrix the words, the bytes of side information, and what the decoder takes from that."""


def encode_histograms(found: list[Matrix]) -> Coded:
    result: Coded = []
    for matrix in found:
        lowest = int(matrix.min())
        counts = np.bincount((matrix - lowest).ravel()).astype(np.float32)
        coder = Ans()
        coder.encode_reverse((matrix - lowest).ravel(), constriction.stream.model.Categorical(counts, perfect=False))
        result.append((coder.get_compressed(), 2 * len(counts), (lowest, counts)))
    return result


def decode_histograms(data: Coded, found: list[Matrix]) -> list[Matrix]:
    result = []
    for (words, _, (lowest, counts)), matrix in zip(data, found, strict=True):
        model = constriction.stream.model.Categorical(counts, perfect=False)
        result.append((Ans(words).decode(model, matrix.size) + lowest).reshape(matrix.shape))
    return result


def encode_rows(found: list[Matrix]) -> Coded:
    result: Coded = []
    for matrix in found:
        rows = np.exp2(np.rint(4 * np.log2(np.maximum((matrix.astype(float) ** 2).mean(1), 1e-3))) / 8)
        lowest, highest = int(matrix.min()) - 1, int(matrix.max()) + 1
        coder = Ans()
        family = constriction.stream.model.QuantizedGaussian(lowest, highest)
        widths = np.repeat(rows, matrix.shape[1])
        coder.encode_reverse(matrix.ravel(), family, np.zeros(matrix.size), widths)
        result.append((coder.get_compressed(), len(rows), (lowest, highest, rows)))
    return result


def decode_rows(data: Coded, found: list[Matrix]) -> list[Matrix]:
    result = []
    for (words, _, (lowest, highest, rows)), matrix in zip(data, found, strict=True):
        family = constriction.stream.model.QuantizedGaussian(lowest, highest)
        widths = np.repeat(rows, matrix.shape[1])
        result.append(Ans(words).decode(family, np.zeros(matrix.size), widths).reshape(matrix.shape))
    return result


CONSTRICTION: dict[str, tuple[Any, Any]] = {
    "constriction ANS, a histogram each": (encode_histograms, decode_histograms),
    "constriction ANS, Gaussian rows": (encode_rows, decode_rows),
}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
