"""The published five-expert rule, kept for comparison. Its result is not a code length.

The fifth "expert" gives every outcome the probability exp(-H), H being the neural entropy: over the vocabulary that
adds up to V * exp(-H), far above 1 when the model is sure. The total mass is returned beside the score. As H goes to 0
the "expert" gives every token probability 1, whatever occurs, and the loss it reports falls to 0 without any knowledge.

Shapes: B positions, V vocabulary, K = 5 (neural, unigram, bigram, trigram, entropy).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXPERTS = ("neural", "unigram", "bigram", "trigram", "entropy")


@dataclass
class PublishedState:
    """Counts of finished chunks, log weights (K,) float64 and what of an unfinished batch was scored."""

    unigram_V: Tensor
    bigram_VV: Tensor
    trigram_HV: Tensor
    log_weights_K: Tensor
    loss_K: Tensor
    scored: int = 0
    counted: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All but the counts, which `count` can make again: they are most of the bytes."""
        return {"log_weights": self.log_weights_K, "loss": self.loss_K, "scored": self.scored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.log_weights_K.device
        self.log_weights_K, self.loss_K = state["log_weights"].to(device), state["loss"].to(device)
        self.scored = state["scored"]


def start(vocab_size: int, device: torch.device | str = "cpu", buckets: int = 65_536) -> PublishedState:
    """No counts, log weights (2, 0, 0, 0, 0). The trigram table takes 4 * buckets * vocab_size bytes."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    log_weights_K = torch.tensor([2.0, 0, 0, 0, 0], dtype=torch.float64, device=device)
    counts = zeros(vocab_size), zeros(vocab_size, vocab_size), zeros(buckets, vocab_size)
    return PublishedState(*counts, log_weights_K, torch.zeros_like(log_weights_K))


def score(
    state: PublishedState, log_rows_BV: Tensor, history_B2: Tensor, token_B: Tensor, batch_tokens: int = 1024,
    warm_tokens: int = 10_000, sharpness: float = 0.02,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses in nats (B,) float64 and the probability mass (B,) float64 of each position's mixed "row".

    `log_rows_BV`: neural log probabilities or logits; `history_B2`: the two tokens before, oldest first; `token_B`:
    what occurred. Temperature per position is `1 - sharpness * (1 - H / ln V)` within [0.9, 1.05]. Weights are the
    softmax of the log weights, which move by -0.1 times each expert's mean loss per batch. The reference's batch is 32
    windows; here tokens are scored in one stream, so a batch is batch_tokens scored tokens (32 windows of stride 32).
    Neural only, and no move, until warm_tokens tokens were counted.
    """
    neural_BV = log_rows_BV.float().log_softmax(-1)
    vocab_size = neural_BV.shape[1]
    heat_B = 1 - sharpness * (1 - _entropy(neural_BV) / math.log(vocab_size))
    neural_BV = (neural_BV / heat_B.clamp(0.9, 1.05)[:, None]).log_softmax(-1)
    entropy_B = _entropy(neural_BV).double()
    neural_B = -neural_BV.gather(1, token_B[:, None])[:, 0].double()
    if state.counted < warm_tokens:
        return neural_B, torch.ones_like(neural_B)
    bucket_B = _bucket(history_B2, len(state.trigram_HV))
    unigram_B = _add_constant(state.unigram_V.expand(len(token_B), -1), token_B, 0.1)
    bigram_B = _add_constant(state.bigram_VV[history_B2[:, 1]], token_B, 0.1)
    trigram_B = _add_constant(state.trigram_HV[bucket_B], token_B, 0.01)
    loss_BK = torch.stack([neural_B, unigram_B, bigram_B, trigram_B, entropy_B], 1)
    mass_BK = torch.ones_like(loss_BK)
    mass_BK[:, 4] = vocab_size * (-entropy_B).exp()
    mixed, mass = [], []
    left = 0
    while left < len(token_B):
        right = min(left + batch_tokens - state.scored, len(token_B))
        weights_K = state.log_weights_K.softmax(0)
        mixed.append(-(weights_K.log() - loss_BK[left:right]).logsumexp(1))
        mass.append(mass_BK[left:right] @ weights_K)
        state.loss_K = state.loss_K + loss_BK[left:right].sum(0)
        state.scored += right - left
        if state.scored == batch_tokens:
            state.log_weights_K = state.log_weights_K - 0.1 * state.loss_K / batch_tokens
            state.loss_K, state.scored = torch.zeros_like(state.loss_K), 0
        left = right
    return torch.cat(mixed), torch.cat(mass)


def count(state: PublishedState, history_B2: Tensor, token_B: Tensor) -> None:
    """Count a chunk, after all of it was scored."""
    vocab_size = len(state.unigram_V)
    one_B = torch.ones_like(token_B, dtype=torch.int32)
    bucket_B = _bucket(history_B2, len(state.trigram_HV))
    state.unigram_V.index_add_(0, token_B, one_B)
    state.bigram_VV.view(-1).index_add_(0, history_B2[:, 1] * vocab_size + token_B, one_B)
    state.trigram_HV.view(-1).index_add_(0, bucket_B * vocab_size + token_B, one_B)
    state.counted += len(token_B)


def _bucket(history_B2: Tensor, buckets: int) -> Tensor:
    return ((36313 * history_B2[:, 0]) ^ (27191 * history_B2[:, 1])) % buckets


def _add_constant(count_BV: Tensor, token_B: Tensor, constant: float) -> Tensor:
    """Loss of each token under counts plus a constant, (B,) float64."""
    hit_B = count_BV.gather(1, token_B[:, None])[:, 0].double() + constant
    return (count_BV.sum(1).double() + constant * count_BV.shape[1]).log() - hit_B.log()


def _entropy(log_rows_BV: Tensor) -> Tensor:
    return -(log_rows_BV.exp() * log_rows_BV.clamp_min(-1e4)).sum(1)
