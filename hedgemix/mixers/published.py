"""The published five-expert rule, kept for comparison. Its result is not a code length.

The fifth "expert" gives every outcome the probability exp(-H), H being the neural entropy: over the vocabulary that
adds up to V * exp(-H), far above 1 when the model is sure. The total mass is returned beside the score. As H goes to 0
the "expert" gives every token probability 1, whatever occurs, and the loss it reports falls to 0 without any knowledge.

Of its quirks it keeps those that move the number: every rank of the evaluation moves log weights of its own, over its
share of each chunk, so the result depends on how many there are (`ranks` of `start`, whatever number of processes runs
it); a trigram context's total is never taken below 1 before smoothing, so an unseen one's row adds up to less than 1.

Shapes: B positions, V vocabulary, K = 5 (neural, unigram, bigram, trigram, entropy), N ranks of the published system.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXPERTS = ("neural", "unigram", "bigram", "trigram", "entropy")
WINDOW_TOKENS = 32
"""Scored by one window; ranks share a chunk by whole windows."""


@dataclass
class PublishedState:
    """Holds counts of finished chunks, the ranks' log weights (N, K) float64, and where in an unfinished chunk scoring
    is."""

    unigram_V: Tensor
    bigram_VV: Tensor
    trigram_HV: Tensor
    log_weights_NK: Tensor
    batch_tokens: int
    warm_tokens: int
    counted: int = 0
    shares: tuple[int, ...] = ()
    """Tokens of the open chunk that the current rank, and those after it, have yet to score; the last rank takes what
    comes beyond the chunk."""
    loss_K: Tensor | float = 0.0
    """Losses of the current rank's unfinished batch, and how many tokens they are of."""
    scored: int = 0

    @property
    def log_weights_K(self) -> Tensor:
        """Give those of the rank whose turn it is."""
        return self.log_weights_NK[len(self.log_weights_NK) - len(self.shares)]

    def state_dict(self) -> dict[str, Any]:
        """Collect what finished chunks left but the counts, which `count` can make again: they are most of the
        bytes."""
        return {"log_weights": self.log_weights_NK}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.log_weights_NK = state["log_weights"].to(self.log_weights_NK.device)


def start(
    vocab_size: int, device: torch.device | str = "cpu", ranks: int = 1, buckets: int = 65_536,
    batch_tokens: int = 1024, warm_tokens: int = 10_000,
) -> PublishedState:  # fmt: skip
    """Begin with no counts, log weights (2, 0, 0, 0, 0) a rank. The trigram table takes 4 * buckets * vocab_size bytes.

    A rank's log weights move after each batch of batch_tokens scored tokens (the reference's 32 windows of stride 32).
    Neural only, and no move, until warm_tokens tokens were counted.
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    log_weights_NK = torch.tensor([[2.0, 0, 0, 0, 0]] * ranks, dtype=torch.float64, device=device)
    counts = zeros(vocab_size), zeros(vocab_size, vocab_size), zeros(buckets, vocab_size)
    return PublishedState(*counts, log_weights_NK, batch_tokens, warm_tokens)


def open_chunk(state: PublishedState, tokens: int) -> None:
    """Share the next `tokens` out over the ranks, in order and in whole windows, before any of them is scored."""
    ranks, windows = len(state.log_weights_NK), -(-tokens // WINDOW_TOKENS)
    edges = [min(windows * rank // ranks * WINDOW_TOKENS, tokens) for rank in range(ranks + 1)]
    state.shares = tuple(stop - start for start, stop in itertools.pairwise(edges))
    _next_rank(state)


def score(state: PublishedState, log_rows_BV: Tensor, history_B2: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute losses in nats (B,) float64 and the probability mass (B,) float64 of each position's mixed "row".

    Takes what `losses` takes, of the next B tokens of the open chunk. A rank's weights are the softmax of its log
    weights, which move by -0.1 times each expert's mean loss after a batch and at the end of its share. The state's
    tensors are replaced, none is changed.
    """
    loss_BK, mass_BK = losses(state, log_rows_BV, history_B2, token_B)
    parts = []
    left = 0
    while left < len(token_B):
        right = min(left + state.batch_tokens - state.scored, left + (state.shares[0] or len(token_B)), len(token_B))
        parts.append(mix(state, loss_BK[left:right], mass_BK[left:right]))
        state.loss_K = state.loss_K + loss_BK[left:right].sum(0)
        state.scored += right - left
        state.shares = (max(state.shares[0] - (right - left), 0), *state.shares[1:])
        if state.scored == state.batch_tokens or not state.shares[0]:
            _move(state)
        left = right
    nats, mass = zip(*parts, strict=True)
    return torch.cat(nats), torch.cat(mass)


def losses(state: PublishedState, log_rows_BV: Tensor, history_B2: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each expert's loss in nats and the mass of its "row" over the vocabulary, (B, K) float64 both.

    `log_rows_BV`: neural log probabilities or logits; `history_B2`: the two tokens before, oldest first; `token_B`:
    what occurred. Temperature per position is `1 - 0.02 * (1 - H / ln V)` within [0.9, 1.05].
    """
    neural_BV = log_rows_BV.float().log_softmax(-1)
    vocab_size = neural_BV.shape[1]
    heat_B = 1 - 0.02 * (1 - _entropy(neural_BV) / math.log(vocab_size))
    neural_BV = (neural_BV / heat_B.clamp(0.9, 1.05)[:, None]).log_softmax(-1)
    entropy_B = _entropy(neural_BV).double()
    neural_B = -neural_BV.gather(1, token_B[:, None])[:, 0].double()
    bucket_B = _bucket(history_B2, len(state.trigram_HV))
    unigram_B, one_B = _add_constant(state.unigram_V.expand(len(token_B), -1), token_B, 0.1)
    bigram_B, _ = _add_constant(state.bigram_VV[history_B2[:, 1]], token_B, 0.1)
    trigram_B, trigram_mass_B = _add_constant(state.trigram_HV[bucket_B], token_B, 0.01, least=1)
    loss_BK = torch.stack([neural_B, unigram_B, bigram_B, trigram_B, entropy_B], 1)
    return loss_BK, torch.stack([one_B, one_B, one_B, trigram_mass_B, vocab_size * (-entropy_B).exp()], 1)


def mix(state: PublishedState, loss_BK: Tensor, mass_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mixture's loss and mass, (B,) both, of the experts', with the weights of the rank whose turn it
    is."""
    if state.counted < state.warm_tokens:
        return loss_BK[:, 0], mass_BK[:, 0]
    weights_K = state.log_weights_K.softmax(0)
    return -(weights_K.log() - loss_BK).logsumexp(1), mass_BK @ weights_K


def _move(state: PublishedState) -> None:
    """Move the log weights of the rank whose turn it is by its batch; its share done, the next one's turn comes."""
    if state.counted >= state.warm_tokens:
        moved_NK = state.log_weights_NK.clone()
        moved_NK[len(moved_NK) - len(state.shares)] -= 0.1 * state.loss_K / state.scored
        state.log_weights_NK = moved_NK
    state.loss_K, state.scored = 0.0, 0
    _next_rank(state)


def _next_rank(state: PublishedState) -> None:
    """Pass over ranks that have nothing left to score."""
    while len(state.shares) > 1 and not state.shares[0]:
        state.shares = state.shares[1:]


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


def _add_constant(count_BV: Tensor, token_B: Tensor, constant: float, least: int = 0) -> tuple[Tensor, Tensor]:
    """Loss of each token under counts plus a constant, whose total is taken for `least` at least, and the sum of the
    row's probabilities; (B,) float64 both."""
    hit_B = count_BV.gather(1, token_B[:, None])[:, 0].double() + constant
    total_B, added = count_BV.sum(1).double(), constant * count_BV.shape[1]
    below_B = total_B.clamp_min(least) + added
    return below_B.log() - hit_B.log(), (total_B + added) / below_B


def _entropy(log_rows_BV: Tensor) -> Tensor:
    return -(log_rows_BV.exp() * log_rows_BV.clamp_min(-1e4)).sum(1)
