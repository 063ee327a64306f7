"""The language model: a small transformer with cheap extra memory, every part switchable by the recipe.

Shapes: B sequences, T positions, D width, H heads, K key/value heads, E head width, V vocabulary.

Notable: attention either sees everything before it in its sequence (training, sliding windows) or the last `band`
tokens of a running stream (streaming evaluation), and both give position t the same answer whatever comes after t.
Late QAT is an argument of `forward`, not an attribute that a compiled graph could fold away.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hedgemix.config import ModelConfig
from hedgemix.model.attention import Cache, attention
from hedgemix.model.documents import Documents, earlier
from hedgemix.model.gates import HeadGate, InputSmear
from hedgemix.model.layers import (
    Table,
    capped_cross_entropy,
    capped_logits,
    leaky_square,
    normalised_rotary,
    rms_norm,
    without_projection,
)
from hedgemix.model.linear import Linear
from hedgemix.validate import check_model

# Multipliers of the bigram hash; both are odd, so no token is lost before the modulo.
HASH_CURRENT, HASH_PREVIOUS = 36313, 27191


def rotary_base(config: ModelConfig, context_tokens: int) -> float:
    """Scale the RoPE base (NTK) for the context the model is trained at (not the one it is run at)."""
    stretch = context_tokens / config.rope_scaled_beyond_tokens
    if stretch <= 1 or config.rope_dims <= 2:
        return config.rope_base
    return config.rope_base * stretch ** (config.rope_dims / (config.rope_dims - 2))


class Attention(nn.Module):
    """Attends from each position to itself and earlier ones, with normalised, rotated queries and keys and a gain a
    head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.xsa = config.heads, config.kv_heads, config.xsa
        self.head_width = config.width // config.heads
        kv_width = self.head_width * config.kv_heads
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, kv_width)
        self.v = Linear(config.width, kv_width)
        self.out = Linear(config.width, config.width)
        self.q_gain = nn.Parameter(torch.full((config.heads,), config.qk_gain))
        self.gate = HeadGate(config.heads) if config.head_gates else None

    def forward(
        self,
        x_BTD: Tensor,
        value_BTK: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        band: int | None,
        qat: bool,
        cache: Cache | None,
        last: int,
        number: int,
        documents: Documents | None,
    ) -> Tensor:
        """Attend from the last positions of the normalised input (B, T, D); returns (B, last, D).

        value_BTK: what is added to the values before they are cut into key-value heads. cos, sin: (T, R), of these
        positions. qat: by quantized weights. number: of the pass through a layer, whose own keys the cache has.
        documents: the rows', where a position sees only its own.
        """
        B, T, D = x_BTD.shape

        q = self.q(x_BTD[:, T - last :], qat).view(B, last, self.heads, self.head_width)
        k = self.k(x_BTD, qat).view(B, T, self.kv_heads, self.head_width)
        v = self.v(x_BTD, qat)
        v = v if value_BTK is None else v + value_BTK.to(v.dtype)
        v = v.view(B, T, self.kv_heads, self.head_width).transpose(1, 2)
        dtype = v.dtype
        q = normalised_rotary(q.float(), cos[T - last :], sin[T - last :])
        q = (q * self.q_gain.view(-1, 1, 1)).to(dtype)
        k = normalised_rotary(k.float(), cos, sin).to(dtype)
        if self.kv_heads != self.heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        if cache is None:
            y = attention(q, k, v, band, documents)
        else:
            y = cache.attend(number, q, k, v, band, documents)
        if self.xsa:
            y = without_projection(y, v[:, :, T - last :])
        y = y.transpose(1, 2)
        if self.gate is not None:
            y = self.gate(y, x_BTD[:, T - last :])
        return self.out(y.reshape(B, last, D), qat)


class MLP(nn.Module):
    """Maps each position on its own: up, leaky_relu squared, down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.slope = config.mlp_slope
        self.up = Linear(config.width, config.mlp_hidden)
        self.down = Linear(config.mlp_hidden, config.width)

    def forward(self, x_BTD: Tensor, qat: bool) -> Tensor:
        """Map (B, T, D) to (B, T, D). qat: by quantized weights."""
        return self.down(leaky_square(self.up(x_BTD, qat), self.slope), qat)


class Block(nn.Module):
    """Adds attention, then an MLP, each of the normalised stream, to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(config), MLP(config)
        self.depth_scale = 1 / math.sqrt(layer + 1) if config.depth_scale else 1.0
        ones = torch.ones(config.width)
        self.input_mix = nn.Parameter(torch.stack([ones, 0 * ones])) if config.input_mix else None
        self.attention_scale = nn.Parameter(ones.clone()) if config.residual_scale else None
        self.mlp_scale = nn.Parameter(ones.clone()) if config.residual_scale else None
        in_lanes = layer >= config.layers - config.lane_layers
        self.lanes = nn.Parameter(torch.tensor([[1.1, 1.0, 1.0]] * 2)) if in_lanes else None
        """Of each lane: what stays of it, and what attention and MLP add to it."""

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        value: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        band: int | None,
        qat: bool,
        cache: Cache | None,
        last: int,
        number: int,
        documents: Documents | None,
        lane: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the layer on the residual stream (B, T, D); returns its last positions, (B, last, D).

        x0: the stream that entered the first layer, (B, T, D), which `input_mix` blends in. lane: the second stream
        (B, T, D) of a layer that has `lanes`, which then returns both. The rest is `Attention.forward`'s.
        """
        here = x.shape[1] - last
        mixed = x
        if self.input_mix is not None:
            mix = self.input_mix.to(x.dtype)
            mixed = mix[0] * x + mix[1] * x0
        normed = rms_norm(mixed, self.depth_scale)
        y = self.attention(normed, value, cos, sin, band, qat, cache, last, number, documents)
        y = y if self.attention_scale is None else self.attention_scale.to(x.dtype) * y
        if self.lanes is None or lane is None:
            x = mixed[:, here:] + y
            return x + self.mapped(x, qat)
        x, lane = x[:, here:], lane[:, here:]
        z = self.mapped(lane, qat)
        first, second = self.lanes.to(x.dtype)
        return first[0] * x + first[1] * y + first[2] * z, second[0] * lane + second[1] * y + second[2] * z

    def mapped(self, x: Tensor, qat: bool) -> Tensor:
        """Compute what the MLP adds to the stream (B, T, D) that it reads."""
        y = self.mlp(rms_norm(x, self.depth_scale), qat)
        return y if self.mlp_scale is None else self.mlp_scale.to(x.dtype) * y


class BigramEmbedding(nn.Module):
    """Embeds the last two tokens, hashed into `bigram_buckets` rows (the last row: no previous token, which is so of
    `alone` too)."""

    def __init__(self, config: ModelConfig, alone: int | None) -> None:
        super().__init__()
        self.buckets, self.alone = config.bigram_buckets, alone
        self.table = Table(config.bigram_buckets, config.bigram_width)
        self.project = Linear(config.bigram_width, config.width)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def rows(self, tokens_BT: Tensor) -> Tensor:
        """Hash each position's tokens to its row of the table, int64 (B, T)."""
        current, previous = tokens_BT[:, 1:], tokens_BT[:, :-1]
        row = torch.bitwise_xor(HASH_CURRENT * current, HASH_PREVIOUS * previous) % (self.buckets - 1)
        if self.alone is not None:
            row = row.masked_fill(current == self.alone, self.buckets - 1)
        return F.pad(row, (1, 0), value=self.buckets - 1)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Embed each position of the tokens (B, T); returns (B, T, D)."""
        return self.project(self.table(self.rows(tokens_BT))) * self.scale


class ValueEmbedding(nn.Module):
    """Embeds a token for the last layers, which add it to their values."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, config.value_embedding_width)
        self.project = Linear(config.value_embedding_width, config.width // config.heads * config.kv_heads)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(config.value_embedding_layers))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Embed the tokens (B, T); returns (B, T, K), K the width of all key-value heads."""
        return self.project(self.table(tokens_BT)) * self.scale


class Model(nn.Module):
    """Computes `features`, then `logits`; both take any context up to the one the model was trained at, or a longer
    stream with a band. `context_tokens` is the training context and fixes the RoPE base. draw: draw initial weights;
    not worth the seconds when others are loaded. bos_id: the token that begins documents; a model of config's
    `within_documents` runs with it only."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, context_tokens: int, draw: bool = True, bos_id: int | None = None
    ) -> None:
        super().__init__()
        check_model(config)
        self.config, self.vocab_size, self.context_tokens = config, vocab_size, context_tokens
        self.bos_id = bos_id if config.within_documents else None
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.bigram = BigramEmbedding(config, self.bos_id) if config.bigram_buckets else None
        by_channel = config.smear_gate and config.smear_by == "channel"
        self.smear = nn.Parameter(torch.zeros(config.width)) if by_channel else None
        self.input_smear = InputSmear() if config.smear_gate and not by_channel else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.pushes = len(config.passes()) // 2
        self.skip_weights = nn.Parameter(torch.ones(self.pushes, config.width)) if config.skips else None
        self.skip_gates = nn.Parameter(torch.zeros(self.pushes, config.width)) if config.skip_gates else None
        self.value_embedding = ValueEmbedding(config, vocab_size) if config.value_embedding_layers else None
        base = rotary_base(config, context_tokens)
        frequencies = base ** -(torch.arange(0, config.rope_dims, 2) / max(config.rope_dims, 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.frequencies: Tensor
        if draw:
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the initial weights from torch's global generator; the same seed gives the same weights."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                if min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)
                if name.endswith((".out", ".down")):
                    module.weight.mul_(0 if self.config.zero_outputs else 1 / math.sqrt(2 * self.config.layers))
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std)
        if self.bigram is not None:
            # The table starts at zero; a projection that did too would keep both gradients at zero for ever.
            nn.init.zeros_(self.bigram.table.weight)
        if self.value_embedding is not None:
            nn.init.normal_(self.value_embedding.table.weight, std=0.01)
            nn.init.zeros_(self.value_embedding.project.weight)

    def start_cache(self, positions: int, sequences: int = 1) -> Cache:
        """Make an empty cache for texts of up to `positions` tokens."""
        config, like = self.config, self.embedding.weight
        shape = (sequences, config.heads, positions, config.width // config.heads)
        keys, values = ([like.new_zeros(shape) for _ in config.passes()] for _ in range(2))
        begins = None if self.bos_id is None else like.new_zeros(sequences).long()
        tokens, x = like.new_zeros(sequences, 1).long(), like.new_zeros(sequences, 1, config.width)
        return Cache(keys, values, tokens, x, begins)

    def features(
        self,
        tokens_BT: Tensor,
        band: int | None = None,
        qat: bool = False,
        cache: Cache | None = None,
        last: int | None = None,
        looped: bool = True,
    ) -> Tensor:
        """Compute the normalised final hidden states (B, T, D); position t depends on tokens 0..t only (the last `band`
        positions of each layer below, when a band is given). last: only of so many last positions, (B, last, D); the
        last pass then makes keys and values for the others, and no more. looped: run the recipe's loop of layers, as
        ever but for the beginning of training.

        With a cache the tokens follow those already run through it: any number into an empty one, then one at a time.
        """
        assert not self.config.within_documents or self.bos_id is not None, "a model within documents needs bos_id"
        length = cache.length if cache is not None else 0
        documents = None if self.bos_id is None else Documents(tokens_BT, self.bos_id)
        assert length == 0 or tokens_BT.shape[1] == 1, "a cache that holds tokens takes one more at a time"
        x = self.embedding(tokens_BT)
        if self.bigram is not None:
            if cache is not None and length:
                x = x + self.bigram(torch.cat([cache.tokens_B1, tokens_BT], 1))[:, 1:]
            else:
                x = x + self.bigram(tokens_BT)
        unsmeared, kept_B1D = x, cache.x_B1D if cache is not None and length else None
        if self.input_smear is not None:
            x = self.input_smear(x, earlier(x, kept_B1D, documents))
        x = rms_norm(x)
        if self.config.residual_dtype == "bfloat16" and torch.is_autocast_enabled(x.device.type):
            x = x.bfloat16()  # from here on; every norm and the loss are in float32 again
        if self.smear is not None:
            unsmeared = x
            x = x + torch.sigmoid(self.smear).to(x.dtype) * (earlier(x, kept_B1D, documents) - x)
        x0 = x
        value = None if self.value_embedding is None else self.value_embedding(tokens_BT)
        angle = torch.arange(length, length + tokens_BT.shape[1], device=x.device)[:, None] * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        first_valued = len(self.blocks) - self.config.value_embedding_layers
        pushed: list[Tensor] = []
        lane: Tensor | None = None
        order = self.config.passes(looped)
        pushes = len(order) // 2
        for number, layer in enumerate(order):
            if layer == len(self.blocks) - self.config.lane_layers and lane is None:
                lane = x
            if self.skip_weights is not None and number >= pushes and pushed:
                x = self.join(x, pushed.pop(), number - pushes)
            added = None
            if self.value_embedding is not None and value is not None and layer >= first_valued:
                added = value * self.value_embedding.layer_scales[layer - first_valued]
            wanted = last if last is not None and number == len(order) - 1 else x.shape[1]
            x = self.blocks[layer](x, x0, added, cos, sin, band, qat, cache, wanted, number, documents, lane)
            if lane is not None:
                x, lane = x
            if self.skip_weights is not None and number < pushes:
                pushed.append(x)
        if lane is not None:
            x = 0.5 * (x + lane)
        if cache is not None:
            cache.advance(tokens_BT, unsmeared, documents)
        return rms_norm(x)

    def join(self, x: Tensor, pushed: Tensor, number: int) -> Tensor:
        """Bring what an earlier pass pushed back to the stream, both (B, T, D), by the weights of skip `number`."""
        assert self.skip_weights is not None
        pushed = self.skip_weights[number].to(x.dtype) * pushed
        if self.skip_gates is None:
            return x + pushed
        return torch.lerp(pushed, x, torch.sigmoid(self.skip_gates[number]).to(x.dtype))

    def logits(self, features: Tensor) -> Tensor:
        """Compute the capped logits (…, V) in float32 of features (…, D)."""
        return capped_logits(features, self.embedding.weight, self.config.logit_cap)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, qat: bool = False, looped: bool = True) -> Tensor:
        """Sum the negative log-likelihood of the targets in nats, a float32 scalar."""
        features = self.features(tokens_BT, qat=qat, looped=looped)
        return capped_cross_entropy(features, self.embedding.weight, targets_BT, self.config.logit_cap)

    def matrices(self) -> dict[str, Linear]:
        """Name the attention and MLP matrices: what Muon trains with the projections, and what GPTQ quantizes."""
        return {
            f"{name}.weight": module
            for name, module in self.named_modules()
            if isinstance(module, Linear) and name.startswith("blocks.")
        }

    def inputs(self) -> dict[str, list[str]]:
        """Group the matrices' names by the first whose input they share (q, k and v read the same activations)."""
        shared: dict[str, list[str]] = {}
        for name in self.matrices():
            head, _, _ = name.partition(".attention.")
            key = f"{head}.attention.q.weight" if name.endswith((".k.weight", ".v.weight")) else name
            shared.setdefault(key, []).append(name)
        return shared


def parameter_count(model: nn.Module) -> int:
    """Count the weights of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
