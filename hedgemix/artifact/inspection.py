"""Where the bytes of an artifact go: by section, and by tensor with what an ideal coder would have taken.

For a person's terminal; everything is read back from the file, nothing from the model that made it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.format import Parts
from hedgemix.artifact.tensors import OCTAVE, Stepped
from hedgemix.entropy import matrices


@dataclass(frozen=True)
class Organ:
    """Tells the room that one tensor of an artifact takes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    n_bytes: float
    """Its share of the file; of a compressed section, by its bytes before."""
    ideal_bits: float | None
    """stepped: entropy of its codes under the histograms of their widths; quantized: of its levels.
    Without scales, steps or widths."""
    median_step: float | None
    """Of the steps of its rows times columns, or of its rows' scales."""

    @property
    def weights(self) -> int:
        """Count its elements."""
        return math.prod(self.shape)


def organs(parts: Parts) -> list[Organ]:
    """Measure every tensor, in the file's order; their bytes add up to those of the five sections of tensors."""
    stepped = iter(_stepped(parts))
    codes = torch.frombuffer(bytearray(parts.codes or b"\0"), dtype=torch.int8)
    halves = torch.frombuffer(bytearray(parts.halves or b"\0\0"), dtype=torch.float16)
    first_code = first_scale = 0
    measured = []
    for name, kind, shape in parts.table:
        weights = math.prod(shape)
        if kind == "stepped":
            n_bytes, ideal, step = next(stepped)
            measured.append(Organ(name, kind, shape, n_bytes, ideal, step))
            continue
        ideal_bits = median = None
        n_bytes = weights * artifact.KINDS[kind] * _rate(parts, _section(kind))
        if kind == "quantized":
            rows = math.prod(shape[:-1])
            n_bytes += 2 * rows * _rate(parts, "halves")
            ideal_bits = entropy_bits(codes[first_code : first_code + weights])
            scales = halves[first_scale : first_scale + rows]
            median = float(scales.float().median()) if rows else None
            first_code, first_scale = first_code + weights, first_scale + rows
        measured.append(Organ(name, kind, shape, n_bytes, ideal_bits, median))
    return measured


def entropy_bits(codes: Tensor) -> float:
    """Count the bits of integer codes (any shape) under their own histogram."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum()) if len(counts) else 0.0


def _section(kind: str) -> str:
    return {"quantized": "codes", "float16": "halves", "float32": "singles"}[kind]


def _rate(parts: Parts, section: str) -> float:
    """Bytes as stored for each byte of the section."""
    length, stored = parts.lengths[section]
    return stored / length if length else 0.0


def _stepped(parts: Parts) -> list[tuple[float, float, float]]:
    """Of each stepped tensor: bytes (what the tables charge, scaled to the file's), ideal bits, median step."""
    if not parts.stepped:
        return []
    steps = [_indices(each) for each in parts.stepped]
    sizes = matrices.sizes([each.codes.numpy() for each in parts.stepped], steps)
    charged = np.array([size.coded_bits + size.side_bits for size in sizes])
    indices = np.array([len(rows) + len(columns) for rows, columns in steps])
    n_bytes = parts.lengths["weights"][1] * charged / max(charged.sum(), 1e-9)
    n_bytes += parts.lengths["steps"][1] * indices / max(indices.sum(), 1)
    middles = [2 ** (float(np.median(np.add.outer(*pair))) / OCTAVE) if pair[0].size else 0.0 for pair in steps]
    return list(zip(n_bytes.tolist(), [size.ideal_bits for size in sizes], middles, strict=True))


def _indices(tensor: Stepped) -> tuple[np.ndarray, np.ndarray]:
    return tensor.row_index.numpy().astype(np.int64), tensor.column_index.numpy().astype(np.int64)


def show(path: Path, console: Console) -> None:
    """Print what the artifact holds; raises ArtifactError as reading it does."""
    parts = artifact.read_parts(path)
    measured = organs(parts)
    weights = sum(organ.weights for organ in measured)
    console.print(
        f"{path}: {parts.n_bytes:,} bytes, {weights:,} weights, {8 * parts.n_bytes / max(1, weights):.3f} bits each; "
        f"recipe {parts.header.get('recipe')}, seed {parts.header.get('seed')}; sha256 {parts.sha256[:16]}"
    )
    if parts.memory:
        length, stored = parts.lengths["memory"]
        console.print(
            f"memory: {len(parts.memory):,} training documents, {length:,} bytes of text in {stored:,}, "
            f"{8 * stored / length:.3f} bits each"
        )
    console.print(_sections(parts))
    console.print(_tensors(measured))


def _sections(parts: Parts) -> Table:
    table = Table("section", box=None, title="sections", title_justify="left")
    for name in ("bytes", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    stored = {name: sizes[1] for name, sizes in parts.lengths.items()}
    stored["prefix and checksum"] = parts.n_bytes - sum(stored.values())
    for name, size in stored.items():
        if size:
            table.add_row(name, f"{size:,}", f"{size / parts.n_bytes:.1%}", bar(size, max(stored.values())))
    return table


def _tensors(measured: list[Organ]) -> Table:
    """Fits 80 columns: a tensor that has no steps says there how it is stored."""
    table = Table(box=None, title="tensors (coded, ideal: bits a weight; step: the median)", title_justify="left")
    table.add_column("tensor", no_wrap=True)
    for name in ("shape", "bytes", "coded", "ideal", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    largest = max((organ.n_bytes for organ in measured), default=0.0)
    for organ in measured:
        table.add_row(
            organ.name.removesuffix(".weight"),
            "x".join(map(str, organ.shape)) or "1",
            f"{organ.n_bytes:,.0f}",
            f"{8 * organ.n_bytes / max(1, organ.weights):.2f}",
            "" if organ.ideal_bits is None else f"{organ.ideal_bits / max(1, organ.weights):.2f}",
            organ.kind if organ.median_step is None else f"{organ.median_step:.3f}",
            bar(organ.n_bytes, largest, 8),
        )
    return table


def bar(value: float, largest: float, longest: int = 32) -> Text:
    """Draw a bar of eighths of a character."""
    eighths = round(8 * longest * value / largest) if largest else 0
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style="cyan")
