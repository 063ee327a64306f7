"""Row sets that are mixed over the same experts: their network, their Hedge weights, and the memory of a span.

`batch_mixer` has one of these for each choice of experts, and fills what they share.

Shapes as in `hedge` and `span`: B positions, R row sets, K experts, C columns of `span.TargetLogP`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hedgemix.config import MixerConfig
from hedgemix.mixers import hedge, span
from hedgemix.mixers.network import Blend
from hedgemix.mixers.span import Memory, TargetLogP
from hedgemix.runtime.cuda_graph import Record, Replay


class RowSets:
    """Scores and learns spans that lie in its memory, under every kind of mixture."""

    def __init__(
        self,
        config: MixerConfig,
        names: tuple[str, ...],
        given: tuple[str, ...],
        vocab_size: int,
        device: torch.device,
        size: int,
        shared: Memory | None = None,
        record: Record | None = None,
    ) -> None:
        """names: the row sets. given: experts whose rows come from elsewhere. size: positions of a whole span. shared:
        memory of row sets over more experts, of which these have the first. record: makes replays of whole spans."""
        self.config, self.names, self.size, self.record = config, names, size, record
        self.blend = Blend(config, len(names), vocab_size, device, given)
        linear = ("linear",) if config.linear_gates else ()
        self.kinds = (*self.blend.names, "hedge", *linear, "logistic", "ensemble")
        assert len(set(self.kinds)) == len(self.kinds), f"an expert has the name of another part: {self.kinds}"

        def uniform(members: int) -> Tensor:
            return torch.full((len(names), members), -math.log(members), dtype=torch.float64, device=device)

        self.hedge_RK, self.ensemble_RK = uniform(len(self.blend.names)), uniform(1 + len(config.gates))
        # Memory that every span uses again: fresh pages cost a CPU more than what is written to them, and a graph
        # knows no others.
        self.memory = (
            shared.over(self.blend, len(names))
            if shared
            else Memory.allocate(self.blend, size, len(names), vocab_size, device)
        )
        self.spans: Replay | None = None
        self.call: tuple[Tensor, Tensor, Replay] | None = None

    def tell(self, log_rows: dict[str, Tensor], memory: Memory | None = None) -> None:
        """Put the neural rows of a span's positions into memory, its own unless another is given."""
        for r, name in enumerate(self.names):
            (memory or self.memory).neural_BRV[: len(log_rows[name]), r].copy_(log_rows[name])

    def score(self, blocks: Sequence[slice], whole: bool) -> Tensor:
        """Score and learn the span in memory: log probabilities of its tokens (B, R, C), float64, for `nll`. blocks:
        as in `span.score`. whole: the span is one of those that may be replayed."""
        if self.record and whole:
            if self.spans is None:
                work, state = partial(self.mix, blocks), self.blend.learned()
                self.spans = Replay(work, list(state.values()), self.memory.log_p.joined_BRC, self.record)
            self.spans()
        else:
            self.mix(blocks)
        return self.memory.log_p.joined_BRC[: blocks[-1].stop].clone()

    def mix(self, blocks: Sequence[slice]) -> None:
        """Do `span.score`."""
        span.score(self.blend, self.memory, blocks)

    def nll(self, log_p_BRC: Tensor) -> dict[str, dict[str, Tensor]]:
        """Name what a whole call's tokens cost, in nats, (B,) float64, by row set and kind; the weights of Hedge and of
        the ensemble move."""
        nll = -self._shared(log_p_BRC)
        return {name: dict(zip(self.kinds, nll[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}

    def rows(
        self, log_rows: dict[str, Tensor], filled: Memory, blocks: Sequence[slice]
    ) -> dict[str, dict[str, Tensor]]:
        """Make the log rows (B, V), float32, that `score` and `nll` would gather from, by row set and kind, and move
        nothing. filled: memory with the text and the experts' rows of the positions."""
        blend = copy.deepcopy(self.blend)
        memory = filled.over(blend, len(self.names))
        self.tell(log_rows, memory)
        (experts, linear, logistic), log_p = span.rows(blend, memory, blocks)
        team = torch.cat([experts[:, :, :1], logistic], 2)
        hedge_rows, team_rows = (
            hedge.mix(weights.flatten(0, 1), of.flatten(0, 1)).view_as(of[:, :, 0])[:, :, None]
            for (_, weights, _), of in zip(self._share(log_p), (experts, team), strict=True)
        )
        joined = torch.cat([experts, hedge_rows, linear, logistic[:, :, :1], team_rows], 2)
        return {name: dict(zip(self.kinds, joined[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Copy the weights as they are now, by row set; see `batch_mixer.Scores`."""
        return {
            name: {"hedge": self.hedge_RK[r].exp(), "ensemble": self.ensemble_RK[r].exp()}
            | {"linear": self.blend.linear.weights[r].clone(), "logistic": self.blend.logistic.weights[r].clone()}
            for r, name in enumerate(self.names)
        }

    def state_dict(self) -> dict[str, Any]:
        """Copy what was learned."""
        return {
            "hedge": self.hedge_RK.clone(),
            "ensemble": self.ensemble_RK.clone(),
            "blend": self.blend.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        self.hedge_RK.copy_(saved["hedge"])
        self.ensemble_RK.copy_(saved["ensemble"])
        self.blend.load_state_dict(saved["blend"])

    def _share(self, log_p: TargetLogP) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`fixed_share` over the experts, and over the ensemble's members; moves nothing. Once a call, not once a span:
        what it costs hardly grows with the number of positions."""
        team_BRK = torch.cat([log_p.experts_BRK[:, :, :1], log_p.logistic_BRM], 2)
        members = (log_p.experts_BRK, self.hedge_RK), (team_BRK, self.ensemble_RK)
        return [hedge.fixed_share(log_p_BRK, log_w_RK, self.config.hedge_share) for log_p_BRK, log_w_RK in members]

    def _learn_share(self, log_p: TargetLogP) -> Tensor:
        """Score a whole call's tokens under every kind, (B, R, kinds) float64, and move the weights of both."""
        (hedge_BR, _, hedge_RK), (team_BR, _, ensemble_RK) = self._share(log_p)
        self.hedge_RK.copy_(hedge_RK)
        self.ensemble_RK.copy_(ensemble_RK)
        first_BRM = log_p.logistic_BRM[:, :, :1]
        kinds = [log_p.experts_BRK, hedge_BR[..., None], log_p.linear_BRC, first_BRM, team_BR[..., None]]
        return torch.cat(kinds, 2)

    def _shared(self, log_p_BRC: Tensor) -> Tensor:
        """`_learn_share`; replayed where a call is as long as the first one of whole spans was."""
        if self.record and self.call is None and len(log_p_BRC) % self.size == 0:
            given, state = torch.empty_like(log_p_BRC), [self.hedge_RK, self.ensemble_RK]
            kinds_BRK = log_p_BRC.new_empty(*log_p_BRC.shape[:2], len(self.kinds))
            work = partial(self._learn_share, TargetLogP.view(given, self.blend))
            self.call = given, kinds_BRK, Replay(lambda: kinds_BRK.copy_(work()), state, kinds_BRK, self.record)
        if self.call is None or len(self.call[0]) != len(log_p_BRC):
            return self._learn_share(TargetLogP.view(log_p_BRC, self.blend))
        given, kinds_BRK, replay = self.call
        given.copy_(log_p_BRC)
        replay()
        return kinds_BRK.clone()
