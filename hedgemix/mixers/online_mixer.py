"""The mixture that is the score, one token after another: what a decoder, which knows only earlier tokens, can keep.

It is `batch_mixer`'s for one position at a time, with the layers of `network`; up to float rounding the rows agree.

Shapes as in `hedge`: one position (B = 1), one row set (R = 1), K experts, V vocabulary, M logistic mixers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hedgemix.config import MixerConfig
from hedgemix.experts import registry
from hedgemix.experts.match_online import OnlineMatch
from hedgemix.experts.memory_lookup import MemoryLookup
from hedgemix.experts.ngram_online import OnlineNgram
from hedgemix.mixers import hedge, logistic
from hedgemix.mixers.network import Blend, Mixed, gate_sets
from hedgemix.mixers.row_sets import RowSets

NOTHING = np.zeros(0, np.uint16)


class OnlineMixer:
    """Mixes what the experts say of the next token, then learns from the token."""

    def __init__(
        self,
        config: MixerConfig,
        vocab_size: int,
        told_B: np.ndarray,
        given: Sequence[str] = (),
        memory_M: np.ndarray = NOTHING,
    ) -> None:
        """Begin behind the text's tokens so far, integers (B,), of which the first is never scored, and the tokens (M,)
        of a memory, which n-grams and match read before; check_mixer has passed the configuration. given: experts whose
        rows `predict` is handed. Weights are those of a text's beginning: see `go_on`."""
        self.config, self.given = config, tuple(given)
        # To what only counts, a text that was told is a memory: it is looked up, and takes no table.
        before = np.concatenate([memory_M, told_B[:-1].astype(memory_M.dtype)])
        memory = MemoryLookup(before, vocab_size, max(self.config.orders[-1] - 1, *self.config.match_lengths, 0))
        self.ngram = OnlineNgram(self.config.orders, vocab_size, self.config.discount, memory)
        self.match = OnlineMatch(self.config.match_lengths, vocab_size, memory)
        self.further = registry.start(self.config.experts, vocab_size)
        self.ngram.update(int(told_B[-1]))
        self.match.update(int(told_B[-1]))
        registry.tell(self.further, told_B.tolist())
        self.blend = Blend(self.config, 1, vocab_size, "cpu", given)
        size = {"hedge": len(self.blend.names), "ensemble": 1 + len(self.config.gates)}
        over = size.get(self.config.kind, 1)
        self.log_weights_RK = torch.full((1, over), -math.log(over), dtype=torch.float64)
        self.block = Block.allocate(self.blend, self.config.block_tokens, vocab_size)
        self.tokens: list[int] = []
        """Those of the block at work, which the network has not learned yet."""

    def go_on(self, sets: RowSets, name: str) -> None:
        """Take up what row set `name` of an evaluation has learned, at the end of a piece."""
        r, state = sets.names.index(name), sets.state_dict()
        self.blend.load_state_dict({part: value[r : r + 1] for part, value in state["blend"].items()})
        if self.config.kind in ("hedge", "ensemble"):
            self.log_weights_RK = state[self.config.kind][r : r + 1].cpu()

    def predict(self, neural_V: Tensor, given: Mapping[str, Tensor] | None = None) -> np.ndarray:
        """Mix the neural log row (V,), float32, of the next token with the other experts': the mixture's log row (V,),
        float32. Moves nothing. given: the probabilities (V,), float32, of the experts from elsewhere."""
        p_KV = self.block.p_BKV.numpy()[len(self.tokens)]
        longest = self._fill(p_KV, given or {})
        self._mix(neural_V.log_softmax(-1).clamp_min(logistic.LOG_FLOOR).numpy(), p_KV, longest)
        self.team_KV = self._team(len(self.tokens))
        log_weights_K1 = self.log_weights_RK[0].numpy().astype(np.float32)[:, None]
        return log_sum_exp(self.team_KV + log_weights_K1)

    def update(self, token: int, ends_block: bool) -> None:
        """Learn the token that `predict` was about; ends_block: the network then learns the block since the last end,
        as `BatchMixer` does."""
        log_p_RK = torch.from_numpy(self.team_KV[None, :, token].astype(np.float64))
        self.log_weights_RK = hedge.share_step(log_p_RK, self.log_weights_RK, self.config.hedge_share)
        self.tokens.append(token)
        if ends_block:
            self.blend.learn(self.block.said(len(self.tokens)), torch.tensor(self.tokens))
            self.tokens = []
        self.ngram.update(token)
        self.match.update(token)
        registry.tell(self.further, [token])

    def _fill(self, p_KV: np.ndarray, given: Mapping[str, Tensor]) -> int:
        """Put in the rows of all experts but the neural one; returns what of the context occurred before, as
        `ngram_index.longest_class` says."""
        rows, longest = [row.numpy() for row in self.ngram.predict()], self.ngram.longest_class()
        if self.config.match_lengths:
            predicted, matched, confidence = self.match.predict()
            row_V = rows[-1] * np.float32(1 - np.float32(confidence))  # see `match.lean`
            row_V[max(predicted, 0)] += np.float32(confidence)
            rows.append(row_V)
            longest = len(self.ngram.followers) + matched if matched else longest
        rows += [registry.row(name, expert).numpy() for name, expert in self.further.items()]
        rows += [given[name].numpy() for name in self.given]
        np.stack(rows, out=p_KV)
        return longest

    def _mix(self, neural_V: np.ndarray, p_KV: np.ndarray, longest: int) -> None:
        """Do for the next position of the block what `Blend.positions` and `Blend.mix` do for many."""
        blend, block, at, linears = self.blend, self.block, len(self.tokens), self.blend.linears
        log_JV, gate_G = block.log_BRJV.numpy()[at, 0], block.gate_BRG[at, 0]
        log_JV[linears] = neural_V
        np.log(p_KV[[k - 1 for k in blend.experts[1:]]], out=log_JV[linears + 1 :])
        np.maximum(log_JV[linears + 1 :], np.float32(logistic.LOG_FLOOR), out=log_JV[linears + 1 :])
        gate_G.copy_(gate_sets(blend.config, blend.gates, torch.from_numpy(neural_V), torch.tensor(longest)))
        gates = gate_G.tolist()
        weights_LK = block.weights_BRLK.numpy()[at, 0]
        for number, gate in enumerate(gates[:linears]):
            weights_LK[number] = blend.linear.weights.numpy()[0, number, gate]
        mixed_LV = product(weights_LK[:, 1:], p_KV)
        mixed_LV += weights_LK[:, :1].astype(np.float32) * np.exp(neural_V)
        np.log(mixed_LV, out=log_JV[:linears])
        weights = blend.logistic.weights.numpy()[0]
        mixed_MV = product(np.stack([weights[number, gate] for number, gate in enumerate(gates[linears:])]), log_JV)
        mixed_MV += blend.logistic.bias_RMV.numpy()[0]
        np.subtract(mixed_MV, log_sum_exp(mixed_MV.T)[:, None], out=block.log_BRMV.numpy()[at, 0])

    def _team(self, at: int) -> np.ndarray:
        """Choose the log rows (K, V) that the score's mixture is over: of experts, or of mixers."""
        block, linears, kind = self.block, self.blend.linears, self.config.kind
        log_JV, log_MV = block.log_BRJV.numpy()[at, 0], block.log_BRMV.numpy()[at, 0]
        neural_1V = log_JV[linears : linears + 1]
        if kind == "hedge":
            return np.concatenate([neural_1V, np.log(block.p_BKV.numpy()[at])])
        if kind == "ensemble":
            return np.concatenate([neural_1V, log_MV])
        return {"none": neural_1V, "linear": log_JV[: min(linears, 1)], "logistic": log_MV[:1]}[kind].copy()


@dataclass(frozen=True)
class Block:
    """Holds what was said of the positions since the network last learned, in memory that is used again."""

    p_BKV: Tensor
    log_BRJV: Tensor
    gate_BRG: Tensor
    weights_BRLK: Tensor
    log_BRMV: Tensor

    @classmethod
    def allocate(cls, blend: Blend, size: int, vocab_size: int) -> Block:
        """Make memory for `size` positions."""
        experts, inputs, mixers = len(blend.names), blend.linears + len(blend.experts), len(blend.config.gates)
        return cls(
            torch.empty(size, experts - 1, vocab_size),
            torch.empty(size, 1, inputs, vocab_size),
            torch.zeros(size, 1, len(blend.gates), dtype=torch.int64),
            torch.zeros(size, 1, blend.linears, experts, dtype=torch.float64),
            torch.empty(size, 1, mixers, vocab_size),
        )

    def said(self, size: int) -> Mixed:
        """Give the first positions, as the network learns from them."""
        return Mixed(*(getattr(self, part.name)[:size] for part in fields(Mixed)))


def product(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Multiply weights (M, K), rounded to float32, and rows (K, V): float32 (M, V). By PyTorch, on its one thread."""
    return (torch.from_numpy(weights.astype(np.float32)) @ torch.from_numpy(rows)).numpy()


def log_sum_exp(rows: np.ndarray) -> np.ndarray:
    """Sum exp(rows) over the first dimension, and take the logarithm."""
    top = rows.max(0)
    return top + np.log(np.exp(rows - top).sum(0))
