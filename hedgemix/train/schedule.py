"""Schedules as pure functions of the elapsed fraction of the run, so that a test can drive them with a fake clock."""

from __future__ import annotations

from hedgemix.config import TrainConfig


def elapsed_fraction(config: TrainConfig, step: int, elapsed_seconds: float) -> float:
    """Return how much of the training loop is over, 0 to 1: by steps when their number is fixed, else by the clock."""
    if config.steps:
        return min(1.0, step / config.steps)
    return min(1.0, elapsed_seconds / (config.budget_seconds - config.reserve_seconds))


def rate_factor(fraction: float, warmdown_fraction: float) -> float:
    """Return 1, then fall linearly to 0 over the last `warmdown_fraction` of the run."""
    if warmdown_fraction <= 0:
        return 1.0
    return min(1.0, max(0.0, (1.0 - fraction) / warmdown_fraction))


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
    return config.late_qat and rate_factor(fraction, config.warmdown_fraction) < config.late_qat_below
