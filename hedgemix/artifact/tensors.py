"""Quantized tensors in memory, and the float32 weights they stand for: the same bits on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_INDEX = 127
OCTAVE = 8
"""Steps are 2^(index / OCTAVE)."""
PARTS = torch.tensor(
    [1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], dtype=torch.float32
)
"""2^(i / OCTAVE), written out: no library's rounding of a power decides what an artifact holds."""


@dataclass(frozen=True)
class Stored:
    """Holds a quantized tensor: codes int8 (..., R, C), scale float16 (..., R)."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Stepped:
    """Holds a matrix as integers: codes int32 (R, C), step indices int8 (R,) and (C,)."""

    codes: Tensor
    row_index: Tensor
    column_index: Tensor


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply codes (..., R, C) by their rows' scale (..., R), in float32."""
    return codes.float() * scale.float()[..., None]


def steps(index: Tensor) -> Tensor:
    """Make float32 steps of int8 indices (any shape): a power of two times one of `PARTS`, exact."""
    octave = torch.div(index.int(), OCTAVE, rounding_mode="floor")
    return torch.ldexp(PARTS.to(index.device)[(index.int() - OCTAVE * octave).long()], octave)


def stepped_weights(tensor: Stepped) -> Tensor:
    """Make the float32 weights (R, C) that decoding gives."""
    return tensor.codes.float() * steps(tensor.row_index)[:, None] * steps(tensor.column_index)
