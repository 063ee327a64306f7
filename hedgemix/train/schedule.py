"""Schedules as pure functions of the elapsed fraction of the run, so that a test can drive them with a fake clock."""

from __future__ import annotations

from typing import NamedTuple

from hedgemix.config import TrainConfig


def elapsed_fraction(config: TrainConfig, step: int, elapsed_seconds: float) -> float:
    """Return how much of the training loop is over, 0 to 1: by steps when their number is fixed, else by the clock."""
    if config.steps:
        return min(1.0, step / config.steps)
    return min(1.0, elapsed_seconds / (config.budget_seconds - config.reserve_seconds))


def rate_factor(fraction: float, warmdown_fraction: float, floor: float = 0.0) -> float:
    """Return 1, then fall linearly to 0 over the last `warmdown_fraction` of the run, but not below the floor."""
    if warmdown_fraction <= 0:
        return 1.0
    return min(1.0, max(floor, (1.0 - fraction) / warmdown_fraction))


def muon_momentum(config: TrainConfig, fraction: float) -> float:
    """Rise linearly from `muon_momentum_start` to `muon_momentum` over the first `muon_momentum_fraction`."""
    if config.muon_momentum_fraction <= 0:
        return config.muon_momentum
    progress = min(1.0, fraction / config.muon_momentum_fraction)
    return config.muon_momentum_start + progress * (config.muon_momentum - config.muon_momentum_start)


def looped(config: TrainConfig, fraction: float) -> bool:
    """Tell whether the model's loop of layers runs as often as it is to, at this point of the run."""
    return fraction >= config.loop_from_fraction


def late_qat(config: TrainConfig, fraction: float) -> bool:
    """Tell whether the matrices train through their quantization at this point of the run."""
    rate = rate_factor(fraction, config.warmdown_fraction, config.rate_floor)
    return config.late_qat and rate < config.late_qat_below


def pieces(config: TrainConfig, fraction: float) -> int:
    """Count the pieces that a sequence is cut into at this point of the run."""
    return 2 ** sum(fraction < grown for grown in config.growth_fractions)


class StepKind(NamedTuple):
    """Holds what a compiler makes a graph of its own for."""

    qat: bool
    """The matrices train through their quantization."""
    looped: bool
    """The model's loop of layers runs as often as it is to (always, where it has none)."""
    pieces: int
    """Parts that each sequence is cut into, which do not see each other."""


def step_kind(config: TrainConfig, loops: bool, fraction: float) -> StepKind:
    """Tell the kind of step at this point of the run. loops: whether the model has a loop of layers."""
    return StepKind(late_qat(config, fraction), not loops or looped(config, fraction), pieces(config, fraction))


def step_kinds(config: TrainConfig, loops: bool) -> list[StepKind]:
    """List every kind of step that a run may have."""
    lengths = [2**halvings for halvings in range(len(config.growth_fractions) + 1)]
    quantized, ways = (False, True)[: 1 + config.late_qat], (True, False)[: 1 + loops]
    return [StepKind(qat, way, cut) for cut in lengths for way in ways for qat in quantized]
