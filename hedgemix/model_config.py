"""The network's sizes and parts: the section `model` of a recipe, and of an artifact's header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GATE_CHANNELS = 12
"""The first channels of a position, which decide its gates."""


@dataclass(frozen=True)
class ModelConfig:
    """Set the sizes and parts of the network; widths are in channels."""

    layers: int = 11
    width: int = 512
    heads: int = 8
    kv_heads: int = 8
    """Key/value heads; divides heads."""
    mlp_hidden: int = 1792
    mlp_slope: float = 0.5
    """Slope of leaky ReLU below zero; the activation is leaky_relu squared."""
    rope_dims: int = 16
    """Rotated dimensions of each head (even)."""
    rope_base: float = 10000.0
    rope_scaled_beyond_tokens: int = 1024
    """Training contexts longer than this get NTK scaling of the RoPE base."""
    qk_gain: float = 1.5
    """Initial gain on each head's normalised query."""
    logit_cap: float = 30.0
    """Logits are cap * tanh(z / cap)."""
    embedding_std: float = 0.005
    zero_outputs: bool = False
    """Start the matrices that write to the residual stream (attention's out, the MLP's down) at zero."""
    bigram_buckets: int = 6144
    """Rows of the hashed bigram embedding (0: none)."""
    bigram_width: int = 128
    smear_gate: bool = True
    """Blend each position's input with the one before it."""
    smear_by: Literal["channel", "input"] = "channel"
    """smear_gate: channel: by a learned share of each channel. input: before the first norm, by a share that a
    position's first 12 channels decide."""
    input_mix: bool = True
    """Each block mixes the model's input x0 back in, per channel."""
    skips: bool = True
    """U-shaped skip connections from the first half of the layers to the second."""
    skip_gates: bool = False
    """skips: blend what comes in, scaled, with what is there, by a learned share of each channel, in place of a sum."""
    xsa: bool = True
    """Subtract from each head's output its projection on the position's own value."""
    head_gates: bool = False
    """Multiply each head's output by a sigmoid of the first 12 channels of its layer's normalised input."""
    depth_scale: bool = True
    """Scale each block's normalised input by 1/sqrt(layer + 1)."""
    residual_scale: bool = True
    """Learned per-channel scale on each branch's output."""
    value_embedding_layers: int = 2
    """The last layers that add the value embedding to v (0: none)."""
    value_embedding_width: int = 128
    looped_layers: tuple[int, ...] = ()
    """Layers, from 0 and one after the other, that run loop_passes times in a row (none: each layer runs once); see
    train.loop_from_fraction."""
    loop_passes: int = 3
    lane_layers: int = 0
    """The last layers that have two residual streams, one that attention reads, one that the MLP does (0: none)."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the residual stream where products are in bfloat16 too; where they are not, it is float32."""
    within_documents: bool = False
    """Each position sees only its own document, which begins with BOS, in training and in evaluation."""

    def passes(self, looped: bool = True) -> tuple[int, ...]:
        """List the layers in the order in which they run; looped: with looped_layers as often as they are to run."""
        order, loop = tuple(range(self.layers)), self.looped_layers
        if not looped or not loop:
            return order
        return order[: loop[0]] + self.loop_passes * loop + order[loop[-1] + 1 :]
