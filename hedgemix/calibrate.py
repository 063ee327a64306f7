"""Calibration: second moments of every quantized matrix's input, on training tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hedgemix import ranks
from hedgemix.batches import Batches
from hedgemix.config import TrainConfig
from hedgemix.gptq import add_inputs
from hedgemix.model import Model


@torch.no_grad()
def calibrate(
    model: Model, batches: Batches, config: TrainConfig, device: torch.device
) -> tuple[dict[str, Tensor], int]:
    """Unnormalised Hessians (sum of x x^T, float32 (C, C)) of every distinct matrix input over calibration sequences
    of the training stream, and the number of positions summed. Ranks add up to the same as one rank."""
    matrices = model.matrices()
    sums = {
        name: torch.zeros(matrices[name].in_features, matrices[name].in_features, device=device)
        for name in model.inputs()
    }

    def collect(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            add_inputs(sums[name], arguments[0].flatten(0, -2))

        return hook

    hooks = [matrices[name].register_forward_pre_hook(collect(name)) for name in sums]
    chosen = Batches(batches.stream, config.sequence_tokens, config.calibration_sequences, seed=0)
    try:
        for indices in chosen.microbatches(0, ranks.rank(), ranks.world_size(), config.microbatch_sequences):
            tokens, _ = batches.read(indices, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                model.features(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    for value in sums.values():
        ranks.sum_over(value)
    return sums, config.calibration_sequences * config.sequence_tokens
