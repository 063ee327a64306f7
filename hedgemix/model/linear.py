"""Matrices that can be trained through their quantization."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QAT_LEVELS = 15
QAT_QUANTILE = 0.9995


def fake_quantize(weight: Tensor) -> Tensor:
    """Round `weight` (rows, columns) to 31 levels with one scale a row, with a straight-through gradient (Bengio et al.
    2013)."""
    with torch.no_grad():
        magnitude = weight.float().abs()
        rank = max(1, math.ceil(QAT_QUANTILE * magnitude.shape[1]))
        above = magnitude.shape[1] - rank
        if above:  # kthvalue is not deterministic on a GPU
            largest = magnitude.topk(above + 1, dim=1).values[:, -1:]
        else:  # up to 1,999 columns; a compiler fuses a maximum with what is around it, and calls out for a topk
            largest = magnitude.amax(1, keepdim=True)
        scale = largest.clamp_min(1e-8) / QAT_LEVELS
        rounded = (weight / scale).round().clamp(-QAT_LEVELS, QAT_LEVELS) * scale
    return weight + (rounded - weight).detach()


class Linear(nn.Linear):
    """Multiplies by a matrix, without a bias, that can be trained through its quantization."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor, qat: bool = False) -> Tensor:
        """Map the input (..., inputs) to (..., outputs). qat: by the quantized weights."""
        return F.linear(input, fake_quantize(self.weight) if qat else self.weight)
