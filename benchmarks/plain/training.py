"""A training step as one writes it first: gradients by parameter, Muon one matrix at a time, averages in a loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hedgemix.batches import Batches
from hedgemix.config import TrainConfig
from hedgemix.model import Linear, Model
from hedgemix.optim import Muon
from hedgemix.schedule import muon_momentum, rate_factor


class PlainRun:
    """The same step as `hedgemix.train.Run`, one rank, without late quantization."""

    def __init__(self, model: Model, config: TrainConfig, batches: Batches, device: torch.device) -> None:
        self.model, self.config, self.batches, self.device, self.step = model, config, batches, device, 0
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        matrices = [module.weight for module in model.modules() if isinstance(module, Linear)]
        taken = {id(parameter) for parameter in tables + matrices}
        vectors = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self.muons = [Muon([matrix], config.weight_decay, config.newton_schulz_steps) for matrix in matrices]
        groups = [(tables, config.embedding_rate), (vectors, config.vector_rate)]
        self.adamw = torch.optim.AdamW(
            [{"params": part, "base_rate": rate} for part, rate in groups],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
        self.averages = [parameter.detach().clone() for parameter in model.parameters()]

    def train_step(self, fraction: float) -> Tensor:
        """The batch's mean loss in nats, a 0-d tensor."""
        config, total = self.config, torch.zeros((), device=self.device)
        self.model.zero_grad()
        for indices in self.batches.microbatches(self.step, 0, 1, config.microbatch_sequences):
            tokens, targets = self.batches.read(indices, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss = self.model(tokens, targets) / (self.batches.per_step * config.sequence_tokens)
            loss.backward()
            total += loss.detach()
        if config.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        factor = rate_factor(fraction, config.warmdown_fraction)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_rate"] * factor
        self.adamw.step()
        for muon in self.muons:
            muon.step(config.matrix_rate * factor, muon_momentum(config, fraction))
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.model.parameters(), strict=True):
                average.lerp_(parameter, 1 - config.ema_decay)
        self.step += 1
        return total
