"""The mixtures an evaluation scores with: experts, Hedge, linear and logistic mixers, and Hedge over the logistic ones.

Several models (frozen and adapted, say) score the same tokens: n-gram rows are made once for all of them, and each
row set has mixing weights of its own. Positions are worked in blocks that start at multiples of `block_tokens`, so a
score does not depend on how calls cut the text as long as they cut at such multiples.

Shapes as in `hedge`: B positions, R row sets, K experts (0 is neural), V vocabulary, M logistic mixers.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hedgemix import experts, hedge, match, ngram
from hedgemix.blend import Blend, Mixed, expert_names, gather, join
from hedgemix.config import MixerConfig, RecipeError
from hedgemix.shards import PIECE_TOKENS
from hedgemix.validate import check_mixer

SPAN_TOKENS = {"cpu": 512, "cuda": 4096}
"""Positions whose n-gram rows are made at once: cache size on a CPU, launches on a GPU. Changes no score."""


@dataclass
class Scores:
    """What one call scored: `nll[row set][kind]` in nats, (B,) float64, and the weights it ended with.

    Kinds: neural, order1 ..., match, the further experts, hedge, linear and logistic (the first mixer of each),
    ensemble. `weights[row set]`: hedge (K,) over the experts, ensemble (1 + M,) over neural and the logistic mixers,
    linear (L, S, K), logistic (M, S, J), see `blend`.
    """

    nll: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, Tensor]]


@dataclass
class _State:
    ngrams: ngram.NgramState
    further: dict[str, experts.Expert]
    blend: Blend
    hedge_RK: Tensor
    ensemble_RK: Tensor


class Mixer:
    """All mixtures over one text; call `score` with rising, adjoining spans."""

    def __init__(
        self,
        config: MixerConfig,
        vocab_size: int,
        index: ngram.NgramIndex,
        device: torch.device | str = "cpu",
        names: tuple[str, ...] = ("neural",),
        span_tokens: int = 0,
    ) -> None:
        """span_tokens: positions whose n-gram rows are made at once, which changes no score (0: what suits the device).

        Raises RecipeError when the configuration contradicts itself or the index."""
        check_mixer(config, experts.EXPERTS)
        known = index.orders, index.match.lengths, index.vocab_size
        if known != (config.orders, config.match_lengths, vocab_size):
            raise RecipeError(
                "index of orders {}, match lengths {} over {} tokens".format(*known)
                + f", mixer of {config.orders}, {config.match_lengths} over {vocab_size}"
            )
        self.config, self.index, self.names = config, index, names
        self.device = torch.device(device)
        self.experts = expert_names(config)
        linear = ("linear",) if config.linear_gates else ()
        self.kinds = (*self.experts, "hedge", *linear, "logistic", "ensemble")
        assert len(set(self.kinds)) == len(self.kinds), f"an expert has the name of another part: {self.kinds}"
        self.kind = "neural" if config.kind == "none" else config.kind
        span = span_tokens or SPAN_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]
        self.span = max(span // config.block_tokens, 1) * config.block_tokens
        sets = len(names)

        def uniform(size: int) -> Tensor:
            return torch.full((sets, size), -math.log(size), dtype=torch.float64, device=self.device)

        state = ngram.start_state(index, self.device)
        ngram.advance(state, index, 0, min(1, len(index.tokens_N)))
        further = experts.start(config.experts, vocab_size)
        experts.tell(further, index.tokens_N[: state.position].tolist())
        blend = Blend(config, sets, vocab_size, self.device)
        self._state = _State(state, further, blend, uniform(len(self.experts)), uniform(1 + len(config.gates)))
        # Memory that every span uses again: fresh pages cost a CPU more than what is written to them.
        inputs = blend.linears + len(blend.experts)
        self._p_BKV = torch.empty(self.span, len(self.experts) - 1, vocab_size, device=self.device)
        self._log_BRJV = torch.empty(self.span, sets, inputs, vocab_size, device=self.device)

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
            "hedge": state.hedge_RK,
            "ensemble": state.ensemble_RK,
            "blend": state.blend.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there; n-grams are counted and experts told again, from the index."""
        state = self._state
        while self.position < saved["position"]:
            stop = min(self.position + PIECE_TOKENS, saved["position"])
            experts.tell(state.further, self.index.tokens_N[self.position : stop].tolist())
            ngram.advance(state.ngrams, self.index, self.position, stop)
        state.hedge_RK, state.ensemble_RK = saved["hedge"].to(self.device), saved["ensemble"].to(self.device)
        state.blend.load_state_dict(saved["blend"])

    def rows(self, log_rows: dict[str, Tensor], start: int, stop: int) -> dict[str, dict[str, Tensor]]:
        """The log rows (B, V), float32, that `score` would gather from, by row set and kind; nothing is learned."""
        before = copy.deepcopy(self._state)
        _, joined = self._run(log_rows, start, stop, keep=True)
        assert joined is not None
        self._state = before
        return {name: dict(zip(self.kinds, joined[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}

    def _run(self, log_rows: dict[str, Tensor], start: int, stop: int, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Log probabilities (B, R, kinds), float64, of what occurred and, if kept, log rows (B, R, kinds, V)."""
        if set(log_rows) != set(self.names):
            raise ValueError(f"rows of {sorted(log_rows)}, mixer of {sorted(self.names)}")
        state, share = self._state, self.config.hedge_share
        parts, kept = [], []
        left = start
        while left < stop:
            right = min((left // self.span + 1) * self.span, stop)
            part = [log_rows[name][left - start : right - start].to(self.device) for name in self.names]
            log_y_BRK, rows = self._span(torch.stack(part, 1), left, right, keep)
            parts.append(log_y_BRK)
            kept += rows
            left = right
        # Once a call, not once a span: what it costs hardly grows with the number of positions.
        log_y_BRK = torch.cat(parts)
        expert_y, linear_y, logistic_y = log_y_BRK.split(self._layers(), 2)
        hedge_y, hedge_w, state.hedge_RK = hedge.fixed_share(expert_y, state.hedge_RK, share)
        team_y = torch.cat([expert_y[:, :, :1], logistic_y], 2)
        team_log, team_w, state.ensemble_RK = hedge.fixed_share(team_y, state.ensemble_RK, share)
        log_y_BRK = torch.cat([expert_y, hedge_y[..., None], linear_y, logistic_y[:, :, :1], team_log[..., None]], 2)
        if not keep:
            return log_y_BRK, None
        experts, linear, logistic = torch.cat(kept).split(self._layers(), 2)
        team = torch.cat([experts[:, :, :1], logistic], 2)
        hedge_rows, team_rows = (
            hedge.mix(weights.flatten(0, 1), of.flatten(0, 1)).view_as(of[:, :, 0])[:, :, None]
            for weights, of in ((hedge_w, experts), (team_w, team))
        )
        return log_y_BRK, torch.cat([experts, hedge_rows, linear, logistic[:, :, :1], team_rows], 2)

    def _layers(self) -> list[int]:
        """How many columns of what `_span` gives are experts, linear and logistic mixers."""
        return [len(self.experts), min(self._state.blend.linears, 1), len(self.config.gates)]

    def _span(self, neural_BRV: Tensor, start: int, stop: int, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Log probabilities of what occurred in one span under each expert, the first linear and every logistic mixer,
        (B, R, K + 1 + M) float64, and, if kept, the log rows that they come from."""
        state, block = self._state, self.config.block_tokens
        token_B = torch.from_numpy(self.index.tokens_N[start:stop].astype(np.int64)).to(self.device)
        longest_B = torch.from_numpy(ngram.longest_class(self.index, start, stop)).to(self.device)
        p_BKV = torch.stack(self._expert_rows(start, stop), 1, out=self._p_BKV[: stop - start])
        at = state.blend.positions(neural_BRV, p_BKV, longest_B, self._log_BRJV[: stop - start])
        parts: list[Mixed] = []
        logistic = []
        left = start
        while left < stop:
            right = min((left // block + 1) * block, stop)
            here = slice(left - start, right - start)
            said = state.blend.mix(at[here])
            logistic.append(gather(said.log_BRMV, token_B[here]))
            state.blend.learn(said, token_B[here])
            parts += [said] if keep else []
            left = right
        ngram.advance(state.ngrams, self.index, start, stop)
        linear = at.log_BRJV[:, :, : min(state.blend.linears, 1)]  # filled in by the blocks
        log_y_BRK = torch.cat([state.blend.expert_log_p(at, token_B), gather(linear, token_B), torch.cat(logistic)], 2)
        if not keep:
            return log_y_BRK, []
        return log_y_BRK, [torch.cat([state.blend.expert_rows(at), linear, join(parts).log_BRMV], 2)]

    def _expert_rows(self, start: int, stop: int) -> list[Tensor]:
        """Probability rows (B, V) of every expert but the neural one; the further ones are then told the span."""
        rows = ngram.rows(self._state.ngrams, self.index, start, stop)
        if self.config.match_lengths:
            rows.append(match.rows_at(self.index.match, rows[-1], start, stop))
        further = experts.rows(self._state.further, self.index.tokens_N[start:stop], self.index.vocab_size)
        return rows + [rows_BV.to(self.device) for rows_BV in further]
