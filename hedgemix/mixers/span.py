"""A span of positions: the memory that holds what is said of it, and what the network scores there.

Shapes as in `network`; C = K + 0 or 1 + M: the experts, the first linear mixer where there is one, the logistic mixers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hedgemix.mixers.network import Blend, Positions, gather


@dataclass(frozen=True)
class TargetLogP:
    """Log probabilities, in nats, of the tokens that occurred, float64: views of one tensor."""

    joined_BRC: Tensor
    experts_BRK: Tensor
    linear_BRC: Tensor
    """Of the first linear mixer: one column, or none where there is no linear mixer."""
    logistic_BRM: Tensor

    @classmethod
    def view(cls, joined_BRC: Tensor, blend: Blend) -> TargetLogP:
        """Name the parts of a tensor (B, R, C), float64."""
        return cls(joined_BRC, *joined_BRC.split(_widths(blend), 2))


def _widths(blend: Blend) -> list[int]:
    return [len(blend.names), min(blend.linears, 1), len(blend.config.gates)]


@dataclass(frozen=True)
class Memory:
    """Holds what is known of a span, written by the mixer before `score` reads it, and what `score` leaves."""

    text_3B: Tensor
    """int64: tokens, their classes (`ngram_index.longest_class`), and what the match predicts where the index is
    resident."""
    neural_BRV: Tensor
    """Log probabilities or logits, float32."""
    p_BKV: Tensor
    """Probabilities, float32, of all experts but the neural one."""
    log_BRJV: Tensor
    """Inputs of the logistic mixers, float32."""
    log_p: TargetLogP

    @classmethod
    def allocate(cls, blend: Blend, size: int, sets: int, vocab_size: int, device: torch.device) -> Memory:
        """Make memory for spans of up to `size` positions and `sets` row sets."""
        inputs, widths = blend.linears + len(blend.experts), _widths(blend)
        joined_BRC = torch.empty(size, sets, sum(widths), dtype=torch.float64, device=device)
        return cls(
            torch.zeros(3, size, dtype=torch.int64, device=device),
            torch.empty(size, sets, vocab_size, device=device),
            torch.empty(size, widths[0] - 1, vocab_size, device=device),
            torch.empty(size, sets, inputs, vocab_size, device=device),
            TargetLogP.view(joined_BRC, blend),
        )

    def over(self, blend: Blend, sets: int) -> Memory:
        """Make memory of the same size for the first experts of this one's and other row sets, which shares the text
        and those experts' rows with it."""
        size, vocab_size = len(self.p_BKV), self.p_BKV.shape[2]
        other = Memory.allocate(blend, size, sets, vocab_size, self.p_BKV.device)
        return replace(other, text_3B=self.text_3B, p_BKV=self.p_BKV[:, : len(blend.names) - 1])


def positions(blend: Blend, memory: Memory, size: int) -> tuple[Positions, Tensor]:
    """Prepare the first `size` positions of memory: what the network mixes, and their tokens (B,), int64."""
    here = slice(size)
    at = blend.positions(memory.neural_BRV[here], memory.p_BKV[here], memory.text_3B[1, here], memory.log_BRJV[here])
    return at, memory.text_3B[0, here]


def score(blend: Blend, memory: Memory, blocks: Sequence[slice]) -> None:
    """Mix and learn what lies in memory, one block after another, without a word from the host; leaves in
    `memory.log_p` the log probabilities of the tokens. Blocks are places in the memory, adjoining, from 0."""
    at, token_B = positions(blend, memory, blocks[-1].stop)
    logistic = [gather(mix_and_learn(blend, at[block], token_B[block]), token_B[block]) for block in blocks]
    log_p = _joined(blend, at, token_B, torch.cat(logistic))
    torch.cat(log_p, 2, out=memory.log_p.joined_BRC[: len(token_B)])


def rows(blend: Blend, memory: Memory, blocks: Sequence[slice]) -> tuple[list[Tensor], TargetLogP]:
    """Do what `score` does, and return what it gathers from and what is gathered: log rows, float32, of the experts
    (B, R, K, V), the first linear mixer (B, R, 0 or 1, V) and the logistic ones (B, R, M, V)."""
    at, token_B = positions(blend, memory, blocks[-1].stop)
    logistic_BRMV = torch.cat([mix_and_learn(blend, at[block], token_B[block]) for block in blocks])
    log_p = _joined(blend, at, token_B, gather(logistic_BRMV, token_B))
    found = [blend.expert_rows(at), _linear(blend, at), logistic_BRMV]
    return found, TargetLogP.view(torch.cat(log_p, 2), blend)


def mix_and_learn(blend: Blend, at: Positions, token_B: Tensor) -> Tensor:
    """Mix a block, then learn its tokens (B,): log rows of the logistic mixers (B, R, M, V), from before the learning;
    those of the linear ones are filled into `at`."""
    said = blend.mix(at)
    blend.learn(said, token_B)
    return said.log_BRMV


def _joined(blend: Blend, at: Positions, token_B: Tensor, logistic_BRM: Tensor) -> list[Tensor]:
    return [blend.expert_log_p(at, token_B), gather(_linear(blend, at), token_B), logistic_BRM]


def _linear(blend: Blend, at: Positions) -> Tensor:
    """The first linear mixer's log rows, which the blocks filled in."""
    return at.log_BRJV[:, :, : min(blend.linears, 1)]
