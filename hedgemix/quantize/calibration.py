"""Calibration: how much each quantized weight matters, from second moments on training tokens only.

Near trained weights, an error E (R, C) of a matrix adds about 1/2 sum_r G_r e_r H e_r^T nats a token, where H is the
second moment of the matrix's inputs and G_r that of the loss's gradient at output r, its labels drawn from the model
itself (the Fisher information: Martens and Grosse 2015, K-FAC, with a diagonal output factor). The same form holds for
a table of embeddings with H the second moment of the gradient at the embedding, and G_r how often row r is read; and
for the tied output layer, where the moment of its gradient is known in closed form.

A matrix of a layer that runs n times has n inputs and n gradients a token: H is their sum, G their mean. That takes the
passes' errors as unrelated; measured on a small model, three passes lose 1.4 to 2.1 times as much, and one 1.0 to 1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedgemix.config import TrainConfig
from hedgemix.data.dataloader import Batches
from hedgemix.data.shards import TokenStream
from hedgemix.model.layers import autocast
from hedgemix.model.transformer import Linear, Model
from hedgemix.quantize.gptq import add_inputs
from hedgemix.runtime import collectives

MICROBATCH_SEQUENCES = 16
"""Sequences run at once, eagerly and with hooks: 15 GB for the record model at 2,048 tokens. A compiled training step
holds three times as many in less, so its microbatch is none to go by; and no result should depend on that one."""
FREQUENCY_TOKENS = 4_000_000
"""Training tokens in which the rows of tables are counted: reading them is all it takes."""


@dataclass(frozen=True)
class Moments:
    """Holds, by tensor name, a token's mean. Matrices with one input share one Hessian, under `Model.inputs`' key."""

    columns: dict[str, Tensor]
    """H, float32 (C, C)."""
    rows: dict[str, Tensor]
    """G, float32 (R,)."""


def calibrate(model: Model, batches: Batches, config: TrainConfig, device: torch.device) -> Moments:
    """Measure the moments of every matrix and table over calibration sequences of the training stream.

    One forward and one backward pass; the Hessians take 4 C^2 bytes for each distinct input. Ranks add up to what one
    rank gives: labels are drawn by sequence, not by rank.
    """
    shared, linears = model.inputs(), matrices(model)
    owners = [*shared, *(name for name in linears if not name.startswith("blocks."))]
    tables = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    columns = {name: square(linears[name].in_features, device) for name in owners}
    columns |= {name: square(table.embedding_dim, device) for name, table in tables.items()}
    rows = {name: torch.zeros(linear.out_features, device=device) for name, linear in linears.items()}
    rows |= {name: torch.zeros(table.num_embeddings, device=device) for name, table in tables.items()}
    hooks = [linears[name].register_forward_pre_hook(inputs_to(columns[name])) for name in owners]
    hooks += [linear.register_forward_hook(squares_to(rows[name])) for name, linear in linears.items()]
    hooks += [table.register_forward_hook(gradients_to(columns[n])) for n, table in tables.items() if n != TIED]
    chosen = Batches(batches.stream, config.sequence_tokens, config.calibration_sequences, seed=0)
    try:
        for indices in chosen.microbatches(0, collectives.rank(), collectives.world_size(), MICROBATCH_SEQUENCES):
            tokens, _ = batches.read(indices, device)
            with autocast(config.dtype, device):
                features = model.features(tokens)
                logits = model.logits(features)
            add_inputs(columns[TIED], features.detach())
            labels = drawn(logits.detach(), indices, model.config.logit_cap, rows[TIED])
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
            model.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
    count = config.calibration_sequences * config.sequence_tokens
    for moment in columns.values():
        collectives.sum_over(moment).div_(count)
    for name, moment in rows.items():
        collectives.sum_over(moment).div_(count * passes(model, name))
    return Moments(columns, rows | frequencies(model, batches.stream, device))


TIED = "embedding.weight"
"""Read as the output layer, which outweighs its other use as the token embedding."""


def matrices(model: Model) -> dict[str, Linear]:
    """List every matrix of the model, by the name of its weight."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}


def passes(model: Model, name: str) -> int:
    """Count how often a forward pass runs the matrix or table of this name."""
    return model.config.passes().count(int(name.split(".")[1])) if name.startswith("blocks.") else 1


def square(size: int, device: torch.device) -> Tensor:
    """Make a matrix of zeros, float32 (size, size)."""
    return torch.zeros(size, size, device=device)


def inputs_to(total: Tensor) -> Callable[..., None]:
    """Make a hook that adds the outer products of a module's inputs to `total`, float32 (C, C)."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        add_inputs(total, arguments[0].detach().flatten(0, -2))

    return hook


def squares_to(total: Tensor) -> Callable[..., None]:
    """Make a hook that adds the squared gradients at a module's outputs to `total`, float32 (R,)."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        def collect(gradient: Tensor) -> None:
            total.add_(gradient.detach().float().flatten(0, -2).square().sum(0))

        output.register_hook(collect)

    return hook


def gradients_to(total: Tensor) -> Callable[..., None]:
    """Make a hook that adds the outer products of the gradient at a table's outputs to `total`, float32 (C, C)."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        def collect(gradient: Tensor) -> None:
            add_inputs(total, gradient.detach().flatten(0, -2))

        output.register_hook(collect)

    return hook


@torch.no_grad()
def drawn(logits_BTV: Tensor, indices: np.ndarray, cap: float, total_V: Tensor) -> Tensor:
    """Draw labels (B, T) from the model, each sequence by its own generator; and to `total_V` is added the expected
    squared gradient before the cap, `p (1 - p) (1 - tanh^2)^2`."""
    p_BTV = logits_BTV.softmax(-1)
    slope_BTV = 1 - (logits_BTV / cap).square()
    total_V.add_((p_BTV * (1 - p_BTV) * slope_BTV.square()).flatten(0, 1).sum(0))
    uniform = [torch.rand(p_BTV.shape[1], generator=torch.Generator().manual_seed(int(index))) for index in indices]
    chance_BT1 = torch.stack(uniform)[..., None].to(p_BTV.device)
    # A GPU's sums of floats are refused where the same bits are promised again; a CPU's are not.
    place = "cpu" if torch.are_deterministic_algorithms_enabled() else p_BTV.device
    cumulative_BTV = p_BTV.to(place).cumsum(-1).to(p_BTV.device)
    return torch.searchsorted(cumulative_BTV, chance_BT1)[..., 0].clamp_max(p_BTV.shape[-1] - 1)


def frequencies(model: Model, stream: TokenStream, device: torch.device) -> dict[str, Tensor]:
    """Measure how often a token reads each row of the tables that are only read (not the tied one): shares, float32
    (R,)."""
    tokens = torch.from_numpy(stream.read(0, min(len(stream), FREQUENCY_TOKENS)).astype(np.int64)).to(device)
    read = {}
    if model.value_embedding is not None:
        read["value_embedding.table.weight"] = torch.bincount(tokens, minlength=model.vocab_size)
    if model.bigram is not None:
        read["bigram.table.weight"] = torch.bincount(model.bigram.rows(tokens[None])[0], minlength=model.bigram.buckets)
    return {name: count.float() / len(tokens) for name, count in read.items()}
