"""All gradients of a model in one buffer, for training and test-time training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hedgemix.runtime import collectives

ALIGNED_NUMBERS = 4
"""Gradients start at multiples of so many float32 numbers, 16 bytes: what a GPU's kernels read and write at once."""


class FlatGradient:
    """Holds all gradients as views of one float32 buffer: one zeroing, one norm, one all-reduce a step. Zeros fill its
    gaps."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = [-(-parameter.numel() // ALIGNED_NUMBERS) * ALIGNED_NUMBERS for parameter in parameters]
        self.buffer = torch.zeros(sum(sizes), device=parameters[0].device)
        for parameter, piece in zip(parameters, self.buffer.split(sizes), strict=True):
            parameter.grad = piece[: parameter.numel()].view_as(parameter)

    def zero(self) -> None:
        """Set all gradients to zero."""
        self.buffer.zero_()

    def reduce(self, clip: float) -> Tensor:
        """Sum over ranks, scale to a norm of at most `clip` (0: never); returns the norm before, a 0-d tensor."""
        collectives.sum_over(self.buffer)
        norm = self.buffer.norm()
        if clip > 0:
            self.buffer.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        return norm
