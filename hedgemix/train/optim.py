"""Muon for matrices, AdamW for the rest.

Notable: Muon stacks matrices of one shape, orthogonalises them in one batched Newton-Schulz, and gives each rank its
share of the stack; momentum lives in the stack. It is a decayed sum: while it rises, every gradient has entered with
the same weight. torch.optim.Muon keeps an average, in which those of the start, at 0.92, weigh eight times those that
enter at 0.99. At a steady momentum the two are proportional, and orthogonalising makes them one: there torch's, one
matrix at a time on every rank, is the test's oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedgemix.config import RecipeError, TrainConfig
from hedgemix.model.transformer import Linear, Model
from hedgemix.runtime import collectives
from hedgemix.runtime.adamw import AdamW

# Quintic with the slope at zero maximised (Jordan et al. 2024, "Muon", section Newton-Schulz).
QUINTIC = (3.4445, -4.7750, 2.0315)
# Each minimises the largest error that is left after it, for singular values from 0.001 (Amsel et al. 2025, "The Polar
# Express"), somewhat damped against rounding in bfloat16.
POLAR_EXPRESS = (
    (8.156555, -22.483293, 15.87877),
    (4.04293, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.46449),
    (2.346541, -1.709783, 0.423236),
)
POLAR_EXPRESS_MARGIN = 1.02
"""Its polynomials take singular values up to 1 less this, for rounding's sake."""


def orthogonalise(x_NRC: Tensor, config: TrainConfig) -> Tensor:
    """Push every singular value of each matrix of the stack (N, R, C) to about 1, of rows of one length if
    `muon_equal_rows` says so; computed in bfloat16 on a GPU."""
    polar = config.newton_schulz == "polar_express"
    x = F.normalize(x_NRC, dim=-1) if config.muon_equal_rows else x_NRC
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / ((POLAR_EXPRESS_MARGIN if polar else 1.0) * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in (POLAR_EXPRESS if polar else (QUINTIC,) * config.newton_schulz_steps)[: config.newton_schulz_steps]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_NRC.dtype)


class Muon:
    """Moves matrices by their momentum, a decayed sum of gradients, orthogonalised by Newton-Schulz, with
    decoupled weight decay, Nesterov, and the step scaled by sqrt(max(1, rows / columns))."""

    def __init__(self, parameters: Iterable[Tensor], config: TrainConfig) -> None:
        self.config = config
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        self.stacks = list(shapes.values())
        self.momenta = [torch.zeros(len(stack), *stack[0].shape, device=stack[0].device) for stack in self.stacks]

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        """Take one step from the parameters' gradients, which it leaves as they are; every rank calls this."""
        updates = []
        for stack, momentum_NRC in zip(self.stacks, self.momenta, strict=True):
            gradient_NRC = torch.stack([parameter.grad for parameter in stack if parameter.grad is not None])
            momentum_NRC.mul_(momentum).add_(gradient_NRC)
            updates.append(self.start_orthogonalise(gradient_NRC.add_(momentum_NRC, alpha=momentum)))
        for stack, finish in zip(self.stacks, updates, strict=True):
            update_NRC = finish()
            rows, columns = stack[0].shape
            scale = -rate * math.sqrt(max(1.0, rows / columns))
            torch._foreach_mul_(stack, 1 - rate * self.config.weight_decay)
            torch._foreach_add_(stack, list(update_NRC.unbind()), alpha=scale)

    def start_orthogonalise(self, x_NRC: Tensor) -> Callable[[], Tensor]:
        """Begin to `orthogonalise`, each rank doing its part of the stack; parts travel while the next stack is worked
        on. Returns the function that waits for the whole, (N, R, C)."""
        world = collectives.world_size()
        if world == 1:
            done = orthogonalise(x_NRC, self.config)
            return lambda: done
        count = len(x_NRC)
        share = -(-count // world)
        padded = torch.cat([x_NRC, x_NRC.new_zeros(share * world - count, *x_NRC.shape[1:])])
        mine = orthogonalise(padded[collectives.rank() * share :][:share], self.config)
        finish = collectives.start_gather(mine)
        return lambda: torch.cat(finish())[:count]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: each stack's momentum (N, R, C), not copied."""
        return {"sums": self.momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a checkpoint's momentum. Raises RecipeError for a state whose momentum is an average, which no sum can
        go on from to the same bits."""
        if "sums" not in state:
            raise RecipeError("an earlier hedgemix left this checkpoint, with averaged momentum; remove its folder")
        for mine, saved in zip(self.momenta, state["sums"], strict=True):
            mine.copy_(saved)


class Optimizers:
    """Holds the recipe's two optimizers over one model, moved by one rate factor."""

    def __init__(self, model: Model, config: TrainConfig) -> None:
        embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        matrices = [module.weight for module in model.modules() if isinstance(module, Linear)]
        taken = {id(parameter) for parameter in embeddings + matrices}
        vectors = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self.config = config
        self.muon = Muon(matrices, config)
        own = config.embedding_decay, config.vector_decay
        decays = [config.weight_decay if decay is None else decay for decay in own]
        self.adamw = AdamW(
            [
                {"params": embeddings, "base_rate": config.embedding_rate, "weight_decay": decays[0]},
                {"params": vectors, "base_rate": config.vector_rate, "weight_decay": decays[1]},
            ],
            lr=config.vector_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, rate_factor: float, momentum: float) -> None:
        """Take one step of both. rate_factor: multiplies every rate. momentum: Muon's."""
        for group in self.adamw.param_groups:
            group["lr"] = group["base_rate"] * rate_factor
        self.adamw.step()
        self.muon.step(self.config.matrix_rate * rate_factor, momentum)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of both, not copied."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept of both; raises RecipeError as `Muon.load_state_dict` does."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


class EMA:
    """Averages a model's weights exponentially over the steps."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights by 1 - decay."""
        torch._foreach_lerp_(self.averages, self.parameters, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and their averages."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)
