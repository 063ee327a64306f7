"""One optimizer step in plain torch: what `hedgemix.train.trainer.Run` is measured against and must agree with.

The model's parameters are the library's; its forward pass is written again here,
operation by operation, with automatic gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hedgemix.config import TrainConfig
from hedgemix.data.dataloader import Batches
from hedgemix.model.linear import Linear, fake_quantize
from hedgemix.model.transformer import Attention, Model
from hedgemix.train.optim import POLAR_EXPRESS
from hedgemix.train.schedule import late_qat, muon_momentum, rate_factor


class PlainRun:
    """One rank. Every matrix has its own Newton-Schulz, the loss is read from the device after every step."""

    def __init__(self, model: Model, config: TrainConfig, batches: Batches, device: torch.device) -> None:
        self.model, self.config, self.batches, self.device = model, config, batches, device
        self.step = 0
        self.matrices = [module.weight for module in model.modules() if isinstance(module, Linear)]
        tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        taken = {id(parameter) for parameter in self.matrices + tables}
        vectors = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self.momenta = [torch.zeros_like(matrix) for matrix in self.matrices]
        groups: list[dict[str, Any]] = [
            {"params": tables, "rate": config.embedding_rate, "weight_decay": config.embedding_decay},
            {"params": vectors, "rate": config.vector_rate, "weight_decay": config.vector_decay},
        ]
        for group in groups:
            if group["weight_decay"] is None:
                group["weight_decay"] = config.weight_decay
        self.adamw = torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps)
        self.averages = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.loss = torch.compile(plain_loss) if config.compile else plain_loss

    def train_step(self, fraction: float) -> float:
        """One optimizer step at this fraction of the run; returns its mean loss per token in nats."""
        config, total = self.config, 0.0
        self.adamw.zero_grad()
        for matrix in self.matrices:
            matrix.grad = None
        sequences = self.batches.indices(self.step)
        length = config.sequence_tokens
        for start in reversed(config.growth_fractions):
            length = length // 2 if fraction < start else length
        for start in range(0, len(sequences), config.microbatch_sequences):
            tokens, targets = self.read(sequences[start : start + config.microbatch_sequences])
            for at in range(0, config.sequence_tokens, length):
                piece = slice(at, at + length)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                    loss = self.loss(self.model, tokens[:, piece], targets[:, piece], late_qat(config, fraction))
                loss = loss / (len(sequences) * config.sequence_tokens)
                loss.backward()
                total += loss.item()
        if config.gradient_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        factor = max(config.rate_floor, rate_factor(fraction, config.warmdown_fraction))
        for group in self.adamw.param_groups:
            group["lr"] = group["rate"] * factor
        self.adamw.step()
        self.muon_step(config.matrix_rate * factor, muon_momentum(config, fraction))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.averages[name].mul_(config.ema_decay).add_(value, alpha=1 - config.ema_decay)
        self.step += 1
        return total

    def read(self, sequences: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (len(sequences), sequence_tokens)."""
        length, stream = self.batches.sequence_tokens, self.batches.stream
        rows = [torch.from_numpy(stream.read(int(i) * length, length + 1).astype(np.int64)) for i in sequences]
        tokens = torch.stack([row[:-1] for row in rows])
        targets = torch.stack([row[1:] for row in rows])
        return tokens.to(self.device), targets.to(self.device)

    @torch.no_grad()
    def muon_step(self, rate: float, momentum: float) -> None:
        for matrix, buffer in zip(self.matrices, self.momenta, strict=True):
            gradient = matrix.grad
            assert gradient is not None
            buffer.mul_(momentum).add_(gradient)
            update = newton_schulz(gradient + momentum * buffer, self.config)
            rows, columns = matrix.shape
            matrix.mul_(1 - rate * self.config.weight_decay)
            matrix.add_(update, alpha=-rate * math.sqrt(max(1, rows / columns)))


def newton_schulz(gradient: Tensor, config: TrainConfig) -> Tensor:
    """The quintic iteration (Jordan et al. 2024, "Muon"), or Polar Express, on one matrix; in bfloat16 on a GPU."""
    polar = config.newton_schulz == "polar_express"
    if config.muon_equal_rows:
        gradient = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
    x = gradient.bfloat16() if gradient.is_cuda else gradient
    if gradient.shape[0] > gradient.shape[1]:
        x = x.T
    x = x / (1.02 * x.norm() + 1e-7) if polar else x / (x.norm() + 1e-7)
    for step in range(config.newton_schulz_steps):
        gram = x @ x.T
        a, b, c = POLAR_EXPRESS[step] if polar else (3.4445, -4.7750, 2.0315)
        x = a * x + (b * gram + c * gram @ gram) @ x
    if gradient.shape[0] > gradient.shape[1]:
        x = x.T
    return x.to(gradient.dtype)


def plain_loss(model: Model, tokens_BT: Tensor, targets_BT: Tensor, qat: bool) -> Tensor:
    """Summed negative log-likelihood in nats, from float32 logits of all positions."""
    cap = model.config.logit_cap
    logits_BTV = cap * torch.tanh(F.linear(plain_features(model, tokens_BT, qat), model.embedding.weight).float() / cap)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def plain_features(model: Model, tokens_BT: Tensor, qat: bool) -> Tensor:
    """Final hidden states (B, T, D) of whole sequences."""
    c, layers = model.config, len(model.blocks)
    x = model.embedding(tokens_BT)
    if model.bigram is not None:
        bigram = model.bigram
        x = x + F.linear(bigram.table(bigram.rows(tokens_BT)), bigram.project.weight) * bigram.scale
    if model.input_smear is not None:
        smear = model.input_smear
        x = x + smear.scale * torch.sigmoid(x[..., :12] @ smear.weight)[..., None] * F.pad(x, (0, 0, 1, 0))[:, :-1]
    x = norm(x)
    if model.smear is not None:
        x = x + torch.sigmoid(model.smear) * (F.pad(x, (0, 0, 1, 0))[:, :-1] - x)
    x0, pushed = x, []
    value = model.value_embedding(tokens_BT) if model.value_embedding is not None else None
    angle = torch.arange(tokens_BT.shape[1], device=x.device)[:, None] * model.frequencies
    lane, order = None, c.passes()
    for number, layer in enumerate(order):
        block = model.blocks[layer]
        if block.lanes is not None and lane is None:
            lane = x
        if model.skip_weights is not None and number >= model.pushes and pushed:
            popped = model.skip_weights[number - model.pushes] * pushed.pop()
            if model.skip_gates is None:
                x = x + popped
            else:
                gate = torch.sigmoid(model.skip_gates[number - model.pushes])
                x = gate * x + (1 - gate) * popped
        stream = x
        if block.input_mix is not None:
            x = block.input_mix[0] * x + block.input_mix[1] * x0
        added, first = None, layers - c.value_embedding_layers
        if model.value_embedding is not None and value is not None and layer >= first:
            added = value * model.value_embedding.layer_scales[layer - first]
        y = plain_attention(block.attention, norm(x) * block.depth_scale, added, angle, qat)
        y = y if block.attention_scale is None else block.attention_scale * y
        x = x + y
        read = x if lane is None else lane
        hidden = F.leaky_relu(linear(block.mlp.up, norm(read) * block.depth_scale, qat), c.mlp_slope).square()
        z = linear(block.mlp.down, hidden, qat)
        z = z if block.mlp_scale is None else block.mlp_scale * z
        x = x + z
        if lane is not None:
            (a, b, d), (e, f, g) = block.lanes
            x, lane = a * stream + b * y + d * z, e * lane + f * y + g * z
        if model.skip_weights is not None and number < model.pushes:
            pushed.append(x)
    return norm(x if lane is None else (x + lane) / 2)


def plain_attention(layer: Attention, x: Tensor, value: Tensor | None, angle: Tensor, qat: bool) -> Tensor:
    B, T, D = x.shape
    q, k, v = (linear(matrix, x, qat) for matrix in (layer.q, layer.k, layer.v))
    v = v if value is None else v + value.to(v.dtype)
    q, k, v = (y.view(B, T, -1, layer.head_width).transpose(1, 2) for y in (q, k, v))
    dtype = v.dtype
    q = (rotary(norm(q.float()), angle) * layer.q_gain.view(-1, 1, 1)).to(dtype)
    k = rotary(norm(k.float()), angle).to(dtype)
    k, v = (y.repeat_interleave(layer.heads // layer.kv_heads, dim=1) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if layer.xsa:
        direction = F.normalize(v, dim=-1)
        y = y - (y * direction).sum(-1, keepdim=True) * direction
    y = y.transpose(1, 2)
    if layer.gate is not None:
        y = y * torch.sigmoid(0.5 * x[..., :12] @ layer.gate.weight.T)[..., None]
    return linear(layer.out, y.reshape(B, T, D), qat)


def rotary(x: Tensor, angle: Tensor) -> Tensor:
    half, cos, sin = angle.shape[1], angle.cos(), angle.sin()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def linear(matrix: Linear, x: Tensor, qat: bool) -> Tensor:
    return F.linear(x, fake_quantize(matrix.weight) if qat else matrix.weight)
