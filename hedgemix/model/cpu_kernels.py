"""Hand-written gradients of the model's parts, for training on a CPU without a compiler; `layers` says when.

Shapes: B sequences, T positions, D width, H heads, E head width, N positions of all sequences, V vocabulary.

Each equals the plain expression in its docstring up to float rounding, with fewer passes over memory and less kept for
the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 1 << 18
"""Logits held at once: 1 MiB in float32, a core's cache."""
ATTENTION_BLOCK = 64
"""Queries whose scores are taken at once; keys behind a block are never multiplied."""
MOST_POSITIONS = 512
"""Longest sequence whose attention weights are kept for the backward pass."""


class RMSNorm(torch.autograd.Function):
    """Computes `scale * x / sqrt(mean(x^2) + eps)` over the last dimension, eps that of float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Normalise x (..., D); keeps the result and 1 / rms (..., 1)."""
        inverse = inverse_rms(x)
        y = x * (inverse if scale == 1 else inverse * scale)
        ctx.save_for_backward(y, inverse)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x (..., D) for that of the result."""
        y, inverse = ctx.saved_tensors
        along = (gradient * y).sum(-1, keepdim=True).mul_(inverse).mul_(-1 / (y.shape[-1] * ctx.scale))
        return (gradient * (inverse * ctx.scale)).addcmul_(y, along), None


def inverse_rms(x: Tensor) -> Tensor:
    """Compute `1 / sqrt(mean(x^2) + eps)` of x (..., D), (..., 1), eps that of its dtype."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(torch.finfo(x.dtype).eps).rsqrt_()


class NormalisedRotary(torch.autograd.Function):
    """Computes `rotate(rms_norm(x), cos, sin)` of heads x (B, T, H, E), transposed to (B, H, T, E) and contiguous."""

    @staticmethod
    def forward(ctx: Any, x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Normalise heads (B, T, H, E) and turn them by cos and sin (T, R); returns and keeps (B, H, T, E)."""
        B, T, H, E = x_BTHE.shape
        inverse = inverse_rms(x_BTHE).transpose(1, 2)
        y = torch.mul(x_BTHE.transpose(1, 2), inverse, out=x_BTHE.new_empty(B, H, T, E))
        turn(y, cos_TR, sin_TR)
        ctx.save_for_backward(y, inverse, cos_TR, sin_TR)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the heads (B, T, H, E) for that of the result (B, H, T, E)."""
        y, inverse, cos_TR, sin_TR = ctx.saved_tensors
        # A turn changes no inner product, so the norm's gradient can be taken first and turned back as a whole.
        along = (gradient * y).sum(-1, keepdim=True).mul_(inverse).mul_(-1 / y.shape[-1])
        back = (gradient * inverse).addcmul_(y, along)
        turn(back, cos_TR, -sin_TR)
        return back.transpose(1, 2), None, None


def turn(x_BHTE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    """Rotate the first 2R dimensions in place."""
    half = cos_TR.shape[-1]
    first, second = x_BHTE[..., :half], x_BHTE[..., half : 2 * half]
    turned = (first * cos_TR).sub_(second * sin_TR)
    second.mul_(cos_TR).addcmul_(first, sin_TR)
    first.copy_(turned)


class CausalAttention(torch.autograd.Function):
    """Computes `scaled_dot_product_attention(q, k, v, is_causal=True)` of (B, H, T, E), keeping the attention
    weights."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """Attend, a block of queries at a time; returns (B, H, T, E) and keeps each block's weights (B * H, block,
        keys)."""
        T, E = q_BHTE.shape[-2:]
        q, k, v = (x.reshape(-1, T, E) for x in (q_BHTE, k_BHTE, v_BHTE))
        y, kept = torch.empty_like(q), []
        later = torch.ones(ATTENTION_BLOCK, ATTENTION_BLOCK, dtype=torch.bool).triu_(1)
        for start in range(0, T, ATTENTION_BLOCK):
            stop = min(T, start + ATTENTION_BLOCK)
            scores = torch.bmm(q[:, start:stop] * (1 / math.sqrt(E)), k[:, :stop].mT)
            scores[:, :, start:].masked_fill_(later[: stop - start, : stop - start], -math.inf)
            weights = scores.softmax(-1)
            y[:, start:stop] = torch.bmm(weights, v[:, :stop])
            kept.append(weights)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y.view(q_BHTE.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v for that of the result, all (B, H, T, E)."""
        q, k, v, y, *kept = ctx.saved_tensors
        T, E = q.shape[-2:]
        shape, gradient = gradient.shape, gradient.reshape(-1, T, E)
        along = (gradient * y).sum(-1, keepdim=True)
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, weights in enumerate(kept):
            start, stop = i * ATTENTION_BLOCK, i * ATTENTION_BLOCK + weights.shape[1]
            rows = gradient[:, start:stop]
            to_v[:, :stop] += torch.bmm(weights.mT, rows)
            scores = torch.bmm(rows, v[:, :stop].mT).sub_(along[:, start:stop]).mul_(weights)
            to_q[:, start:stop] = torch.bmm(scores, k[:, :stop])
            to_k[:, :stop] += torch.bmm(scores.mT, q[:, start:stop])
        scale = 1 / math.sqrt(E)
        return to_q.mul_(scale).view(shape), to_k.mul_(scale).view(shape), to_v.view(shape)


class WithoutProjection(torch.autograd.Function):
    """Computes `y` less its projection on `v`, over the last dimension: `y - (y . d) d` with d = normalize(v)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, v: Tensor) -> Tensor:
        """Subtract the projection of y (..., D) on v (..., D); returns (..., D)."""
        inverse = (v * v).sum(-1, keepdim=True).clamp_min_(1e-24).reciprocal_()
        share = (y * v).sum(-1, keepdim=True).mul_(inverse)
        ctx.save_for_backward(y, v, inverse, share)
        return torch.addcmul(y, v, share, value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of y and v for that of the result, all (..., D)."""
        y, v, inverse, share = ctx.saved_tensors
        other = (gradient * v).sum(-1, keepdim=True).mul_(inverse)
        to_v = (v * (2 * share * other)).addcmul_(y, other, value=-1).addcmul_(gradient, share, value=-1)
        return torch.addcmul(gradient, v, other, value=-1), to_v


class LeakySquare(torch.autograd.Function):
    """Computes `leaky_relu(x, slope)^2`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        """Square leaky_relu(x, slope), element by element; keeps x."""
        ctx.save_for_backward(x)
        ctx.slope = slope
        return F.leaky_relu(x, slope).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x for that of the result, of the same shape."""
        (x,) = ctx.saved_tensors
        return F.leaky_relu(x, ctx.slope**2).mul_(gradient).mul_(2), None


class CappedCrossEntropy(torch.autograd.Function):
    """Computes `cross_entropy(cap * tanh(features @ weight^T / cap), targets, reduction="sum")`.

    Loss and gradient come in one pass over pieces of the logits, which are never held whole. With s = sigmoid(2z/cap),
    cap * tanh(z/cap) is 2 cap s - cap, whose last term a softmax does not see, and tanh's slope is 4 s (1 - s).
    """

    @staticmethod
    def forward(ctx: Any, features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cap: float) -> Tensor:
        """Sum the losses of N features (N, D) in nats, a 0-d tensor; keeps both gradients but for a factor of 4."""
        features, V = features_ND.detach(), len(weight_VD)
        size = max(1, CHUNK_NUMBERS // V)
        room_s, room_p, room_q = (features.new_empty(size, V) for _ in range(3))
        to_features, to_weight = torch.empty_like(features), torch.zeros_like(weight_VD)
        loss = features.new_zeros(())
        for start in range(0, len(features), size):
            x_nD, target_n1 = features[start : start + size], targets_N[start : start + size, None]
            s_nV, p_nV, q_nV = (room[: len(x_nD)] for room in (room_s, room_p, room_q))
            torch.mm(x_nD * (2 / cap), weight_VD.t(), out=s_nV).sigmoid_()
            torch.mul(s_nV, 2 * cap, out=q_nV)
            torch.softmax(q_nV, -1, out=p_nV)
            # The largest probability cannot underflow, whatever the cap.
            loss += (q_nV.amax(-1, keepdim=True) - p_nV.amax(-1, keepdim=True).log_() - q_nV.gather(1, target_n1)).sum()
            p_nV.scatter_add_(1, target_n1, p_nV.new_full((1, 1), -1.0).expand(len(x_nD), 1))
            p_nV.mul_(torch.addcmul(s_nV, s_nV, s_nV, value=-1, out=q_nV))
            torch.mm(p_nV, weight_VD, out=to_features[start : start + size])
            to_weight.addmm_(p_nV.t(), x_nD)
        ctx.save_for_backward(to_features, to_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of features (N, D) and weight (V, D) for that of the loss, a 0-d tensor."""
        to_features, to_weight = ctx.saved_tensors
        return to_features * (4 * gradient), to_weight * (4 * gradient), None, None
