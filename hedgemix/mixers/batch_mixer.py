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
from hedgemix.mixers import hedge
from hedgemix.mixers.network import Blend, Mixed, expert_names, gather, join
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
    """All mixtures over one text; call `score` with rising, adjoining spans."""

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
        span = span_tokens or SPAN_TOKENS["cpu" if on_host else "cuda"]
        self.span = max(span // config.block_tokens, 1) * config.block_tokens
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
        inputs = blend.linears + len(blend.experts)
        self._text_3B = torch.zeros(3, self.span, dtype=torch.int64, device=self.device)
        """Tokens, their classes, and what the match predicts where the index is resident."""
        self._neural_BRV = torch.empty(self.span, sets, vocab_size, device=self.device)
        self._p_BKV = torch.empty(self.span, len(self.experts) - 1, vocab_size, device=self.device)
        self._log_BRJV = torch.empty(self.span, sets, inputs, vocab_size, device=self.device)
        self._log_y_BRC = torch.empty(self.span, sets, sum(self._layers()), dtype=torch.float64, device=self.device)
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
        """
        log_y_BRK, _ = self._run(log_rows, start, stop, keep=False)
        nll = -log_y_BRK
        scored = {name: dict(zip(self.kinds, nll[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}
        return Scores(scored, self.weights())

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights as they are now; see `Scores`."""
        state = self._state
        return {
            name: {"hedge": state.hedge_RK[r].exp(), "ensemble": state.ensemble_RK[r].exp()}
            | {"linear": state.blend.linear.weights[r].clone(), "logistic": state.blend.logistic.weights[r].clone()}
            for r, name in enumerate(self.names)
        }

    def state_dict(self) -> dict[str, Any]:
        """What was learned before `position`, without what the text alone tells."""
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
        """The log rows (B, V), float32, that `score` would gather from, by row set and kind; nothing is learned."""
        state, before = self._state, self.state_dict()
        further = copy.deepcopy(state.further)
        _, joined = self._run(log_rows, start, stop, keep=True)
        assert joined is not None
        if isinstance(state.ngrams, Resident):
            state.ngrams.move(before["position"])
        else:
            state.ngrams.retreat(before["position"])
        state.further = further
        self.load_state_dict(before)
        return {name: dict(zip(self.kinds, joined[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}

    def _count(self, stop: int) -> None:
        """Count the tokens up to stop, and tell them the further experts."""
        state = self._state
        if state.further:
            registry.tell(state.further, self.index.tokens_N[self.position : stop].tolist())
        self._advance(stop)

    def _advance(self, stop: int) -> None:
        ngrams = self._state.ngrams
        if isinstance(ngrams, Resident):
            ngrams.move(stop)
        else:
            ngrams.advance(stop)

    def _run(self, log_rows: dict[str, Tensor], start: int, stop: int, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Log probabilities (B, R, kinds), float64, of what occurred and, if kept, log rows (B, R, kinds, V)."""
        if set(log_rows) != set(self.names):
            raise ValueError(f"rows of {sorted(log_rows)}, mixer of {sorted(self.names)}")
        if any(len(rows) != stop - start for rows in log_rows.values()):
            raise ValueError(f"rows of {[len(rows) for rows in log_rows.values()]} positions for {start}..{stop}")
        parts, kept = [], []
        left = start
        while left < stop:
            right = min((left // self.span + 1) * self.span, stop)
            for r, name in enumerate(self.names):
                self._neural_BRV[: right - left, r].copy_(log_rows[name][left - start : right - start])
            rows = self._span(left, right, keep)
            parts.append(self._log_y_BRC[: right - left].clone())
            kept += rows
            left = right
        log_y_BRC = torch.cat(parts)
        if not keep:
            return self._shared(log_y_BRC), None
        log_y_BRK, hedge_w, team_w = self._share(log_y_BRC)
        experts, linear, logistic = torch.cat(kept).split(self._layers(), 2)
        team = torch.cat([experts[:, :, :1], logistic], 2)
        hedge_rows, team_rows = (
            hedge.mix(weights.flatten(0, 1), of.flatten(0, 1)).view_as(of[:, :, 0])[:, :, None]
            for weights, of in ((hedge_w, experts), (team_w, team))
        )
        return log_y_BRK, torch.cat([experts, hedge_rows, linear, logistic[:, :, :1], team_rows], 2)

    def _share(self, log_y_BRC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From what `_mix` leaves, of a whole call: log probabilities (B, R, kinds), and the weights that Hedge and the
        ensemble used. Once a call, not once a span: what it costs hardly grows with the number of positions."""
        state, share = self._state, self.config.hedge_share
        expert_y, linear_y, logistic_y = log_y_BRC.split(self._layers(), 2)
        hedge_y, hedge_w, hedge_RK = hedge.fixed_share(expert_y, state.hedge_RK, share)
        team_y = torch.cat([expert_y[:, :, :1], logistic_y], 2)
        team_log, team_w, ensemble_RK = hedge.fixed_share(team_y, state.ensemble_RK, share)
        state.hedge_RK.copy_(hedge_RK)
        state.ensemble_RK.copy_(ensemble_RK)
        kinds = [expert_y, hedge_y[..., None], linear_y, logistic_y[:, :, :1], team_log[..., None]]
        return torch.cat(kinds, 2), hedge_w, team_w

    def _shared(self, log_y_BRC: Tensor) -> Tensor:
        """The first of what `_share` gives; replayed where a call is as long as the first one of whole spans was."""
        if self._record and self._call is None and len(log_y_BRC) % self.span == 0:
            given, state = torch.empty_like(log_y_BRC), [self._state.hedge_RK, self._state.ensemble_RK]
            said = log_y_BRC.new_empty(*log_y_BRC.shape[:2], len(self.kinds))
            replay = Replay(lambda: said.copy_(self._share(given)[0]), state, said, self._record)
            self._call = given, said, replay
        if self._call is None or len(self._call[0]) != len(log_y_BRC):
            return self._share(log_y_BRC)[0]
        given, said, replay = self._call
        given.copy_(log_y_BRC)
        replay()
        return said.clone()

    def _layers(self) -> list[int]:
        """How many columns of what `_span` gives are experts, linear and logistic mixers."""
        return [len(self.experts), min(self._state.blend.linears, 1), len(self.config.gates)]

    def _span(self, start: int, stop: int, keep: bool) -> list[Tensor]:
        """Score and learn the span whose neural rows are in fixed memory; see `_mix`."""
        self._fill(start, stop)
        rows: list[Tensor] = []
        if self._record and not keep and start % self.span == 0 and stop - start == self.span:
            if self._spans is None:
                work, state = partial(self._mix, self._blocks(start, stop)), self._state.blend.learned()
                self._spans = Replay(work, list(state.values()), self._log_y_BRC, self._record)
            self._spans()
        else:
            rows = self._mix(self._blocks(start, stop), keep)
        self._advance(stop)
        return rows

    def _blocks(self, start: int, stop: int) -> list[slice]:
        """The blocks of a span, as places in it."""
        block = self.config.block_tokens
        edges = [start, *range((start // block + 1) * block, stop, block), stop]
        return [slice(left - start, right - start) for left, right in itertools.pairwise(edges)]

    def _fill(self, start: int, stop: int) -> None:
        """Put into fixed memory what a span's text tells: tokens, classes, and the rows of every expert but the neural
        one; the further ones are then told the span."""
        state, text_3B, p_BKV = self._state, self._text_3B[:, : stop - start], self._p_BKV[: stop - start]
        further, index, matches = [], self.index, bool(self.config.match_lengths)
        if state.further:
            further = registry.rows(state.further, index.tokens_N[start:stop], index.vocab_size)
        if isinstance(state.ngrams, Resident):
            text_3B.copy_(state.ngrams.text(start, stop))
            state.ngrams.fill(p_BKV, text_3B, start, stop, matches)
            for k, rows_BV in enumerate(further, len(self.experts) - 1 - len(further)):
                p_BKV[:, k].copy_(rows_BV)
            return
        text_3B[0].copy_(torch.from_numpy(index.tokens_N[start:stop].astype(np.int64)))
        text_3B[1].copy_(torch.from_numpy(ngram_index.longest_class(index, start, stop)))
        rows = state.ngrams.rows(start, stop)
        if matches:
            rows.append(match.rows(index.match, rows[-1], start, stop))
        torch.stack([*rows, *further], 1, out=p_BKV)

    def _mix(self, blocks: Sequence[slice], keep: bool = False) -> list[Tensor]:
        """Mix and learn what lies in fixed memory, one block after another, without a word from the host.

        Leaves in `_log_y_BRC` the log probabilities of what occurred under each expert, the first linear and every
        logistic mixer, (B, R, K + 1 + M) float64, and returns, if kept, the log rows that they come from."""
        blend, here = self._state.blend, slice(0, blocks[-1].stop)
        token_B, longest_B = self._text_3B[0, here], self._text_3B[1, here]
        at = blend.positions(self._neural_BRV[here], self._p_BKV[here], longest_B, self._log_BRJV[here])
        parts: list[Mixed] = []
        logistic = []
        for block in blocks:
            said = blend.mix(at[block])
            logistic.append(gather(said.log_BRMV, token_B[block]))
            blend.learn(said, token_B[block])
            parts += [said] if keep else []
        linear = at.log_BRJV[:, :, : min(blend.linears, 1)]  # filled in by the blocks
        log_y = [blend.expert_log_p(at, token_B), gather(linear, token_B), torch.cat(logistic)]
        torch.cat(log_y, 2, out=self._log_y_BRC[here])
        return [torch.cat([blend.expert_rows(at), linear, join(parts).log_BRMV], 2)] if keep else []
