"""The fast head: test-time training of the output layer alone, token by token, without a backward pass.

The gradient of a token's loss by the output layer is the feature times the error, what occurred less what was
predicted; so steps on all earlier tokens, each fading with its age, add to the logits a linear attention over features
with errors as values (the fast weights of Schlag et al. 2021). Within a block the errors depend on each other: they are
iterated `PASSES` times, from those of the frozen model. A row rests on the errors of earlier positions only.

Shapes: B positions, K the positions of a block up to here, D features, V vocabulary, P + 1 iterates of the errors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hedgemix.runtime.cuda_graph import Record, Replay, record_graph

PASSES = 2
"""Iterations of a block's errors before its rows are read."""
SPAN_TOKENS = 1024
"""Positions that are learned by one replay of a CUDA graph, on a GPU: a block is some 30 small array operations."""
FLOOR = math.exp(-60)
"""Least probability of a token: it has to have a logarithm. A row's sum moves by V times as much."""


class FastHead:
    """Holds the sum of the steps so far, and the block at work. Blocks start at multiples of `block_tokens` in the
    text."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        rate: float = 0.5,
        memory_tokens: float = 1000.0,
        block_tokens: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        """rate: how far a step moves the logits of the very same feature, times the error. memory_tokens: after how
        many tokens a step has faded to 1/e. `refresh` comes before the first position."""
        self.block = block_tokens
        self.position = 1
        """The next position; a text's first scored one is 1."""
        device = torch.device(device)
        self.steps_DV = torch.zeros(width, vocab_size, device=device)
        """The steps before the block at work, faded to its beginning."""
        self.keys_KD = torch.zeros(block_tokens, width, device=device)
        self.errors_PKV = torch.zeros(PASSES + 1, block_tokens, vocab_size, device=device)
        self.whitener_DD = torch.eye(width, device=device)
        self.record: Record | None = None if device.type == "cpu" else record_graph
        self.span: tuple[list[Tensor], Tensor, Replay] | None = None
        """Of whole spans: what they are given, what they said, and the replay."""
        place_K = torch.arange(block_tokens, device=device)
        kept = math.exp(-1 / memory_tokens)
        self.fade_K1 = (kept**place_K)[:, None]
        self.step_K1 = rate * (kept ** (block_tokens - place_K))[:, None]
        self.faded = kept**block_tokens
        age_KK = place_K[:, None] - place_K
        self.attention_KK = rate * (kept ** age_KK.clamp_min(0)) * (age_KK > 0)
        """How much a position takes from an earlier one of its block: nothing from itself."""

    def refresh(self, whitener_DD: Tensor) -> None:
        """Compare by this whitener from here on; the steps so far are in the features' own space, and stay."""
        self.whitener_DD.copy_(whitener_DD)

    def rows(self, log_rows_BV: Tensor, features_BD: Tensor, tokens_B: Tensor) -> Tensor:
        """Give the probabilities (B, V), float32, of the next B positions, of which the frozen model says log_rows_BV
        (or logits), and learn the tokens that were there."""
        given, parts, done = (log_rows_BV.float(), features_BD.float(), tokens_B), [], 0
        while done < len(features_BD):
            count = min(SPAN_TOKENS - self.position % SPAN_TOKENS, len(features_BD) - done)
            here = [each[done : done + count] for each in given]
            parts.append(self._replayed(here) if self.record and count == SPAN_TOKENS else self._blocks(here))
            self.position += count
            done += count
        return torch.cat(parts)

    def predict(self, log_row_V: Tensor, feature_D: Tensor) -> Tensor:
        """Give the probabilities (V,), float32, of the next position's token, on a CPU: the row that `rows` makes for a
        single position, to the bit. NumPy does what PyTorch takes longer to begin than to do."""
        place = self.position % self.block
        white = feature_D[None] @ self.whitener_DD
        length = np.float32(max(float(torch.linalg.vector_norm(white, dim=1)), 1e-12))
        self.keys_KD.numpy()[place] = feature_D.numpy() / length
        white_D = white[0].numpy()
        white_D /= length
        query = white @ self.whitener_DD
        attention = query @ self.keys_KD[: place + 1].T
        attention.numpy()[0] *= self.attention_KK.numpy()[place, : place + 1]
        query.numpy()[0] *= self.fade_K1.numpy()[place]
        base = torch.addmm(log_row_V[None], query, self.steps_DV)
        # The position's own error, which is not known yet, has no weight.
        row = torch.addmm(base, attention, self.errors_PKV[PASSES - 1, : place + 1]).softmax(1)
        self.asked = base, attention, row
        return row[0].clamp_min(FLOOR)

    def update(self, token: int) -> None:
        """Learn the token that `predict` was about."""
        base, attention, row = self.asked
        stop = attention.shape[1]
        errors_PKV = self.errors_PKV.numpy()
        predicted = base.softmax(1)
        for number in range(PASSES + 1):
            error_V = errors_PKV[number, stop - 1]
            np.negative(predicted[0].numpy(), out=error_V)
            error_V[token] += 1
            if number < PASSES - 1:
                predicted = torch.addmm(base, attention, self.errors_PKV[number, :stop]).softmax(1)
            else:
                predicted = row  # of all passes but the last: the position's own error is in neither
        self._end_block(stop)
        self.position += 1

    def _replayed(self, given: list[Tensor]) -> Tensor:
        """Do what `_blocks` does for a whole span, in memory that stays where it is."""
        if self.span is None:
            assert self.record
            memory, said = [each.clone() for each in given], torch.empty_like(given[0])
            state = [self.steps_DV, self.keys_KD, self.errors_PKV]
            work = Replay(lambda: said.copy_(self._blocks(memory)), state, said, self.record)
            self.span = memory, said, work
        memory, said, work = self.span
        for mine, theirs in zip(memory, given, strict=True):
            mine.copy_(theirs)
        work()
        return said.clone()

    def _blocks(self, given: list[Tensor]) -> Tensor:
        """The probabilities of positions from `position` on, block by block; all but `position` moves on."""
        log_rows_BV, features_BD, tokens_B = given
        parts, done = [], 0
        while done < len(features_BD):
            place = (self.position + done) % self.block
            here = slice(done, done + min(self.block - place, len(features_BD) - done))
            base_BV, attention_BK = self._base(log_rows_BV[here], features_BD[here], place)
            parts.append(self._learn(base_BV, attention_BK, tokens_B[here]))
            done = here.stop
        return torch.cat(parts)

    def _base(self, log_rows_BV: Tensor, features_BD: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Logits (B, V) after the steps of earlier blocks, and the attention (B, K) to the errors of this one."""
        here = slice(place, place + len(features_BD))
        white_BD = features_BD @ self.whitener_DD
        length_B1 = white_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.keys_KD[here] = features_BD / length_B1
        queries_BD = (white_BD / length_B1) @ self.whitener_DD
        attention_BK = (queries_BD @ self.keys_KD[: here.stop].T) * self.attention_KK[here, : here.stop]
        return torch.addmm(log_rows_BV, queries_BD * self.fade_K1[here], self.steps_DV), attention_BK

    def _learn(self, base_BV: Tensor, attention_BK: Tensor, tokens_B: Tensor) -> Tensor:
        """The positions' probabilities (B, V), after which their errors are known."""
        stop = attention_BK.shape[1]
        place = stop - len(base_BV)
        logits_BV = base_BV
        for errors_KV in self.errors_PKV[:PASSES]:
            errors_KV[place:stop] = _errors(logits_BV, tokens_B)
            logits_BV = torch.addmm(base_BV, attention_BK, errors_KV[:stop])
        self.errors_PKV[PASSES, place:stop] = _errors(logits_BV, tokens_B)
        self._end_block(stop)
        return _probabilities(logits_BV)

    def _end_block(self, stop: int) -> None:
        """Add the block's steps to the others, where it is whole."""
        if stop == self.block:
            steps_KD = self.keys_KD * self.step_K1
            self.steps_DV.mul_(self.faded).addmm_(steps_KD.T, self.errors_PKV[PASSES])

    def state_dict(self) -> dict[str, Any]:
        """Copy what was learned."""
        at_work = slice(self.position % self.block)
        return {
            "position": self.position,
            "steps": self.steps_DV.clone(),
            "keys": self.keys_KD[at_work].clone(),
            "errors": self.errors_PKV[:, at_work].clone(),
            "whitener": self.whitener_DD.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.position = state["position"]
        at_work = slice(self.position % self.block)
        self.steps_DV.copy_(state["steps"])
        self.keys_KD[at_work], self.errors_PKV[:, at_work] = state["keys"], state["errors"]
        self.whitener_DD.copy_(state["whitener"])


def _errors(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """What occurred less what was predicted, (B, V)."""
    errors_BV = logits_BV.softmax(1).neg_()
    return errors_BV.scatter_add_(1, tokens_B[:, None], torch.ones_like(errors_BV[:, :1]))


def _probabilities(logits_BV: Tensor) -> Tensor:
    return logits_BV.softmax(1).clamp_min_(FLOOR)
