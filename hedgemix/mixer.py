"""The mixtures an evaluation scores with: n-gram experts, Hedge, logistic mixers, and Hedge over the logistic mixers.

Several models (frozen and adapted, say) score the same tokens: n-gram rows are made once for all of them, and each
row set has mixing weights of its own. Positions are worked in blocks that start at multiples of `block_tokens`, so a
score does not depend on how calls cut the text as long as they cut at such multiples.

Shapes as in `hedge`: B positions, R row sets, K experts (0 is neural), V vocabulary, M logistic mixers.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hedgemix import hedge, ngram
from hedgemix.config import MixerConfig, RecipeError

_SPAN = {"cpu": 512, "cuda": 4096}
"""Positions whose n-gram rows are made at once: cache size on a CPU, launches on a GPU. Changes no score."""


@dataclass
class Scores:
    """What one call scored: `nll[row set][kind]` in nats, (B,) float64, and the weights it ended with.

    Kinds: neural, order1 ..., hedge, logistic (the first logistic mixer), ensemble. `weights[row set]`: hedge (K,) over
    neural and the orders, ensemble (1 + M,) over neural and the logistic mixers, logistic (M, S, K).
    """

    nll: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, Tensor]]


@dataclass
class _State:
    ngrams: ngram.NgramState
    logistic: hedge.LogisticState
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
    ) -> None:
        """Raises RecipeError when the configuration contradicts itself or the index."""
        check(config)
        if config.orders != index.orders or vocab_size != index.vocab_size:
            raise RecipeError(
                f"index of orders {index.orders} over {index.vocab_size} tokens, mixer of {config.orders}"
            )
        self.config, self.index, self.names = config, index, names
        self.device = torch.device(device)
        self.kinds = ("neural", *(f"order{n}" for n in config.orders), "hedge", "logistic", "ensemble")
        self.kind = "neural" if config.kind == "none" else config.kind
        self.matched = len(index.tables) + 1
        span = _SPAN["cpu" if self.device.type == "cpu" else "cuda"]
        self.span = max(span // config.block_tokens, 1) * config.block_tokens
        experts, sets = 1 + len(config.orders), len(names)

        def uniform(size: int) -> Tensor:
            return torch.full((sets, size), -math.log(size), dtype=torch.float64, device=self.device)

        logistic = hedge.start_logistic(
            sets, config.memory_tokens, self.matched * config.entropy_sets, experts, config.logistic_ridge, self.device
        )
        state = ngram.start_state(index, self.device)
        ngram.advance(state, index, 0, min(1, len(index.tokens_N)))
        self._state = _State(state, logistic, uniform(experts), uniform(1 + len(config.gates)))

    @property
    def position(self) -> int:
        """The next position to score: all before it are learned, none from it on."""
        return self._state.ngrams.position

    def score(self, log_rows: dict[str, Tensor], start: int, stop: int) -> Scores:
        """Score the tokens start..stop-1 and learn them.

        `log_rows[name][i]` is the neural row (V) of position start + i, made from tokens before it: log probabilities
        or logits of any float type (normalised here, in float32), on any device. A text's first scored position is 1.
        """
        nll, _ = self._run(log_rows, start, stop, keep=False)
        state = self._state
        weights = {
            name: {"hedge": state.hedge_RK[r].exp(), "ensemble": state.ensemble_RK[r].exp()}
            | {"logistic": state.logistic.weights[r].clone()}
            for r, name in enumerate(self.names)
        }
        scored = {name: dict(zip(self.kinds, nll[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}
        return Scores(scored, weights)

    def rows(self, log_rows: dict[str, Tensor], start: int, stop: int) -> dict[str, dict[str, Tensor]]:
        """The log rows (B, V), float32, that `score` would gather from, by row set and kind; nothing is learned."""
        before = copy.deepcopy(self._state)
        _, rows = self._run(log_rows, start, stop, keep=True)
        self._state = before
        joined = torch.cat(rows)
        return {name: dict(zip(self.kinds, joined[:, r].unbind(1), strict=True)) for r, name in enumerate(self.names)}

    def _run(self, log_rows: dict[str, Tensor], start: int, stop: int, keep: bool) -> tuple[Tensor, list[Tensor]]:
        if set(log_rows) != set(self.names):
            raise ValueError(f"rows of {sorted(log_rows)}, mixer of {sorted(self.names)}")
        nll, rows = [], []
        left = start
        while left < stop:
            right = min((left // self.span + 1) * self.span, stop)
            part = [log_rows[name][left - start : right - start].to(self.device) for name in self.names]
            span_nll, span_rows = self._span(torch.stack(part, 1), left, right, keep)
            nll.append(span_nll)
            rows += span_rows
            left = right
        return torch.cat(nll), rows

    def _span(self, neural_BRV: Tensor, start: int, stop: int, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """NLL (B, R, kinds) and, if kept, log rows (B, R, kinds, V) of one span."""
        state, share = self._state, self.config.hedge_share
        token_B = torch.from_numpy(self.index.tokens_N[start:stop].astype(np.int64)).to(self.device)
        log_rows = self._expert_rows(neural_BRV, start, stop)
        gate_BRM = self._gates(log_rows[:, :, 0], start, stop)
        mixed_y, mixed = [], []
        left = start
        while left < stop:
            right = min((left // self.config.block_tokens + 1) * self.config.block_tokens, stop)
            here = slice(left - start, right - start)
            mixed_BRMV = hedge.logistic_rows(state.logistic, log_rows[here], gate_BRM[here])
            mixed_y.append(_gather(mixed_BRMV, token_B[here]))
            hedge.learn_logistic(state.logistic, log_rows[here], mixed_BRMV, token_B[here], gate_BRM[here])
            mixed += [mixed_BRMV] if keep else []
            left = right
        expert_y, logistic_y = _gather(log_rows, token_B), torch.cat(mixed_y)
        team_y = torch.cat([expert_y[:, :, :1], logistic_y], 2)
        hedge_y, hedge_w, state.hedge_RK = hedge.fixed_share(expert_y, state.hedge_RK, share)
        team_log, team_w, state.ensemble_RK = hedge.fixed_share(team_y, state.ensemble_RK, share)
        ngram.advance(state.ngrams, self.index, start, stop)
        nll = -torch.cat([expert_y, hedge_y[..., None], logistic_y[:, :, :1], team_log[..., None]], 2)
        if not keep:
            return nll, []
        logistic = torch.cat(mixed)
        team = torch.cat([log_rows[:, :, :1], logistic], 2)
        hedge_rows = hedge.mix(hedge_w.flatten(0, 1), log_rows.flatten(0, 1)).view_as(neural_BRV)
        team_rows = hedge.mix(team_w.flatten(0, 1), team.flatten(0, 1)).view_as(neural_BRV)
        return nll, [torch.cat([log_rows, hedge_rows[:, :, None], logistic[:, :, :1], team_rows[:, :, None]], 2)]

    def _expert_rows(self, neural_BRV: Tensor, start: int, stop: int) -> Tensor:
        size, sets, vocab_size = neural_BRV.shape
        out = torch.empty(size, sets, 1 + len(self.config.orders), vocab_size, device=self.device)
        # The floor moves no sum by more than V * exp(-60); it keeps impossible tokens from turning into NaN.
        out[:, :, 0] = neural_BRV.float().log_softmax(-1).clamp_min_(hedge.LOG_FLOOR)
        for k, rows_BV in enumerate(ngram.rows(self._state.ngrams, self.index, start, stop), start=1):
            out[:, :, k] = rows_BV.log_()[:, None]
        return out

    def _gates(self, neural_BRV: Tensor, start: int, stop: int) -> Tensor:
        """Weight set of each position for each mixer, (B, R, M): longest matched order x bucket of neural entropy."""
        config = self.config
        longest = ngram.matched_order(self.index, start, stop)
        order_B = torch.from_numpy(np.searchsorted([1, *self.index.tables], longest)).to(self.device)
        order_BR = order_B[:, None].expand(-1, len(self.names))
        entropy_BR = -(neural_BRV.exp() * neural_BRV).sum(-1) / math.log(self.index.vocab_size)
        bucket_BR = (entropy_BR * (config.entropy_sets + 1)).long().clamp(0, config.entropy_sets - 1)
        sets = {
            "none": torch.zeros_like(bucket_BR),
            "order": order_BR,
            "entropy": bucket_BR,
            "both": order_BR * config.entropy_sets + bucket_BR,
        }
        return torch.stack([sets[gate] for gate in config.gates], 2)


def check(config: MixerConfig) -> None:
    """Raises RecipeError, naming the field, when a value cannot work."""

    def require(fits: bool, field: str, rule: str) -> None:
        if not fits:
            raise RecipeError(f"evaluate.mixer.{field} is {getattr(config, field)}; it must be {rule}")

    share = config.hedge_share
    require(share == 0 or 1e-6 <= share < 1, "hedge_share", "0, or from 1e-6 to below 1")
    require(len(config.gates) > 0, "gates", "one or more")
    require(len(config.memory_tokens) == len(config.gates), "memory_tokens", "one number for each of gates")
    require(all(memory > 0 for memory in config.memory_tokens), "memory_tokens", "above 0")
    require(config.logistic_ridge > 0, "logistic_ridge", "above 0")
    require(config.block_tokens >= 1, "block_tokens", "at least 1")
    require(config.entropy_sets >= 1, "entropy_sets", "at least 1")


def _gather(rows_BRKV: Tensor, token_B: Tensor) -> Tensor:
    """Each row's value at the position's token, (B, R, K) float64."""
    index = token_B[:, None, None, None].expand(-1, *rows_BRKV.shape[1:3], 1)
    return rows_BRKV.gather(3, index)[..., 0].double()
