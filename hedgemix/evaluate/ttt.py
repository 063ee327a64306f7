"""Score-first test-time training: after a chunk was scored, the model trains on it, and only then.

Notable: the gradient is the same for any number of ranks (each adds its share of one weighted sum); what scores the
next chunk may be a Polyak average of the trained weights (Polyak & Juditsky 1992). With `normalise` and `decay` it is
dynamic evaluation (Krause et al. 2018), its mean squares taken from what was scored.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedgemix.config import TTTConfig
from hedgemix.data.device_text import Ones, Sizes, Text
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.model.layers import autocast
from hedgemix.model.transformer import Model
from hedgemix.runtime import collectives
from hedgemix.runtime.adamw import AdamW
from hedgemix.runtime.flat_gradient import FlatGradient

MICROBATCH_SEQUENCES = 16
"""Sequences whose activations are held at once: about 16 GB for the record model at 2,048 tokens."""
NORMALISE_FLOOR = 0.1
"""Added to a weight's root mean square gradient, as a share of that of all weights: rare ones take no wild steps."""


def trained_parameters(model: Model, last_blocks: int) -> dict[str, nn.Parameter]:
    """Choose what test-time training moves: the last blocks and every learned scale, or all weights when last_blocks is
    0."""
    first = max(0, len(model.blocks) - last_blocks)
    chosen = {}
    for name, parameter in model.named_parameters():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        if last_blocks == 0 or block >= first or name.endswith(("_scale", ".scale", "_scales")):
            chosen[name] = parameter
    return chosen


def rate_factor(config: TTTConfig, chunk: int, n_chunks: int) -> float:
    """Compute the rate's factor after scoring chunk `chunk` (from 0) of `n_chunks`."""
    progress = chunk / max(1, n_chunks - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress)) if config.cosine else 1.0
    ramp = 1 + (config.ramp - 1) * (min(1.0, progress / config.ramp_fraction) if config.ramp_fraction > 0 else 1.0)
    return cosine * ramp


class Adapter:
    """Holds a copy of `model` that learns. `scorer` is the model to score the next chunk with."""

    def __init__(self, model: Model, config: TTTConfig, n_chunks: int, dtype: str) -> None:
        self.config, self.n_chunks, self.dtype = config, n_chunks, dtype
        self.model = copy.deepcopy(model)
        self.parameters = trained_parameters(self.model, config.last_blocks)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.parameters)
        self.gradient = FlatGradient(self.parameters.values())
        self.optimizer = AdamW(
            self.parameters.values(), lr=config.rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.squares = torch.zeros_like(self.gradient.buffer if config.normalise else self.gradient.buffer[:0])
        shipped = dict(model.named_parameters())
        self.shipped: list[Tensor] = [shipped[name].detach() for name in self.parameters]
        self.scorer = copy.deepcopy(model) if config.polyak > 0 else self.model
        averaged = dict(self.scorer.named_parameters())
        self.averages: list[Tensor] = [averaged[name] for name in self.parameters]
        self.trained: list[Tensor] = list(self.parameters.values())
        self.chunks_learned = self.steps = 0

    def learn(self, tokens_N: Tensor | Text, weights_N: Tensor | Sizes | Ones, chunk: Piece) -> None:
        """Train on the chunk's targets, all scored already. `weights_N`: float32, what each target counts."""
        config = self.config
        inputs, targets, weights = sequences(tokens_N, weights_N, chunk, config.sequence_tokens, config.context_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate * rate_factor(config, self.chunks_learned, self.n_chunks)
        for _ in range(config.epochs):
            for start in range(0, len(inputs), config.batch_sequences):
                batch = slice(start, start + config.batch_sequences)
                self.step(inputs[batch], targets[batch], weights[batch])
        self.chunks_learned += 1

    def step(self, inputs_BT: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> None:
        """Take one optimizer step on a batch that the ranks share out."""
        total = weights_BT.sum().clamp_min(1e-9)
        world, rank = collectives.world_size(), collectives.rank()
        mine = [part.tensor_split(world)[rank] for part in (inputs_BT, targets_BT, weights_BT)]
        self.gradient.zero()
        for inputs, targets, weights in zip(*(part.split(MICROBATCH_SEQUENCES) for part in mine), strict=True):
            if not len(inputs):
                continue  # a rank without sequences still joins the sum below
            with autocast(self.dtype, inputs.device):
                logits = self.model.logits(self.model.features(inputs))
                losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            (losses @ weights.flatten() / total).backward()
        self.gradient.reduce(self.config.gradient_clip)
        self.steps += 1
        self.move()
        if self.config.polyak > 0:
            with torch.no_grad():
                # The average starts at the shipped weights; early on it is a plain mean, so it is not stuck there.
                decay = min(self.config.polyak, self.steps / (self.steps + 1))
                torch._foreach_lerp_(self.averages, self.trained, 1 - decay)

    @torch.no_grad()
    def move(self) -> None:
        """Move the weights by the gradients at hand, and back towards the shipped ones by the share `decay`."""
        if self.config.normalise:
            gradient = self.gradient.buffer
            self.squares.lerp_(gradient.square(), 1 / self.steps)
            gradient /= self.squares.sqrt() + NORMALISE_FLOOR * self.squares.mean().sqrt() + 1e-12
            gradients = [weight.grad for weight in self.trained if weight.grad is not None]
            torch._foreach_add_(self.trained, gradients, alpha=-self.optimizer.param_groups[0]["lr"])
        else:
            self.optimizer.step()
        if self.config.decay > 0:
            torch._foreach_lerp_(self.trained, self.shipped, self.config.decay)

    def state_dict(self) -> dict[str, Any]:
        """Collect what was learned, between two chunks; the tensors are the adapter's own. The rest is the shipped
        model's."""
        return {
            "trained": [parameter.detach() for parameter in self.trained],
            "averages": [average.detach() for average in self.averages] if self.config.polyak > 0 else [],
            "optimizer": self.optimizer.state_dict()["state"],
            "squares": self.squares,
            "chunks_learned": self.chunks_learned,
            "steps": self.steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the state's tensors for its own."""
        averages = self.averages if self.config.polyak > 0 else []
        mine = [*self.trained, *averages, self.squares]
        for own, saved in zip(mine, [*state["trained"], *state["averages"], state["squares"]], strict=True):
            own.copy_(saved)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.chunks_learned, self.steps = state["chunks_learned"], state["steps"]


def sequences(
    tokens_N: Tensor | Text, weights_N: Tensor | Sizes | Ones, chunk: Piece, length: int, context: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the chunk's targets into sequences of `length`, behind `context` tokens or as many as all of them have:
    inputs, targets (int64) and weights (float32), each (S, context + length).

    The last sequence reaches back over targets that have their place in the one before; those weigh nothing in it, as
    the context's do.
    """
    start, stop = chunk.start, chunk.stop
    length = min(length, stop - 1)
    first = min(start, stop - length)
    context = min(context, first - 1)
    first -= context
    text, sizes = tokens_N[first - 1 : stop], weights_N[first:stop]  # nothing else is looked at
    stops = torch.arange(start + length, stop + length, length, device=text.device).clamp(max=stop)
    positions = stops[:, None] - context - length + torch.arange(context + length, device=text.device) - first
    weights = sizes[positions].clone()
    weights[:, :context] = 0
    weights[-1, : context + max(0, length - (stop - start - length * (len(stops) - 1)))] = 0
    return text[positions], text[positions + 1], weights
