"""The model's parts as plain expressions, and when the gradients of `cpu_kernels` take their place.

Shapes: B sequences, T positions, D width, H heads, E head width, R pairs of rotated dimensions, V vocabulary.

A compiled graph fuses the plain expressions itself, so the hand-written ones are for eager mode: `by_hand` says when.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedgemix.model import cpu_kernels
from hedgemix.model.documents import Documents

UNTOUCHED = 4
"""A table with this many times more rows than a batch has positions gets its gradient row by row."""


def by_hand(x: Tensor) -> bool:
    """Tell whether `x` is trained on here: on a CPU, eagerly, with gradients, in its own precision."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Compute a model's products in bfloat16 where `dtype` says so, and everything in float32 where not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


class Table(nn.Embedding):
    """Embeds; its gradient, where a buffer waits for it, is the few rows that were read, not a dense table."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up the row of each of the input's numbers, int64 (...); returns (..., D)."""
        weight = self.weight
        few = by_hand(weight) and weight.grad is not None and len(weight) > UNTOUCHED * input.numel()
        return F.embedding(input, weight, sparse=few)


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """Give `x` (..., D) a mean square of `scale`^2 over its last dimension, in float32 where `x` is in bfloat16."""
    if by_hand(x):
        return cpu_kernels.RMSNorm.apply(x, scale)
    # Of its own, torch would round to bfloat16 on a CPU, with that type's eps: 0.008 beside a mean square of 1.
    y = F.rms_norm(x.float() if x.dtype == torch.bfloat16 else x, (x.shape[-1],))
    return y * scale if scale != 1 else y


def rotate(x_BHTE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021) to the first 2R of each head's dimensions."""
    half = cos_TR.shape[-1]
    first, second, rest = x_BHTE.split([half, half, x_BHTE.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos_TR - second * sin_TR, first * sin_TR + second * cos_TR, rest], dim=-1)


def normalised_rotary(x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Normalise heads (B, T, H, E), then rotate them to their positions; returns (B, H, T, E)."""
    if by_hand(x_BTHE):
        return cpu_kernels.NormalisedRotary.apply(x_BTHE, cos_TR, sin_TR)
    return rotate(rms_norm(x_BTHE.transpose(1, 2)), cos_TR, sin_TR)


def causal_attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, documents: Documents | None = None) -> Tensor:
    """Attend from every position to itself and all before it, in its document if they are given; returns (B, H, T,
    E)."""
    if documents is not None and by_hand(q_BHTE):
        return document_by_document(q_BHTE, k_BHTE, v_BHTE, documents.lengths())
    if by_hand(q_BHTE) and k_BHTE.shape[2] <= cpu_kernels.MOST_POSITIONS:
        return cpu_kernels.CausalAttention.apply(q_BHTE, k_BHTE, v_BHTE)
    if documents is not None:
        mask = documents.mask(q_BHTE.shape[2])
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=mask)
    return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)


def document_by_document(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, lengths: list[list[int]]) -> Tensor:
    """Attend within each document by itself, which costs no more than masked products of whole rows; returns (B, H, T,
    E). lengths: of each row's documents."""
    rows = []
    for each, *row in zip(lengths, q_BHTE.split(1), k_BHTE.split(1), v_BHTE.split(1), strict=True):
        parts = zip(*(x.split(each, 2) for x in row), strict=True)
        rows.append(torch.cat([F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts], 2))
    return torch.cat(rows)


def without_projection(y: Tensor, v: Tensor) -> Tensor:
    """Take from `y` its projection on `v`, over the last dimension; both have one shape."""
    if by_hand(y):
        return cpu_kernels.WithoutProjection.apply(y, v)
    direction = F.normalize(v, dim=-1)
    return y - (y * direction).sum(-1, keepdim=True) * direction


def leaky_square(x: Tensor, slope: float) -> Tensor:
    """Square leaky_relu(x, slope), element by element."""
    if by_hand(x):
        return cpu_kernels.LeakySquare.apply(x, slope)
    return F.leaky_relu(x, slope).square()


def capped_logits(features: Tensor, weight_VD: Tensor, cap: float) -> Tensor:
    """Multiply features (..., D) with the vocabulary's weights; returns logits (..., V), float32, within `cap`."""
    return cap * torch.tanh(F.linear(features, weight_VD).float() / cap)


def capped_cross_entropy(features_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, cap: float) -> Tensor:
    """Sum the negative log-likelihood of the targets under `capped_logits`, in nats; returns a float32 scalar."""
    if by_hand(features_BTD):
        return cpu_kernels.CappedCrossEntropy.apply(features_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), cap)
    logits = capped_logits(features_BTD, weight_VD, cap)
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")
