"""The mixers between the experts and the ensemble, for many positions or for one: evaluation and decoder share them.

Two layers. Linear mixers weigh all experts' probabilities; each has many weight sets, chosen by how much of the context
occurred before and by the neural entropy. Logistic mixers weigh log probabilities: of the linear mixtures, the neural
model, the two lowest and the highest n-gram order, the match and the further experts. They start as the first linear
mixture.

Shapes as in `hedge`; B positions, R row sets, K experts (0 is neural; p_BKV has the others, which row sets share), L
linear mixers, J inputs of a logistic mixer (linear mixtures, then experts), M logistic mixers, G = L + M gates, S
weight sets, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hedgemix.config import MixerConfig
from hedgemix.mixers import linear, logistic


def expert_names(config: MixerConfig, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Name the experts in the order of their rows: neural, order1 ..., match, those of `experts`, then those whose
    rows are given."""
    match = ("match",) if config.match_lengths else ()
    return "neural", *(f"order{n}" for n in config.orders), *match, *config.experts, *given


def classes(config: MixerConfig) -> int:
    """Count the values that `ngram_index.longest_class` takes."""
    return 1 + sum(n > 1 for n in config.orders) + len(config.match_lengths)


def weight_sets(config: MixerConfig) -> int:
    """Compute S, the most weight sets a gate chooses from."""
    return classes(config) * config.entropy_sets


def logistic_experts(config: MixerConfig, given: Sequence[str] = ()) -> list[int]:
    """Choose the experts that logistic mixers see beside the linear mixtures, which bring what the rest know."""
    orders = len(config.orders)
    return sorted({0, *range(1, 1 + orders)[:2], orders, *range(1 + orders, len(expert_names(config, given)))})


def entropy_buckets(config: MixerConfig, neural_log_rows: Tensor) -> Tensor:
    """Measure the entropy of log rows (..., V) in buckets (...): a whole number is the edge of one."""
    entropy = neural_log_rows.exp().mul_(neural_log_rows).sum(-1) / -math.log(neural_log_rows.shape[-1])
    return entropy * (config.entropy_sets + 1)


def gate_sets(config: MixerConfig, gates: Sequence[str], neural_log_rows: Tensor, longest_class: Tensor) -> Tensor:
    """Find each gate's weight set, (..., len(gates)) int64, for neural log rows (..., V) and what of the context
    occurred before (`ngram_index.longest_class`, int64, broadcast to the rows' shape without V): the class, the neural
    entropy's bucket, both or neither."""
    bucket = entropy_buckets(config, neural_log_rows).long().clamp(0, config.entropy_sets - 1)
    sets = _sets(config, bucket, longest_class.expand_as(bucket))
    return torch.stack([sets[gate] for gate in gates], -1)


def gate_numbers(config: MixerConfig, gates: Sequence[str], neural_log_row: Tensor, longest_class: int) -> list[int]:
    """Find what `gate_sets` finds, for one log row (V,)."""
    bucket = int(entropy_buckets(config, neural_log_row).long())
    sets = _sets(config, min(max(bucket, 0), config.entropy_sets - 1), longest_class)
    return [sets[gate] for gate in gates]


def _sets(config: MixerConfig, bucket: Any, longest: Any) -> dict[str, Any]:
    return {
        "none": 0 * bucket,
        "order": longest,
        "entropy": bucket,
        "both": longest * config.entropy_sets + bucket,
    }


@dataclass(frozen=True)
class Positions:
    """Holds what is known of B positions before their tokens are."""

    p_BKV: Tensor
    """Probabilities, float32, of all experts but the neural one, which the row sets share."""
    log_BRJV: Tensor
    """Inputs of the logistic mixers; `Blend.mix` fills in the linear mixtures."""
    gate_BRG: Tensor
    """Weight sets of the linear mixers, then of the logistic ones."""

    def __getitem__(self, here: slice) -> Positions:
        return Positions(self.p_BKV[here], self.log_BRJV[here], self.gate_BRG[here])


@dataclass(frozen=True)
class Mixed:
    """Holds what the mixers said of B positions, and what they learn from once the tokens are known."""

    p_BKV: Tensor
    log_BRJV: Tensor
    gate_BRG: Tensor
    weights_BRLK: Tensor
    """Weights of the linear mixtures, float64; their log rows are the first L of log_BRJV."""
    log_BRMV: Tensor
    """Log rows of the logistic mixers."""


class Blend:
    """Holds the mixers' weights. `mix` never sees a token; `learn` moves the weights after a block was scored."""

    def __init__(
        self,
        config: MixerConfig,
        sets: int,
        vocab_size: int,
        device: torch.device | str,
        given: Sequence[str] = (),
    ) -> None:
        """given: names of the experts whose rows come from elsewhere, after all others."""
        self.config, self.experts = config, logistic_experts(config, given)
        self.names = expert_names(config, given)
        self.gates = (*config.linear_gates, *config.gates)
        self.linears = len(config.linear_gates)
        size, experts = weight_sets(config), len(self.names)
        self.linear = linear.start(sets, self.linears, size, experts, config.linear_rate, device)
        inputs = self.linears + len(self.experts)
        self.logistic = logistic.start(
            sets, config.memory_tokens, size, inputs, config.logistic_ridge, device, vocab_size, config.bias_rate
        )

    def positions(
        self, neural_BRV: Tensor, p_BKV: Tensor, longest_B: Tensor, out_BRJV: Tensor | None = None
    ) -> Positions:
        """Prepare positions from neural log rows or logits (B, R, V), the other experts' probability rows (B, K - 1, V)
        and `ngram_index.longest_class` (B,), int64.

        out_BRJV: float32 memory to use for the inputs of the logistic mixers.
        """
        size, sets, vocab_size = neural_BRV.shape
        shape = size, sets, self.linears + len(self.experts), vocab_size
        log_BRJV = p_BKV.new_empty(shape) if out_BRJV is None else out_BRJV
        # The floor moves no sum by more than V * exp(-60); it keeps impossible tokens from turning into NaN.
        neural_BRV = neural_BRV.float().log_softmax(-1)
        neural_BRV = torch.clamp(neural_BRV, logistic.LOG_FLOOR, out=log_BRJV[:, :, self.linears])
        shared = log_BRJV[:, :, self.linears + 1 :]
        for j, k in enumerate(self.experts[1:]):
            torch.log(p_BKV[:, k - 1], out=shared[:, 0, j])
        shared[:, 0].clamp_min_(logistic.LOG_FLOOR)
        if sets > 1:
            shared[:, 1:] = shared[:, :1]
        return Positions(p_BKV, log_BRJV, gate_sets(self.config, self.gates, neural_BRV, longest_B[:, None]))

    def neural(self, at: Positions | Mixed) -> Tensor:
        """Select the neural model's log rows, (B, R, 1, V) float32: a view."""
        return at.log_BRJV[:, :, self.linears : self.linears + 1]

    def expert_rows(self, at: Positions | Mixed) -> Tensor:
        """Compute log rows of all experts, (B, R, K, V) float32."""
        shared = at.p_BKV.log()[:, None].expand(-1, at.log_BRJV.shape[1], -1, -1)
        return torch.cat([self.neural(at), shared], 2)

    def expert_log_p(self, at: Positions | Mixed, token_B: Tensor) -> Tensor:
        """Compute the tokens' log probabilities, in nats, under every expert, (B, R, K) float64."""
        shared = gather(at.p_BKV[:, None], token_B).log().expand(-1, at.log_BRJV.shape[1], -1)
        return torch.cat([gather(self.neural(at), token_B), shared], 2)

    def mix(self, at: Positions) -> Mixed:
        """Mix the positions by every mixer; moves no weight, and fills the linear mixtures into `at`."""
        weights_BRLK = linear.position_weights(self.linear, at.gate_BRG[..., : self.linears])
        mixed_BRLV = linear.rows(weights_BRLK, self.neural(at)[:, :, 0].exp(), at.p_BKV)
        at.log_BRJV[:, :, : self.linears] = mixed_BRLV.log_()  # torch.compile takes no view for `out`
        rows_BRMV = logistic.rows(self.logistic, at.log_BRJV, at.gate_BRG[..., self.linears :])
        return Mixed(at.p_BKV, at.log_BRJV, at.gate_BRG, weights_BRLK, rows_BRMV)

    def learn(self, said: Mixed, token_B: Tensor) -> None:
        """Move the weights, once the block was scored."""
        linear_BRL, gate_BRM = said.gate_BRG.tensor_split([self.linears], -1)
        linear.learn(self.linear, said.weights_BRLK, self.expert_log_p(said, token_B).exp(), linear_BRL)
        logistic.learn(self.logistic, said.log_BRJV, said.log_BRMV, token_B, gate_BRM)

    def learned(self) -> dict[str, Tensor]:
        """Name what `learn` moves, in the memory that it moves it in, which stays the same."""
        return {
            "linear": self.linear.weights,
            "logistic": self.logistic.weights,
            "curvature": self.logistic.curvature,
            "bias": self.logistic.bias_RMV,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Copy what `learn` moved."""
        return {name: value.clone() for name, value in self.learned().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` over what was learned."""
        for name, value in self.learned().items():
            value.copy_(state[name])


def gather(rows_BRKV: Tensor, token_B: Tensor) -> Tensor:
    """Select each row's value at the position's token, (B, R, K) float64."""
    index = token_B[:, None, None, None].expand(-1, *rows_BRKV.shape[1:3], 1)
    return rows_BRKV.gather(3, index)[..., 0].double()
