"""What training is: the part of a recipe that decides a seed's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Set how long a seed is trained, on what batches, and by which rates."""

    budget_seconds: float = 600.0
    """Wall clock for the training loop, EMA and calibration together, summed over restarts."""
    reserve_seconds: float = 18.0
    """Part of the budget kept back from the loop for EMA and calibration."""
    steps: int = 0
    """Train exactly this many steps instead of by the clock; bitwise repeatable on one machine (0: by the clock)."""
    batch_tokens: int = 786_432
    """Tokens in one optimizer step over all workers."""
    sequence_tokens: int = 2048
    """Training context; also the attention band in streaming evaluation."""
    growth_fractions: tuple[float, ...] = ()
    """Fractions of the run at which sequences double in length, to sequence_tokens at the last: until then each is cut
    into 2, 4 or more that do not see each other (none: whole from the start)."""
    microbatch_sequences: int = 48
    """Sequences a worker holds in memory at once; the rest of its share is accumulated."""
    warmup_steps: int = 20
    """Steps on throw-away state before the clock starts, to compile and warm caches."""
    embedding_rate: float = 0.035
    vector_rate: float = 0.025
    matrix_rate: float = 0.025
    weight_decay: float = 0.04
    """A step takes this share of each weight, times its rate."""
    embedding_decay: float | None = None
    """The same for embeddings (None: weight_decay)."""
    vector_decay: float | None = None
    """The same for gains and scales (None: weight_decay)."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    muon_momentum_start: float = 0.92
    muon_momentum: float = 0.99
    muon_momentum_fraction: float = 0.25
    """Fraction of the run over which momentum rises from its start value."""
    muon_equal_rows: bool = False
    """Give the rows of an update one length before it is orthogonalised."""
    newton_schulz: Literal["quintic", "polar_express"] = "quintic"
    """quintic: one polynomial for every step. polar_express: for each of up to five steps the one that is best after
    those before it."""
    newton_schulz_steps: int = 5
    gradient_clip: float = 0.3
    """Largest global gradient norm (0: no clipping)."""
    warmdown_fraction: float = 0.58
    """Last fraction of the run, in which the rate falls linearly to zero."""
    rate_floor: float = 0.0
    """Share of the rate below which it does not fall."""
    ema_decay: float = 0.997
    """Decay per step of the averaged weights that are exported."""
    late_qat: bool = False
    """Train through int quantization of the matrices once the rate factor is below late_qat_below."""
    late_qat_below: float = 0.5
    loop_from_fraction: float = 0.35
    """Fraction of the run from which model.looped_layers run loop_passes times; before it, once."""
    calibration_sequences: int = 128
    """Training sequences whose activations make the Hessians."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Autocast type of the forward and backward pass; weights stay float32."""
    compile: bool = True
    """torch.compile the model."""
    log_every_steps: int = 10
    """Steps between lines of the training log (loss is read from the device only then)."""
