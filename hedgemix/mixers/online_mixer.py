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
from hedgemix.mixers.network import Blend, Mixed, gate_numbers
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
        # What it learns stays in the memory that it is in.
        learned = self.blend.linear.weights, self.blend.logistic.weights, self.blend.logistic.bias_RMV
        self.linear_LSK, self.logistic_MSJ, self.bias_MV = (each[0].numpy() for each in learned)
        size = {"hedge": len(self.blend.names), "ensemble": 1 + len(self.config.gates)}
        over = size.get(self.config.kind, 1)
        self.log_weights_RK = torch.full((1, over), -math.log(over), dtype=torch.float64)
        self.block = Block.allocate(self.blend, self.config.block_tokens, vocab_size)
        self.places = self.block.places()
        self.shared = np.array(self.blend.experts[1:]) - 1
        """Which of the probability rows logistic mixers see."""
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
        place = self.places[len(self.tokens)]
        longest = self._fill(place.p_KV, given or {})
        np.maximum(neural_V.log_softmax(-1).numpy(), np.float32(logistic.LOG_FLOOR), out=place.neural_V)
        self._mix(place, longest)
        self.team_KV = self._team(place)
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
        orders = len(self.config.orders)
        self.ngram.predict(p_KV[:orders])
        longest, k = self.ngram.longest_class(), orders
        if self.config.match_lengths:
            predicted, matched, confidence = self.match.predict()
            np.multiply(p_KV[k - 1], np.float32(1 - np.float32(confidence)), out=p_KV[k])  # see `match.lean`
            p_KV[k, max(predicted, 0)] += np.float32(confidence)
            longest, k = len(self.ngram.followers) + matched if matched else longest, k + 1
        for name, expert in self.further.items():
            registry.fill(name, expert, p_KV[k])
            k += 1
        for name in self.given:
            np.copyto(p_KV[k], given[name].numpy())
            k += 1
        return longest

    def _mix(self, place: Place, longest: int) -> None:
        """Do for the next position of the block what `Blend.positions` and `Blend.mix` do for many."""
        blend, log_JV, linears = self.blend, place.log_JV, self.blend.linears
        shared_JV = log_JV[linears + 1 :]
        np.take(place.p_KV, self.shared, axis=0, out=shared_JV, mode="clip")  # "raise" would buffer
        np.log(shared_JV, out=shared_JV)
        np.maximum(shared_JV, np.float32(logistic.LOG_FLOOR), out=shared_JV)
        gates = gate_numbers(blend.config, blend.gates, torch.from_numpy(place.neural_V), longest)
        place.gate_G[:] = gates
        if linears:
            place.weights_LK[:] = self.linear_LSK[np.arange(linears), gates[:linears]]
            weights_LK = place.weights_LK.astype(np.float32)
            mixed_LV = product(weights_LK[:, 1:], place.p_KV)
            mixed_LV += weights_LK[:, :1] * np.exp(place.neural_V)
            np.log(mixed_LV, out=log_JV[:linears])
        mixers = len(gates) - linears
        weights_MJ = self.logistic_MSJ[np.arange(mixers), gates[linears:]]
        mixed_MV = product(weights_MJ.astype(np.float32), log_JV)
        mixed_MV += self.bias_MV
        np.subtract(mixed_MV, log_sum_exp(mixed_MV.T)[:, None], out=place.log_MV)

    def _team(self, place: Place) -> np.ndarray:
        """Choose the log rows (K, V) that the score's mixture is over: of experts, or of mixers."""
        linears, kind, neural_1V = self.blend.linears, self.config.kind, place.neural_V[None]
        if kind == "hedge":
            return np.concatenate([neural_1V, np.log(place.p_KV)])
        if kind == "ensemble":
            return np.concatenate([neural_1V, place.log_MV])
        return {"none": neural_1V, "linear": place.log_JV[: min(linears, 1)], "logistic": place.log_MV[:1]}[kind]


@dataclass(frozen=True)
class Place:
    """Shows the memory of one position of a block."""

    p_KV: np.ndarray
    log_JV: np.ndarray
    neural_V: np.ndarray
    """Of log_JV, the neural model's."""
    gate_G: np.ndarray
    weights_LK: np.ndarray
    log_MV: np.ndarray


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

    def places(self) -> list[Place]:
        """Show each position's memory."""
        log_BJV, linears = self.log_BRJV.numpy()[:, 0], self.weights_BRLK.shape[2]
        return [
            Place(p_KV, log_JV, log_JV[linears], gate_RG[0], weights_RLK[0], log_RMV[0])
            for p_KV, log_JV, gate_RG, weights_RLK, log_RMV in zip(
                self.p_BKV.numpy(),
                log_BJV,
                self.gate_BRG.numpy(),
                self.weights_BRLK.numpy(),
                self.log_BRMV.numpy(),
                strict=True,
            )
        ]

    def said(self, size: int) -> Mixed:
        """Give the first positions, as the network learns from them."""
        return Mixed(*(getattr(self, part.name)[:size] for part in fields(Mixed)))


def product(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Multiply weights (M, K), rounded to float32, and rows (K, V): float32 (M, V). By PyTorch, on its one thread."""
    return (torch.from_numpy(weights.astype(np.float32)) @ torch.from_numpy(rows)).numpy()


def log_sum_exp(rows: np.ndarray) -> np.ndarray:
    """Sum exp(rows) over the first dimension, and take the logarithm."""
    top = rows.max(0)
    less = rows - top
    total = np.exp(less, out=less).sum(0)
    np.log(total, out=total)
    total += top
    return total
