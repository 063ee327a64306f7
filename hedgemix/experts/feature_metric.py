"""The metric in which features, a model's final hidden states, are compared: whitened by their own second moments.

Raw features share a few large directions, so that all their cosines are alike. Multiplied by the inverse root of their
moments they tell contexts apart. The moments are those of the positions scored so far, beside a prior that is a
constant: nothing is shipped, and nothing of the text to come enters.

Shapes: B positions, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PRIOR_TOKENS = 256
"""Positions whose moments are the identity, before the first one of the text: features have a mean square of 1."""
FIRST_TOKENS = 1024
"""Position of the first refresh, and the number of positions whose moments are summed at once."""


class FeatureMetric:
    """Second moments of the features so far. The whiteners are those of the last refresh: at positions 1,024, 2,048,
    4,096 and so on, which are places in the text, whatever calls or ranks it was cut into."""

    def __init__(self, width: int, ridges: Sequence[float], device: torch.device | str = "cpu") -> None:
        """ridges: one whitener each; what is added to the moments' eigenvalues, in units of their mean."""
        self.ridges = tuple(ridges)
        self.position = 1
        """The next position; a text's first scored one is 1."""
        self.moments_DD = PRIOR_TOKENS * torch.eye(width, dtype=torch.float64, device=device)
        self.waiting: list[Tensor] = []
        """Features that are not in the moments yet, fewer than FIRST_TOKENS."""
        self.whiteners: list[Tensor] = []
        """(D, D), float32, symmetric, one for each ridge."""
        self._refresh()

    def until_refresh(self) -> int:
        """Tell how many positions `add` may still take at once."""
        return max(FIRST_TOKENS, 1 << self.position.bit_length()) - self.position

    def add(self, features_BD: Tensor) -> bool:
        """Learn the features of the next positions; True when that changed the whiteners."""
        count = len(features_BD)
        assert count <= self.until_refresh(), "a refresh lies between these positions"
        refreshed = count == self.until_refresh()
        while count:  # summed in blocks that are places in the text, so that no cut changes a bit
            taken = min(count, FIRST_TOKENS - self.position % FIRST_TOKENS)
            self.waiting.append(features_BD[len(features_BD) - count :][:taken].float())
            self.position += taken
            count -= taken
            if self.position % FIRST_TOKENS == 0:
                block_BD = torch.cat(self.waiting)
                self.moments_DD += (block_BD.T @ block_BD).double()
                self.waiting = []
        if refreshed:
            self._refresh()
        return refreshed

    def _refresh(self) -> None:
        """In float64 on the CPU, which is the same wherever the features come from."""
        moments_DD = self.moments_DD.cpu() / (PRIOR_TOKENS + self.position - 1)
        values_D, vectors_DD = torch.linalg.eigh(moments_DD)
        self.whiteners = [
            ((vectors_DD * (values_D + ridge * values_D.mean()).rsqrt()) @ vectors_DD.T).to(
                self.moments_DD.device, torch.float32
            )
            for ridge in self.ridges
        ]

    def state_dict(self) -> dict[str, Any]:
        """Collect what was learned; the tensors may be the metric's own."""
        return {
            "position": self.position,
            "moments": self.moments_DD,
            "waiting": torch.cat([self.moments_DD.new_empty(0, len(self.moments_DD)).float(), *self.waiting]),
            "whiteners": torch.stack(self.whiteners),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.position = state["position"]
        self.moments_DD.copy_(state["moments"])
        device = self.moments_DD.device
        self.waiting = [state["waiting"].to(device)]
        self.whiteners = list(state["whiteners"].to(device))
