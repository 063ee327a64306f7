"""Quantization, coding of the codes, and the optimizer, at the shapes of recipe `record` (weights are random)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import zstandard
from torch import Tensor

from benchmarks.plain import quantization as plain
from benchmarks.suite.setup import Agreement, Bench, Costs, Row
from benchmarks.suite.timing import compare
from hedgemix.artifact.tensors import Stepped, steps
from hedgemix.config import QuantizeConfig
from hedgemix.entropy import matrices
from hedgemix.model.transformer import Model
from hedgemix.quantize import bit_allocation, quantizer
from hedgemix.quantize.calibration import Moments
from hedgemix.train.optim import Muon
from pipeline.forecast import operations

MEAN_CODE = 2.4
"""Mean magnitude of the codes: about 3.6 bits a weight, which 33 M weights in 16 MB may take."""
CONDITION = 1e4
"""Largest over smallest input variance."""
ZSTD_PARTS = 8
"""zstd's level 22 takes a minute for all codes: it gets this part of them, and its seconds are scaled."""
EQUAL_CODES = 0.001
"""Share of codes that may differ from the published algorithm's: float32 rounds differently near a half."""


def subject(bench: Bench) -> tuple[Model, dict[str, Tensor], Moments]:
    """A model with random weights, its quantized tensors, and moments that inputs with a decaying spectrum would give:
    one random matrix a size, the scales of its columns drawn anew for each input."""
    torch.manual_seed(2)
    model = Model(bench.sizes.export, 1024, 2048, draw=False)
    bases: dict[int, Tensor] = {}
    columns, rows = {}, {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    weights = {name: each.detach() for name, each in model.named_parameters() if quantizer.is_quantized(each)}
    owner = {name: shared for shared, names in model.inputs().items() for name in names}
    for name, weight in weights.items():
        size, key = weight.shape[1], owner.get(name, name)
        if size not in bases:
            mixed = torch.randn(2 * size, size) @ (torch.eye(size) + 0.5 * torch.randn(size, size) / size**0.5)
            bases[size] = mixed.mT @ mixed / (2 * size)
        if key not in columns:
            scale = torch.logspace(0, -0.5 * np.log10(CONDITION), size)[torch.randperm(size)]
            columns[key] = (bases[size] * scale[:, None] * scale).to(bench.device)
        rows[name] = (1e-4 * torch.rand(len(weight)).exp()).to(bench.device)
    return model.to(bench.device), {n: w.to(bench.device) for n, w in weights.items()}, Moments(columns, rows)


def codes_at(model: Model, weights: dict[str, Tensor], moments: Moments, theta: float) -> dict[str, Stepped]:
    """The library's way for one theta: factors, steps and codes of all tensors."""
    config = QuantizeConfig()
    known, _ = quantizer.sensitivities(model, moments, list(weights), config.damping)
    return quantizer.round_to_integers(weights, known, theta, config.block_columns)


def usual_theta(model: Model, weights: dict[str, Tensor], moments: Moments) -> float:
    """The theta with the mean code `MEAN_CODE`."""
    known, _ = quantizer.sensitivities(model, moments, list(weights), QuantizeConfig().damping)
    total = sum(
        float((weights[name].abs() * each.rows_R.sqrt()[:, None] * each.pivots_C.sqrt()).mean() * weights[name].numel())
        for name, each in known.items()
    )
    return total / MEAN_CODE / sum(weight.numel() for weight in weights.values())


def quantization(bench: Bench) -> Iterator[Row]:
    """All weights for one theta, compression left out; the published algorithm is told the steps."""
    model, weights, moments = subject(bench)
    config, theta = QuantizeConfig(), usual_theta(model, weights, moments)
    known, _ = quantizer.sensitivities(model, moments, list(weights), config.damping)
    owner = {name: shared for shared, names in model.inputs().items() for name in names}
    told = {name: [steps(index) for index in bit_allocation.indices(each, theta)] for name, each in known.items()}

    def published() -> dict[str, Tensor]:
        return {
            name: plain.quantize(
                weight, moments.columns[owner.get(name, name)], *told[name], config.damping, config.block_columns
            )
            for name, weight in weights.items()
        }

    compared = compare(published, partial(codes_at, model, weights, moments, theta), bench.sizes.heavy_repeats, 0)
    a, b = compared.results
    count = sum(weight.numel() for weight in weights.values())
    differ = sum(int((codes != b[name].codes).sum()) for name, codes in a.items()) / count
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights.values()]
    inputs = [len(moment) for moment in moments.columns.values()]
    yield bench.row(
        ("quantization", "codes for one theta", f"{count:,} weights", "published GPTQ, matrix by matrix"),
        compared,
        Costs("weights", count, operations.gptq_operations(shapes, inputs),
              8 * count + 8 * sum(size**2 for size in inputs)),
        Agreement("share of codes that differ", differ, EQUAL_CODES),
    )  # fmt: skip


def coding(bench: Bench) -> Iterator[Row]:
    """Those codes to bytes and back, on the CPU, beside zstd's highest level on int8."""
    model, weights, moments = subject(bench)
    found = codes_at(model, weights, moments, usual_theta(model, weights, moments))
    codes = [each.codes.cpu().contiguous().numpy() for each in found.values()]
    pairs = [tuple(index.cpu().numpy().astype(np.int64) for index in (each.row_index, each.column_index))
             for each in found.values()]  # fmt: skip
    small = np.concatenate([each.ravel() for each in codes]).clip(-128, 127).astype(np.int8)
    part = small.size // (ZSTD_PARTS if small.size > 2**22 else 1)
    sample = small[:part].tobytes()
    count, factor = small.size, small.size / len(sample)
    zstd, unzstd = zstandard.ZstdCompressor(level=22), zstandard.ZstdDecompressor()
    compared = compare(partial(zstd.compress, sample), partial(matrices.encode, codes, pairs), 1, 0)
    packed, data = compared.results
    shapes = [each.shape for each in codes]
    decoded = compare(
        partial(unzstd.decompress, packed), partial(matrices.decode, data, shapes, pairs), bench.sizes.heavy_repeats
    )
    back = max(int(abs(one - other).max()) for one, other in zip(decoded.results[1], codes, strict=True))
    agreement = Agreement("decoded codes", float(back), 0.0)
    scaled = f"; zstd on 1/{factor:.0f} of them, scaled" if factor > 1 else ""
    ratio = f"{8 * len(data) / count:.3f} bits a weight, zstd {8 * len(packed) / len(sample):.3f}{scaled}"
    for what, each in (("encode", compared), ("decode", decoded)):
        yield bench.row(
            ("coding", what, f"{count:,} weights", "zstd level 22 of int8 codes"),
            each.scaled(factor),
            Costs("weights", count, 0.0, 4 * count + len(data)),
            agreement,
            note=ratio,
        )


def optimizer(bench: Bench) -> Iterator[Row]:
    """One step of Muon on all matrices, beside the same one matrix at a time."""
    shapes = operations.matrix_shapes(bench.sizes.export)
    torch.manual_seed(3)
    grouped = [torch.nn.Parameter(torch.randn(shape, device=bench.device) * 0.02) for shape in shapes]
    for parameter in grouped:
        parameter.grad = torch.randn_like(parameter)
    single = copy.deepcopy(grouped)
    for mine, other in zip(single, grouped, strict=True):
        assert other.grad is not None
        mine.grad = other.grad.clone()
    rounds = bench.sizes.short.train.newton_schulz_steps
    together = Muon(grouped, bench.sizes.short.train)
    alone = [Muon([parameter], bench.sizes.short.train) for parameter in single]

    def one_by_one() -> None:
        for each in alone:
            each.step(0.025, 0.95)

    compared = compare(one_by_one, partial(together.step, 0.025, 0.95), bench.sizes.heavy_repeats, 0)
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(single, grouped, strict=True))
    count = sum(rows * columns for rows, columns in shapes)
    yield bench.row(
        ("optimizer", "Muon, one step", f"{len(shapes)} matrices, {count:,} weights", "Muon, matrix by matrix"),
        compared,
        Costs("weights", count, operations.muon_operations(shapes, rounds), 20 * count,
              "bfloat16" if bench.device.type == "cuda" else "float32"),
        Agreement("weights", apart, 1e-2 if bench.device.type == "cuda" else 1e-5),
    )  # fmt: skip
