"""The model for one token more, behind a cache: what `Model.features` and `logits` compute, in a fraction of the time.

One position is some hundred operations on a few hundred numbers each, and PyTorch takes longer to begin one than to do
it. Here NumPy does what goes number by number, and PyTorch the products, on its one thread; both in the memory of the
model's own weights, and in memory of their own that is used again. For float32 on a CPU; rounding aside the rows are
the model's.

Shapes: D width, H heads, G key/value heads, K their width, E head width, R pairs of rotated dimensions, T positions
kept, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hedgemix.model.attention import Cache
from hedgemix.model.transformer import HASH_CURRENT, HASH_PREVIOUS, BigramEmbedding, Block, Model, ValueEmbedding

EPSILON = np.finfo(np.float32).eps
ONE = np.float32(1)


class ModelStep:
    """Runs a model whose weights may move, but not while a cache is at work, whose keys would be of other weights."""

    def __init__(self, model: Model) -> None:
        self.model, config = model, model.config
        width, kv_width = config.width, config.width // config.heads * config.kv_heads
        self.cap = np.float32(config.logit_cap)
        self.cache: Cache | None = None
        self.layers: list[Layer] = []
        # Memory for the vectors that matrices are multiplied with, and for what comes out.
        self.x_D, self.x = paired(width)
        self.y_D, self.y = paired(width)
        self.up_U, self.up = paired(config.mlp_hidden)
        self.qk, self.qk_out = paired(width + kv_width)
        self.v_K, self.v = paired(kv_width)
        self.qk_NE = self.qk.reshape(config.heads + config.kv_heads, -1)
        """The heads' queries, then the keys."""
        self.queries, self.keys = self.qk_out[:width], self.qk_out[width:]

    def __call__(self, cache: Cache, previous: int, token: int, band: int | None) -> tuple[Tensor, Tensor]:
        """Run a token behind `previous` and all before it, which the cache holds: log probabilities (V,), float32, of
        the next token, and the features (D,) that they come from."""
        if cache is not self.cache:
            self.begin(cache)
        at, begins = cache.length, token == self.model.bos_id
        if begins:
            self.before_D[:], self.document_1[:] = 0, at
        x_D = self.embedding_VD[token]
        if self.bigram is not None:
            rows = len(self.bigram.table_VD) - 1
            row = rows if begins else (HASH_CURRENT * token ^ HASH_PREVIOUS * previous) % rows
            x_D = x_D + self.bigram(row)
        unsmeared_D = x_D
        if self.input_smear is not None:
            weight_C, scale = self.input_smear
            x_D = x_D + scale * sigmoid(weight_C @ x_D[: len(weight_C)]) * self.before_D
        x_D = normalised(x_D)
        if self.smear_D is not None:
            unsmeared_D = x_D
            x_D = x_D + (self.before_D - x_D) / self.smear_D
        value_K = None if self.value is None else self.value(token)
        turn = self.cos_TR[at], self.sin_TR[at]
        start = max(int(self.document_1[0]), 0 if band is None else at + 1 - band)
        x0_D, pushed, lane_D = x_D, list[np.ndarray](), x_D
        for layer in self.layers:
            lane_D = x_D if layer.forks else lane_D
            if layer.skip_D is not None:
                popped_D = layer.skip_D * pushed.pop()
                x_D = x_D + popped_D if layer.kept_D is None else popped_D + layer.kept_D * (x_D - popped_D)
            mixed_D = x_D
            if layer.mix_2D is not None:
                mixed_D = layer.mix_2D[0] * x_D + layer.mix_2D[1] * x0_D
            normalised(mixed_D, layer.scale, self.x_D)
            added_K = None if value_K is None or layer.value_scale is None else value_K * layer.value_scale
            y_D = self.attend(layer, added_K, turn, start, at)
            y_D = y_D if layer.attention_scale_D is None else layer.attention_scale_D * y_D
            if layer.lanes_23 is None:
                x_D = mixed_D + y_D
                x_D = x_D + self.mapped(layer, x_D)
            else:
                stay_2, attention_2, mlp_2 = layer.lanes_23.T
                added_2D = np.outer(attention_2, y_D) + np.outer(mlp_2, self.mapped(layer, lane_D))
                x_D, lane_D = stay_2[0] * x_D + added_2D[0], stay_2[1] * lane_D + added_2D[1]
            if layer.pushes:
                pushed.append(x_D)
        if self.layers[-1].lanes_23 is not None:
            x_D = np.float32(0.5) * (x_D + lane_D)
        self.token[0], self.before_D[:] = token, unsmeared_D
        cache.length += 1
        feature_D = normalised(x_D)
        feature = torch.from_numpy(feature_D)
        logits = torch.mv(self.embedding, feature)
        logits_V = logits.numpy()
        logits_V /= self.cap
        np.tanh(logits_V, out=logits_V)
        logits_V *= self.cap
        return logits.log_softmax(0), feature

    def begin(self, cache: Cache) -> None:
        """Take up the weights as they are now, and a cache that holds tokens."""
        model, self.cache = self.model, cache
        self.layers = [Layer.of(model, cache, number) for number in range(len(model.config.passes()))]
        self.embedding = model.embedding.weight.detach()
        self.embedding_VD = self.embedding.numpy()
        self.bigram, self.value = Embedded.of(model.bigram), Embedded.of(model.value_embedding)
        # What the cache remembers of the last token lies in one memory from here on.
        self.before_D = cache.x_B1D[0, 0].numpy().copy()
        self.token = cache.tokens_B1[0].numpy().copy()
        cache.x_B1D, cache.tokens_B1 = torch.from_numpy(self.before_D)[None, None], torch.from_numpy(self.token)[None]
        self.document_1 = np.zeros(1, np.int64) if cache.begins_B is None else cache.begins_B.numpy()
        self.smear_D = None if model.smear is None else 1 + np.exp(-array(model.smear))
        smear = model.input_smear
        self.input_smear = None if smear is None else (array(smear.weight), array(smear.scale))
        angle_TR = np.arange(cache.keys[0].shape[2], dtype=np.float32)[:, None] * model.frequencies.numpy()
        self.cos_TR, self.sin_TR = np.cos(angle_TR), np.sin(angle_TR)

    def attend(
        self, layer: Layer, added_K: np.ndarray | None, turn: tuple[np.ndarray, np.ndarray], start: int, at: int
    ) -> np.ndarray:
        """Attend from position `at` to those from `start` on, for what is in `x_D`; see `Attention.forward`."""
        torch.mv(layer.q, self.x, out=self.queries)
        torch.mv(layer.k, self.x, out=self.keys)
        torch.mv(layer.v, self.x, out=self.v)
        qk_NE, v_GE = self.qk_NE, self.v_K.reshape(layer.kv_heads, -1)
        if added_K is not None:
            self.v_K += added_K
        normalise_rows(qk_NE)
        rotate(qk_NE, *turn)
        q_HE, k_HE, v_HE = qk_NE[: layer.heads], qk_NE[layer.heads :], v_GE
        q_HE *= layer.gain_H1
        if layer.kv_heads != layer.heads:
            k_HE, v_HE = (np.repeat(each, layer.heads // layer.kv_heads, axis=0) for each in (k_HE, v_HE))
        layer.keys_HTE[:, at], layer.values_HTE[:, at] = k_HE, v_HE
        here = slice(start, at + 1)
        scores_HT1 = torch.bmm(torch.from_numpy(layer.keys_HTE[:, here]), torch.from_numpy(q_HE)[:, :, None])
        weights_H1T = scores_HT1.softmax(1).transpose(1, 2)
        y_HE = torch.bmm(weights_H1T, torch.from_numpy(layer.values_HTE[:, here]))[:, 0].numpy()
        if layer.xsa:
            length_H1 = np.maximum(np.sqrt(np.square(v_HE).sum(1, keepdims=True)), np.float32(1e-12))
            toward_HE = v_HE / length_H1
            y_HE = y_HE - (y_HE * toward_HE).sum(1, keepdims=True) * toward_HE
        if layer.gate_HC is not None:
            y_HE = y_HE * sigmoid(layer.gate_HC @ self.x_D[: layer.gate_HC.shape[1]])[:, None]
        torch.mv(layer.out, torch.from_numpy(y_HE.reshape(-1)), out=self.y)
        return self.y_D

    def mapped(self, layer: Layer, x_D: np.ndarray) -> np.ndarray:
        """Compute what the layer's MLP adds to the stream that it reads."""
        normalised(x_D, layer.scale, self.x_D)
        torch.mv(layer.up, self.x, out=self.up)
        np.square(np.where(self.up_U > 0, self.up_U, layer.slope * self.up_U), out=self.up_U)
        torch.mv(layer.down, self.up, out=self.y)
        return self.y_D if layer.mlp_scale_D is None else layer.mlp_scale_D * self.y_D


@dataclass(frozen=True)
class Embedded:
    """Holds the parts of an embedding that goes through a projection, in their own memory."""

    project: Tensor
    table_VD: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, part: BigramEmbedding | ValueEmbedding | None) -> Embedded | None:
        """Look at a model's part, where it has it."""
        if part is None:
            return None
        return cls(part.project.weight.detach(), array(part.table.weight), array(part.scale))

    def __call__(self, row: int) -> np.ndarray:
        """Embed what the row of the table stands for."""
        return torch.mv(self.project, torch.from_numpy(self.table_VD[row])).numpy() * self.scale


@dataclass(frozen=True)
class Layer:
    """Holds the weights of a pass through a layer, in their own memory, what is computed of them alone, and its keys
    and values."""

    heads: int
    kv_heads: int
    xsa: bool
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    scale: np.float32
    slope: np.float32
    gain_H1: np.ndarray
    """What queries are multiplied by: the heads' gains, and 1 / sqrt(E)."""
    gate_HC: np.ndarray | None
    pushes: bool
    """Whether a later pass adds what comes out."""
    skip_D: np.ndarray | None
    kept_D: np.ndarray | None
    """The stream's share of a blend with what was pushed; none: their sum."""
    forks: bool
    """Whether the second stream begins here."""
    lanes_23: np.ndarray | None
    mix_2D: np.ndarray | None
    value_scale: np.float32 | None
    attention_scale_D: np.ndarray | None
    mlp_scale_D: np.ndarray | None
    keys_HTE: np.ndarray
    values_HTE: np.ndarray

    @classmethod
    def of(cls, model: Model, cache: Cache, number: int) -> Layer:
        """Look at pass `number` of a model."""
        config = model.config
        at, before = config.passes()[number], config.passes()[:number]
        block, valued = model.blocks[at], at - (config.layers - config.value_embedding_layers)
        assert isinstance(block, Block)
        part, mlp, popped = block.attention, block.mlp, number - model.pushes
        skips, gates, values = model.skip_weights, model.skip_gates, model.value_embedding
        pops = skips is not None and 0 <= popped < len(skips)
        return cls(
            heads=part.heads,
            kv_heads=part.kv_heads,
            xsa=part.xsa,
            q=part.q.weight.detach(),
            k=part.k.weight.detach(),
            v=part.v.weight.detach(),
            out=part.out.weight.detach(),
            up=mlp.up.weight.detach(),
            down=mlp.down.weight.detach(),
            scale=np.float32(block.depth_scale),
            slope=np.float32(mlp.slope),
            gain_H1=array(part.q_gain)[:, None] * np.float32(1 / math.sqrt(part.head_width)),
            gate_HC=None if part.gate is None else np.float32(0.5) * array(part.gate.weight),
            pushes=skips is not None and number < model.pushes,
            skip_D=array(skips)[popped] if skips is not None and pops else None,
            kept_D=sigmoid(array(gates)[popped]) if gates is not None and pops else None,
            forks=at == config.layers - config.lane_layers and at not in before,
            lanes_23=None if block.lanes is None else array(block.lanes),
            mix_2D=None if block.input_mix is None else array(block.input_mix),
            value_scale=array(values.layer_scales)[valued] if values is not None and valued >= 0 else None,
            attention_scale_D=None if block.attention_scale is None else array(block.attention_scale),
            mlp_scale_D=None if block.mlp_scale is None else array(block.mlp_scale),
            keys_HTE=cache.keys[number][0].numpy(),
            values_HTE=cache.values[number][0].numpy(),
        )


def paired(size: int) -> tuple[np.ndarray, Tensor]:
    """Make a float32 vector that NumPy and PyTorch share."""
    vector = np.empty(size, np.float32)
    return vector, torch.from_numpy(vector)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Compute 1 / (1 + exp(-x)), element by element."""
    return ONE / (ONE + np.exp(-x))


def array(weight: Tensor) -> np.ndarray:
    """Show a weight as an array, in its own memory."""
    return weight.detach().numpy()


def normalised(x_D: np.ndarray, scale: np.float32 = ONE, out_D: np.ndarray | None = None) -> np.ndarray:
    """Give x (D,) a mean square of scale^2, in memory of its own or of `out_D`."""
    mean = np.add.reduce(np.square(x_D)) * np.float32(1 / len(x_D))
    return np.multiply(x_D, scale / np.sqrt(mean + EPSILON), out=out_D)


def normalise_rows(x_NE: np.ndarray) -> None:
    """Give each row a mean square of 1, in its own memory."""
    mean_N1 = np.add.reduce(np.square(x_NE), -1, keepdims=True) * np.float32(1 / x_NE.shape[1])
    x_NE *= ONE / np.sqrt(mean_N1 + EPSILON)


def rotate(x_NE: np.ndarray, cos_R: np.ndarray, sin_R: np.ndarray) -> None:
    """Turn the first 2R dimensions of each row, in its own memory."""
    half = len(cos_R)
    first, second = x_NE[:, :half], x_NE[:, half : 2 * half]
    turned = first * cos_R - second * sin_R
    second *= cos_R
    second += first * sin_R
    first[:] = turned
