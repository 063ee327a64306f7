"""Further experts, one token at a time. The evaluation and the decoder call the very same object, so that whatever it
computes can be decoded; docs/experts.md adds one.

An expert is a file beside this one and a line in `EXPERTS`. It is in the library: what a score rests on is counted in
its bytes, and an audit or a decoder is a process of its own that imports nothing else. `evaluate.mixer.experts` names
the ones to mix.

Shapes: B positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hedgemix.experts.recency import Recency

SUM_TOLERANCE = 1e-4
"""How far a float32 row may be from 1, in sum."""


class Expert(Protocol):
    """Is mixed. It is copied with `copy.deepcopy`, and told a text's tokens in order from the first, each after
    its row was taken. An evaluation that goes on after a stop tells the earlier ones anew, without asking for rows."""

    def row(self) -> Tensor:
        """Give probabilities (V,), float32, on the CPU, of the next token: each above 0, their sum 1. Asked again, the
        same; whoever asks copies it before the next `update`."""
        ...

    def update(self, token: int) -> None:
        """Tell the token that `row` was about, or would have been."""
        ...


EXPERTS: dict[str, Callable[[int], Expert]] = {"recency": Recency}
"""How each begins, given the vocabulary's size."""


def start(names: Sequence[str], vocab_size: int) -> dict[str, Expert]:
    """Begin the experts of these names, which are told nothing yet."""
    return {name: EXPERTS[name](vocab_size) for name in names}


def tell(experts: dict[str, Expert], tokens: Sequence[int]) -> None:
    """Tell every expert these tokens."""
    for expert in experts.values():
        for token in tokens:
            expert.update(token)


def fill(name: str, expert: Expert, out_V: np.ndarray) -> None:
    """Copy the expert's next row to memory (V,), float32; raises ValueError as `rows` does."""
    np.copyto(out_V, expert.row().numpy())
    off = abs(float(out_V.sum()) - 1)
    if not (out_V.min() > 0 and off <= SUM_TOLERANCE):
        raise _no_distribution(name, float(out_V.min()), off)


def rows(experts: dict[str, Expert], tokens_B: np.ndarray, vocab_size: int) -> list[Tensor]:
    """Make each expert's rows (B, V), float32, of the next B tokens, which it is told one after another.

    Raises ValueError when a row is no distribution: what is mixed from it would be no code."""
    found = []
    for name, expert in experts.items():
        rows_BV = torch.empty(len(tokens_B), vocab_size)
        for at, token in enumerate(tokens_B.tolist()):
            rows_BV[at] = expert.row()
            expert.update(token)
        found.append(_distribution(name, rows_BV))
    return found


def _distribution(name: str, rows_V: Tensor) -> Tensor:
    off = (rows_V.sum(-1) - 1).abs().max()
    if not (rows_V.min() > 0 and off <= SUM_TOLERANCE):
        raise _no_distribution(name, float(rows_V.min()), float(off))
    return rows_V


def _no_distribution(name: str, smallest: float, off: float) -> ValueError:
    told = f"smallest {smallest:.3g}, sum off by {off:.3g}"
    return ValueError(f"expert {name!r} gave a row that is no distribution: {told}")
