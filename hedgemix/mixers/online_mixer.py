"""The mixture that is the score, one token after another: what a decoder, which knows only earlier tokens, can keep.

It is `batch_mixer`'s for one position at a time, with the layers of `network`; up to float rounding the rows agree.

Shapes as in `hedge`: one position (B = 1), one row set (R = 1), K experts, V vocabulary, M logistic mixers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hedgemix.config import MixerConfig
from hedgemix.experts import match, registry
from hedgemix.experts.match_online import OnlineMatch
from hedgemix.experts.memory_lookup import MemoryLookup
from hedgemix.experts.ngram_online import OnlineNgram
from hedgemix.mixers import hedge
from hedgemix.mixers.network import Blend, Mixed, Positions, join
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
        self.block: list[tuple[Mixed, int]] = []

    def go_on(self, sets: RowSets, name: str) -> None:
        """Take up what row set `name` of an evaluation has learned, at the end of a piece."""
        r, state = sets.names.index(name), sets.state_dict()
        self.blend.load_state_dict({part: value[r : r + 1] for part, value in state["blend"].items()})
        if self.config.kind in ("hedge", "ensemble"):
            self.log_weights_RK = state[self.config.kind][r : r + 1].cpu()

    def predict(self, neural_V: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mix the neural log row (V,), float32, of the next token with the other experts': the mixture's log row (V,),
        float32. Moves nothing. given: the probabilities (V,), float32, of the experts from elsewhere."""
        self.said = self.blend.mix(self._position(neural_V, given or {}))
        self.team_BRKV = self._team(self.said)
        return hedge.mix(self.log_weights_RK.exp(), self.team_BRKV[0])[0]

    def update(self, token: int, ends_block: bool) -> None:
        """Learn the token that `predict` was about; ends_block: the network then learns the block since the last end,
        as `BatchMixer` does."""
        log_p_RK = self.team_BRKV[0, :, :, token].double()
        self.log_weights_RK = hedge.share_step(log_p_RK, self.log_weights_RK, self.config.hedge_share)
        self.block.append((self.said, token))
        if ends_block:
            self.blend.learn(join([said for said, _ in self.block]), torch.tensor([token for _, token in self.block]))
            self.block = []
        self.ngram.update(token)
        self.match.update(token)
        registry.tell(self.further, [token])

    def _position(self, neural_V: Tensor, given: Mapping[str, Tensor]) -> Positions:
        rows, longest = [row[None] for row in self.ngram.predict()], self.ngram.longest_class()
        if self.config.match_lengths:
            predicted, matched, confidence = self.match.predict()
            rows.append(match.lean(rows[-1], torch.tensor([predicted]), torch.tensor([confidence])))
            longest = len(self.ngram.followers) + matched if matched else longest
        rows += [registry.row(name, expert)[None] for name, expert in self.further.items()]
        rows += [given[name][None] for name in self.given]
        return self.blend.positions(neural_V[None, None], torch.stack(rows, 1), torch.tensor([longest]))

    def _team(self, said: Mixed) -> Tensor:
        """Choose the log rows that the score's mixture is over, (1, 1, K, V): of experts, or of mixers."""
        neural = self.blend.neural(said)
        if self.config.kind == "ensemble":
            return torch.cat([neural, said.log_BRMV], 2)
        team = {"none": neural, "linear": said.log_BRJV[:, :, :1], "logistic": said.log_BRMV[:, :, :1]}
        return self.blend.expert_rows(said) if self.config.kind == "hedge" else team[self.config.kind]
