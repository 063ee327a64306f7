"""The experts over a model's features: neural cache and fast head, in step, with one metric between them.

Evaluation and decoder hold one of these each: `rows` is for many positions whose tokens are known, `predict` and
`update` for one at a time. Both give the same rows, rounding aside.

Shapes: B positions, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hedgemix.config import EvaluateConfig
from hedgemix.experts.fast_head import FastHead
from hedgemix.experts.feature_metric import FeatureMetric
from hedgemix.experts.neural_cache import NeuralCache
from hedgemix.model.transformer import Model

CACHE, HEAD = "cache", "head"


def names(config: EvaluateConfig) -> tuple[str, ...]:
    """Name the experts over features that the configuration turns on, in the order of their rows."""
    head = config.ttt.enabled and config.ttt.kind == "head"
    return (CACHE,) * config.cache.enabled + (HEAD,) * head


class FeatureExperts:
    """Holds what they learned before the next position; features may be of any float type."""

    def __init__(self, config: EvaluateConfig, vocab_size: int, width: int, device: torch.device | str = "cpu") -> None:
        """width: features of a position."""
        self.names = names(config)
        cache, head = config.cache, config.ttt.head
        ridges = {CACHE: cache.ridge, HEAD: head.ridge}
        self.metric = FeatureMetric(width, [ridges[name] for name in self.names], device)
        self.cache = self.head = None
        if CACHE in self.names:
            look = cache.memory_tokens, cache.theta, cache.decay_tokens, cache.floor
            self.cache = NeuralCache(vocab_size, width, *look, device=device)
        if HEAD in self.names:
            steps = head.rate, head.memory_tokens, head.block_tokens
            self.head = FastHead(vocab_size, width, *steps, device=device)
        self._refresh()

    def rows(self, log_rows_BV: Tensor, features_BD: Tensor, tokens_B: Tensor) -> dict[str, Tensor]:
        """Give each expert's probabilities (B, V), float32, of the next B positions, then learn their tokens (B,).

        log_rows_BV: what the frozen model says of them."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        left = 0
        while left < len(features_BD):
            here = slice(left, min(left + self.metric.until_refresh(), len(features_BD)))
            if self.cache:
                parts[CACHE].append(self.cache.rows(features_BD[here], tokens_B[here]))
            if self.head:
                parts[HEAD].append(self.head.rows(log_rows_BV[here], features_BD[here], tokens_B[here]))
            self._told(features_BD[here])
            left = here.stop
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def predict(self, log_row_V: Tensor, feature_D: Tensor) -> dict[str, Tensor]:
        """Give each expert's probabilities (V,) of the next position's token."""
        self.asked_D = feature_D = feature_D.float()
        said = {}
        if self.cache:
            said[CACHE] = self.cache.predict(feature_D)
        if self.head:
            said[HEAD] = self.head.predict(log_row_V, feature_D)
        return said

    def update(self, token: int) -> None:
        """Learn the token that `predict` was about."""
        for expert in (self.cache, self.head):
            if expert:
                expert.update(token)
        self._told(self.asked_D[None])

    def _told(self, features_BD: Tensor) -> None:
        if self.metric.add(features_BD):
            self._refresh()

    def _refresh(self) -> None:
        experts = [expert for expert in (self.cache, self.head) if expert]
        for expert, whitener_DD in zip(experts, self.metric.whiteners, strict=True):
            expert.refresh(whitener_DD)

    def state_dict(self) -> dict[str, Any]:
        """Collect what was learned, in tensors that work may go on with."""
        parts = {"metric": self.metric, CACHE: self.cache, HEAD: self.head}
        return {name: part.state_dict() for name, part in parts.items() if part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in {"metric": self.metric, CACHE: self.cache, HEAD: self.head}.items():
            if part:
                part.load_state_dict(state[name])


def start_experts(config: EvaluateConfig, model: Model, device: torch.device | str = "cpu") -> FeatureExperts | None:
    """Begin the experts over the model's features, before a text's first scored position; None when all are off."""
    return FeatureExperts(config, model.vocab_size, model.config.width, device) if names(config) else None
