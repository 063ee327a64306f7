"""The mixtures an evaluation scores with: experts, Hedge, linear and logistic mixers, and Hedge over the logistic ones.

Several models (frozen and adapted, say) score the same tokens: n-gram rows are made once for all of them, and each
row set has mixing weights of its own. Positions are worked in blocks that start at multiples of `block_tokens`, so a
score does not depend on how calls cut the text as long as they cut at such multiples.

Shapes as in `hedge`: B positions, R row sets, K experts (0 is neural), V vocabulary, M logistic mixers.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hedgemix.config import MixerConfig, RecipeError
from hedgemix.data.shards import PIECE_TOKENS
from hedgemix.experts import match, ngram_index, registry
from hedgemix.experts.device_index import Resident
from hedgemix.experts.ngram import NgramRows
from hedgemix.mixers import hedge, span
from hedgemix.mixers.network import Blend, expert_names
from hedgemix.mixers.span import Memory, TargetLogP
from hedgemix.runtime.cuda_graph import Record, Replay, record_graph
from hedgemix.validate import check_mixer

SPAN_TOKENS = {"cpu": 512, "cuda": 4096}
"""Positions whose n-gram rows are made at once: cache size on a CPU, launches on a GPU. Changes no score."""


@dataclass
class Scores:
    """What one call scored: `nll[row set][kind]` in nats, (B,) float64, and the weights it ended with.

    Kinds: neural, order1 ..., match, the further experts, hedge, linear and logistic (the first mixer of each),
    ensemble. `weights[row set]`: hedge (K,) over the experts, ensemble (1 + M,) over neural and the logistic mixers,
    linear (L, S, K), logistic (M, S, J), see `network`.
    """

    nll: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, Tensor]]


@dataclass
class _State:
    ngrams: NgramRows | Resident
    further: dict[str, registry.Expert]
    blend: Blend
    hedge_RK: Tensor
    ensemble_RK: Tensor


class BatchMixer:
    """Scores and learns one text under all mixtures; call `score` with rising, adjoining spans."""

    def __init__(
        self,
        config: MixerConfig,
        vocab_size: int,
        index: ngram_index.NgramIndex,
        device: torch.device | str = "cpu",
        names: tuple[str, ...] = ("neural",),
        span_tokens: int = 0,
        resident: bool | None = None,
        graph: bool | None = None,
    ) -> None:
        """Three ways to save time, which change no score; None and 0 are what suits the device. span_tokens: positions
        whose n-gram rows are made at once. resident: the index is copied to the device. graph: whole spans, which start
        at multiples of span_tokens, are mixed by replaying a CUDA graph.

        Raises RecipeError when the configuration contradicts itself or the index, ValueError for a graph on a CPU or an
        index that is not on the GPU."""
        check_mixer(config, registry.EXPERTS)
        known = index.orders, index.match.lengths, index.vocab_size
        if known != (config.orders, config.match_lengths, vocab_size):
            raise RecipeError(
                "index of orders {}, match lengths {} over {} tokens".format(*known)
                + f", mixer of {config.orders}, {config.match_lengths} over {vocab_size}"
            )
        self.config, self.index, self.names = config, index, names
        self.device = torch.device(device)
        on_host = self.device.type == "cpu"
        if graph and on_host:
            raise ValueError("graph=True: a CPU has no CUDA graphs; give graph=None")
        if resident is False and not on_host:
            raise ValueError(f"resident=False: {self.device} needs the index in its memory; give resident=None")
        self.experts = expert_names(config)
        linear = ("linear",) if config.linear_gates else ()
        self.kinds = (*self.experts, "hedge", *linear, "logistic", "ensemble")
        assert len(set(self.kinds)) == len(self.kinds), f"an expert has the name of another part: {self.kinds}"
        self.kind = "neural" if config.kind == "none" else config.kind
        size = span_tokens or SPAN_TOKENS["cpu" if on_host else "cuda"]
        self.span = max(size // config.block_tokens, 1) * config.block_tokens
        sets = len(names)

        def uniform(size: int) -> Tensor:
            return torch.full((sets, size), -math.log(size), dtype=torch.float64, device=self.device)

        further = registry.start(config.experts, vocab_size)
        blend = Blend(config, sets, vocab_size, self.device)
        ngrams = NgramRows(index) if on_host and not resident else Resident(index, self.device, self.span)
        self._state = _State(ngrams, further, blend, uniform(len(self.experts)), uniform(1 + len(config.gates)))
        self._count(min(1, len(index.tokens_N)))
        # Memory that every span uses again: fresh pages cost a CPU more than what is written to them, and a graph
        # knows no others.
        self._memory = Memory.allocate(blend, self.span, sets, vocab_size, self.device)
        self._record: Record | None = None if graph is False or on_host else record_graph
        self._spans: Replay | None = None
        self._call: tuple[Tensor, Tensor, Replay] | None = None

    @property
    def position(self) -> int:
        """The next position to score: all before it are learned, none from it on."""
        return self._state.ngrams.position

    def score(self, log_rows: dict[str, Tensor], start: int, stop: int) -> Scores:
        """Score the tokens start..stop-1 and learn them.

        `log_rows[name][i]` is the neural row (V) of position start + i, made from tokens before it: log probabilities
        or logits of any float type (normalised here, in float32), on any device. A text's first scored position is 1.
        Raises ValueError for rows of other names or positions, and unless start is `position`.
        """
        self._check(log_rows, start, stop)
        parts = []
        left = start
        while left < stop:
            right = min((left // self.span + 1) * self.span, stop)
            self._tell(self._memory, {name: rows[left - start : right - start] for name, rows in log_rows.items()})
            self._span(left, right)
            parts.append(self._memory.log_p.joined_BRC[: right - left].clone())
            left = right
        nll = -self._shared(torch.cat(parts))
        scored = {name: dict(zip(self.kinds, nll[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}
        return Scores(scored, self.weights())

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Copy the weights as they are now; see `Scores`."""
        state = self._state
        return {
            name: {"hedge": state.hedge_RK[r].exp(), "ensemble": state.ensemble_RK[r].exp()}
            | {"linear": state.blend.linear.weights[r].clone(), "logistic": state.blend.logistic.weights[r].clone()}
            for r, name in enumerate(self.names)
        }

    def state_dict(self) -> dict[str, Any]:
        """Copy what was learned before `position`, without what the text alone tells."""
        state = self._state
        return {
            "position": self.position,
            "hedge": state.hedge_RK.clone(),
            "ensemble": state.ensemble_RK.clone(),
            "blend": state.blend.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there; n-grams are counted and experts told again, from the index."""
        state = self._state
        while self.position < saved["position"]:
            self._count(min(self.position + PIECE_TOKENS, saved["position"]))
        state.hedge_RK.copy_(saved["hedge"])
        state.ensemble_RK.copy_(saved["ensemble"])
        state.blend.load_state_dict(saved["blend"])

    def rows(self, log_rows: dict[str, Tensor], start: int, stop: int) -> dict[str, dict[str, Tensor]]:
        """Make the log rows (B, V), float32, that `score` would gather from, by row set and kind.

        Learns and moves nothing here: the network and the further experts go on as copies, in memory of their own, and
        the n-grams' rows of the whole call come from the counts before it, which bitwise are those of its spans.
        Raises ValueError as `score` does.
        """
        self._check(log_rows, start, stop)
        blend, further = copy.deepcopy((self._state.blend, self._state.further))
        memory = Memory.allocate(blend, stop - start, len(self.names), self.index.vocab_size, self.device)
        self._tell(memory, log_rows)
        self._fill(memory, further, start, stop)
        (experts, linear, logistic), log_p = span.rows(blend, memory, self._blocks(start, stop))
        team = torch.cat([experts[:, :, :1], logistic], 2)
        hedge_rows, team_rows = (
            hedge.mix(weights.flatten(0, 1), of.flatten(0, 1)).view_as(of[:, :, 0])[:, :, None]
            for (_, weights, _), of in zip(self._share(log_p), (experts, team), strict=True)
        )
        joined = torch.cat([experts, hedge_rows, linear, logistic[:, :, :1], team_rows], 2)
        return {name: dict(zip(self.kinds, joined[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}

    def _count(self, stop: int) -> None:
        """Count the tokens up to stop, and tell them the further experts."""
        state = self._state
        if state.further:
            registry.tell(state.further, self.index.tokens_N[self.position : stop].tolist())
        state.ngrams.advance(stop)

    def _check(self, log_rows: dict[str, Tensor], start: int, stop: int) -> None:
        if set(log_rows) != set(self.names):
            raise ValueError(f"rows of {sorted(log_rows)}, mixer of {sorted(self.names)}")
        if any(len(rows) != stop - start for rows in log_rows.values()):
            raise ValueError(f"rows of {[len(rows) for rows in log_rows.values()]} positions for {start}..{stop}")

    def _tell(self, memory: Memory, log_rows: dict[str, Tensor]) -> None:
        for r, name in enumerate(self.names):
            memory.neural_BRV[: len(log_rows[name]), r].copy_(log_rows[name])

    def _share(self, log_p: TargetLogP) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`fixed_share` over the experts, and over the ensemble's members; moves nothing. Once a call, not once a span:
        what it costs hardly grows with the number of positions."""
        team_BRK = torch.cat([log_p.experts_BRK[:, :, :1], log_p.logistic_BRM], 2)
        members = (log_p.experts_BRK, self._state.hedge_RK), (team_BRK, self._state.ensemble_RK)
        return [hedge.fixed_share(log_p_BRK, log_w_RK, self.config.hedge_share) for log_p_BRK, log_w_RK in members]

    def _learn_share(self, log_p: TargetLogP) -> Tensor:
        """Score a whole call's tokens under every kind, (B, R, kinds) float64, and move the weights of both."""
        (hedge_BR, _, hedge_RK), (team_BR, _, ensemble_RK) = self._share(log_p)
        self._state.hedge_RK.copy_(hedge_RK)
        self._state.ensemble_RK.copy_(ensemble_RK)
        first_BRM = log_p.logistic_BRM[:, :, :1]
        kinds = [log_p.experts_BRK, hedge_BR[..., None], log_p.linear_BRC, first_BRM, team_BR[..., None]]
        return torch.cat(kinds, 2)

    def _shared(self, log_p_BRC: Tensor) -> Tensor:
        """`_learn_share`; replayed where a call is as long as the first one of whole spans was."""
        if self._record and self._call is None and len(log_p_BRC) % self.span == 0:
            given, state = torch.empty_like(log_p_BRC), [self._state.hedge_RK, self._state.ensemble_RK]
            kinds_BRK = log_p_BRC.new_empty(*log_p_BRC.shape[:2], len(self.kinds))
            work = partial(self._learn_share, TargetLogP.view(given, self.config))
            self._call = given, kinds_BRK, Replay(lambda: kinds_BRK.copy_(work()), state, kinds_BRK, self._record)
        if self._call is None or len(self._call[0]) != len(log_p_BRC):
            return self._learn_share(TargetLogP.view(log_p_BRC, self.config))
        given, kinds_BRK, replay = self._call
        given.copy_(log_p_BRC)
        replay()
        return kinds_BRK.clone()

    def _span(self, start: int, stop: int) -> None:
        """Score and learn the span whose neural rows are in the fixed memory; see `span.score`."""
        self._fill(self._memory, self._state.further, start, stop)
        if self._record and start % self.span == 0 and stop - start == self.span:
            if self._spans is None:
                work, state = partial(self._mix, self._blocks(start, stop)), self._state.blend.learned()
                self._spans = Replay(work, list(state.values()), self._memory.log_p.joined_BRC, self._record)
            self._spans()
        else:
            self._mix(self._blocks(start, stop))
        self._state.ngrams.advance(stop)

    def _blocks(self, start: int, stop: int) -> list[slice]:
        """The blocks of a span, as places in it."""
        block = self.config.block_tokens
        edges = [start, *range((start // block + 1) * block, stop, block), stop]
        return [slice(left - start, right - start) for left, right in itertools.pairwise(edges)]

    def _mix(self, blocks: Sequence[slice]) -> None:
        span.score(self._state.blend, self._memory, blocks)

    def _fill(self, memory: Memory, experts: dict[str, registry.Expert], start: int, stop: int) -> None:
        """Put into memory what a span's text tells: tokens, classes, and the rows of every expert but the neural one;
        the further ones, `experts`, are then told the span."""
        ngrams, text_3B, p_BKV = self._state.ngrams, memory.text_3B[:, : stop - start], memory.p_BKV[: stop - start]
        further, index, matches = [], self.index, bool(self.config.match_lengths)
        if experts:
            further = registry.rows(experts, index.tokens_N[start:stop], index.vocab_size)
        if isinstance(ngrams, Resident):
            text_3B.copy_(ngrams.text(start, stop))
            ngrams.fill(p_BKV, text_3B, start, stop, matches)
            for k, rows_BV in enumerate(further, len(self.experts) - 1 - len(further)):
                p_BKV[:, k].copy_(rows_BV)
            return
        text_3B[0].copy_(torch.from_numpy(index.tokens_N[start:stop].astype(np.int64)))
        text_3B[1].copy_(torch.from_numpy(ngram_index.longest_class(index, start, stop)))
        rows = ngrams.rows(start, stop)
        if matches:
            rows.append(match.rows(index.match, rows[-1], start, stop))
        torch.stack([*rows, *further], 1, out=p_BKV)
