"""What a position's first channels decide: how much of each head's output, and of the token before, goes on.

Shapes: B sequences, T positions, D width, H heads, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedgemix.model_config import GATE_CHANNELS


class HeadGate(nn.Module):
    """Multiplies each head's output by a sigmoid of half a product with the first channels; it starts at 1/2."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, GATE_CHANNELS))

    def forward(self, y_BTHE: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate the heads' output (B, T, H, E) by the attention's input (B, T, D); returns (B, T, H, E)."""
        gate_BTH = torch.sigmoid(0.5 * F.linear(x_BTD[..., :GATE_CHANNELS], self.weight))
        return y_BTHE * gate_BTH[..., None].to(y_BTHE.dtype)


class InputSmear(nn.Module):
    """Adds to each position's embedding a share of the one before, chosen by its own first channels; it starts at
    none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(GATE_CHANNELS))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD: Tensor, earlier_BTD: Tensor) -> Tensor:
        """Blend embeddings (B, T, D) with those of the token before each, of the same shape; returns (B, T, D)."""
        share_BT = self.scale * torch.sigmoid((x_BTD[..., :GATE_CHANNELS] * self.weight).sum(-1))
        return torch.addcmul(x_BTD, share_BT[..., None], earlier_BTD)
