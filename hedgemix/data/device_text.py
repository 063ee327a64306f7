"""A text that stays where it is, in mapped files say: memory does not grow with it. A GPU has it whole, 4 bytes a
token, so that no slice waits for the host.

Slices are what a tensor (N,) gives; a plain tensor serves wherever these types are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hedgemix.data import bpb
from hedgemix.data.shards import PIECE_TOKENS, TokenStream, tokens_between


@dataclass(frozen=True)
class Text:
    """Holds tokens: integers (N,), or a stream of them."""

    tokens_N: np.ndarray | TokenStream
    device: torch.device
    resident: bool | None = None
    """Whether the device has the whole text; None: where it is no CPU."""

    def __len__(self) -> int:
        return len(self.tokens_N)

    def __getitem__(self, span: slice) -> Tensor:
        """int64, on the device."""
        if self.device.type != "cpu" if self.resident is None else self.resident:
            return self._copy_N[span].long()
        return torch.from_numpy(self.read(span).astype(np.int64)).to(self.device)

    @cached_property
    def _copy_N(self) -> Tensor:
        """int32."""
        copy_N = torch.empty(len(self), dtype=torch.int32, device=self.device)
        for at in range(0, len(self), PIECE_TOKENS):
            piece = self.read(slice(at, at + PIECE_TOKENS))
            copy_N[at : at + len(piece)] = torch.from_numpy(piece.astype(np.int32))
        return copy_N

    def read(self, span: slice) -> np.ndarray:
        """Read tokens on the host, in the type they are stored in (uint16 from a stream)."""
        start, stop, _ = span.indices(len(self))
        return tokens_between(self.tokens_N, start, stop)


@dataclass(frozen=True)
class Sizes:
    """Gives the bytes of every token of a text but the first, which is given and counts none; see `bpb.token_bytes`."""

    text: Text
    tables: bpb.ByteTables

    def __len__(self) -> int:
        return len(self.text)

    def read(self, span: slice) -> np.ndarray:
        """Count the bytes of these tokens on the host, int16."""
        start, stop, _ = span.indices(len(self))
        return bpb.token_bytes(self.tables, self.text.tokens_N, start, stop)

    def __getitem__(self, span: slice) -> Tensor:
        """float32, on the device: what each target weighs when text counts by its bytes."""
        return torch.from_numpy(self.read(span).astype(np.float32)).to(self.text.device)


@dataclass(frozen=True)
class Ones:
    """Gives every token a weight of one."""

    text: Text

    def __getitem__(self, span: slice) -> Tensor:
        """float32, on the device."""
        return torch.ones(len(range(*span.indices(len(self.text)))), device=self.text.device)


def same(one: np.ndarray, other: TokenStream, piece_tokens: int = 1 << 20) -> bool:
    """Say whether two texts are equal, looked at in pieces."""
    spans = ((at, min(piece_tokens, len(one) - at)) for at in range(0, len(one), piece_tokens))
    return len(one) == len(other) and all(np.array_equal(one[at : at + n], other.read(at, n)) for at, n in spans)
