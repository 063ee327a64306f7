"""The model for one token more, behind a cache: what `Model.features` and `logits` compute, in a fifth of the time.

One position is some hundred operations on a few hundred numbers each, and PyTorch takes longer to begin one than to do
it. Here NumPy does what goes number by number, in the memory of the model's own weights, and PyTorch the products, on
its one thread. For float32 on a CPU; rounding aside the rows are the model's.

Shapes: D width, H heads, K key/value heads, E head width, R pairs of rotated dimensions, T positions kept, V
vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hedgemix.model.attention import Cache
from hedgemix.model.transformer import HASH_CURRENT, HASH_PREVIOUS, Attention, Block, Model

EPSILON = np.finfo(np.float32).eps


class ModelStep:
    """Runs a model whose weights may move, in the memory that they are in."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []
        """Each layer's keys and values in the cache at work, (H, T, E)."""
        self.cache: Cache | None = None

    @torch.inference_mode()
    def __call__(self, cache: Cache, previous: int, token: int, band: int | None) -> tuple[Tensor, Tensor]:
        """Run a token behind `previous` and all before it, which the cache holds: log probabilities (V,), float32, of
        the next token, and the features (D,) that they come from."""
        if cache is not self.cache:
            self.cache = cache
            self.kept = [(k[0].numpy(), v[0].numpy()) for k, v in zip(cache.keys, cache.values, strict=True)]
        model, at = self.model, cache.length
        x_D = array(model.embedding.weight)[token]
        if model.bigram is not None:
            row = (HASH_CURRENT * token ^ HASH_PREVIOUS * previous) % (model.bigram.buckets - 1)
            more_D = product(model.bigram.project.weight, array(model.bigram.table.weight)[row])
            x_D = x_D + more_D * array(model.bigram.scale)
        x_D = unsmeared_D = normalised(x_D)
        if model.smear is not None:
            x_D = x_D + (cache.x_B1D.numpy()[0, 0] - x_D) / (1 + np.exp(-array(model.smear)))
        value_K = None
        if model.value_embedding is not None:
            value_K = product(
                model.value_embedding.project.weight, array(model.value_embedding.table.weight)[token]
            ) * array(model.value_embedding.scale)
        angle_R = np.float32(at) * model.frequencies.numpy()
        turn = np.cos(angle_R), np.sin(angle_R)
        x0_D, pushed = x_D, list[np.ndarray]()
        first_valued = len(model.blocks) - model.config.value_embedding_layers
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            skipped = model.skip_weights is not None and layer >= model.pushes and pushed
            if model.skip_weights is not None and skipped:
                x_D = x_D + array(model.skip_weights)[layer - model.pushes] * pushed.pop()
            added_K = None
            if value_K is not None and model.value_embedding is not None and layer >= first_valued:
                added_K = value_K * array(model.value_embedding.layer_scales)[layer - first_valued]
            if block.input_mix is not None:
                mix = array(block.input_mix)
                x_D = mix[0] * x_D + mix[1] * x0_D
            start = 0 if band is None else max(0, at + 1 - band)
            y_D = self.attend(block.attention, normalised(x_D, block.depth_scale), added_K, turn, start, at)
            x_D = x_D + (y_D if block.attention_scale is None else array(block.attention_scale) * y_D)
            up = product(block.mlp.up.weight, normalised(x_D, block.depth_scale))
            up = np.square(np.where(up > 0, up, np.float32(block.mlp.slope) * up))
            y_D = product(block.mlp.down.weight, up)
            x_D = x_D + (y_D if block.mlp_scale is None else array(block.mlp_scale) * y_D)
            if model.skip_weights is not None and layer < model.pushes:
                pushed.append(x_D)
        cache.tokens_B1, cache.x_B1D = torch.tensor([[token]]), torch.from_numpy(unsmeared_D)[None, None]
        cache.length += 1
        feature_D, cap = normalised(x_D), np.float32(model.config.logit_cap)
        logits_V = torch.from_numpy(cap * np.tanh(product(model.embedding.weight, feature_D) / cap))
        return logits_V.log_softmax(0), torch.from_numpy(feature_D)

    def attend(
        self,
        part: Attention,
        x_D: np.ndarray,
        added_K: np.ndarray | None,
        turn: tuple[np.ndarray, np.ndarray],
        start: int,
        at: int,
    ) -> np.ndarray:
        """Attend from position `at` to those from `start` on; see `Attention.forward`."""
        v_KE = product(part.v.weight, x_D)
        v_KE = (v_KE if added_K is None else v_KE + added_K).reshape(part.kv_heads, part.head_width)
        q_HE = rotated(normalised(product(part.q.weight, x_D).reshape(part.heads, -1)), *turn)
        k_KE = rotated(normalised(product(part.k.weight, x_D).reshape(part.kv_heads, -1)), *turn)
        q_HE *= array(part.q_gain)[:, None] * np.float32(1 / math.sqrt(part.head_width))
        if part.kv_heads != part.heads:
            k_KE, v_KE = (np.repeat(each, part.heads // part.kv_heads, axis=0) for each in (k_KE, v_KE))
        keys_HTE, values_HTE = self.kept[part.layer]
        keys_HTE[:, at], values_HTE[:, at] = k_KE, v_KE
        here = slice(start, at + 1)
        scores_HT1 = torch.bmm(torch.from_numpy(keys_HTE[:, here]), torch.from_numpy(q_HE)[:, :, None])
        weights_H1T = scores_HT1.softmax(1).transpose(1, 2)
        y_HE = torch.bmm(weights_H1T, torch.from_numpy(values_HTE[:, here]))[:, 0].numpy()
        if part.xsa:
            length_H1 = np.maximum(np.sqrt(np.square(v_KE).sum(1, keepdims=True)), np.float32(1e-12))
            toward_HE = v_KE / length_H1
            y_HE = y_HE - (y_HE * toward_HE).sum(1, keepdims=True) * toward_HE
        return product(part.out.weight, y_HE.reshape(-1))


def array(weight: Tensor) -> np.ndarray:
    """Show a weight as an array, in its own memory."""
    return weight.detach().numpy()


def product(weight: Tensor, x: np.ndarray) -> np.ndarray:
    """Multiply a matrix (outputs, inputs) and a vector."""
    return torch.mv(weight, torch.from_numpy(x)).numpy()


def normalised(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Give x (..., D) a mean square of scale^2 over its last dimension."""
    mean = np.square(x).sum(-1, keepdims=True) * np.float32(1 / x.shape[-1])
    return x * (np.float32(scale) / np.sqrt(mean + EPSILON))


def rotated(x_HE: np.ndarray, cos_R: np.ndarray, sin_R: np.ndarray) -> np.ndarray:
    """Turn the first 2R of each head's dimensions."""
    half, out_HE = len(cos_R), x_HE.copy()
    first, second = x_HE[:, :half], x_HE[:, half : 2 * half]
    out_HE[:, :half] = first * cos_R - second * sin_R
    out_HE[:, half : 2 * half] = first * sin_R + second * cos_R
    return out_HE
