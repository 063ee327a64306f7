"""Attention inside documents: where they begin in rows of tokens, and the masks that follow from it.

A document begins with the token BOS; a row's first position begins one too, whatever its token. So a document that is
cut where a row ends goes on, in the next row, as one of its own.

Shapes: B sequences, T positions, N positions of all sequences, S documents of all sequences, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_A_DOCUMENT = 256
"""A compiled graph has places for documents of so many tokens in the mean, and one more a sequence; a kernel's grid
grows with each place, also an empty one. FineWeb's documents have 1,200 of 1,024 pieces, 960 of 8,192."""


class Documents:
    """Holds where the documents of a batch begin, and what is made of it, once for all layers."""

    def __init__(self, tokens_BT: Tensor, bos_id: int) -> None:
        self.first_BT = tokens_BT == bos_id
        """Whether a document begins with the position's token."""
        self.number_BT = self.first_BT.cumsum(1)
        """Of the position's document in its row."""
        self.made: dict[tuple[int, int | None], Tensor] = {}
        self.counted: list[list[int]] = []

    def mask(self, queries: int) -> Tensor:
        """Mask causal attention from a row's last positions, so many, to all: bool (B, 1, queries, T)."""
        if (queries, None) not in self.made:
            T = self.number_BT.shape[1]
            together = self.number_BT[:, T - queries :, None] == self.number_BT[:, None]
            self.made[queries, None] = together.tril(T - queries)[:, None]
        return self.made[queries, None]

    def lengths(self) -> list[list[int]]:
        """Count the positions of each row's documents, on the host."""
        if not self.counted:
            self.counted = [[n for n in row.bincount().tolist() if n] for row in self.number_BT]
        return self.counted

    def last_begins(self) -> Tensor:
        """Find the position at which each row's last document begins, int64 (B,)."""
        return (self.first_BT * torch.arange(self.first_BT.shape[1], device=self.first_BT.device)).amax(1)

    def band_mask(self, mask: Tensor, queries: int, band: int) -> Tensor:
        """Narrow the mask of `banded_attention`'s blocks, bool (B * blocks, 1, band, 2 * band)."""
        if (queries, band) not in self.made:
            B, T = self.number_BT.shape
            blocks, earlier = -(-queries // band), min(T - queries, band)
            padded = (band - earlier, blocks * band - queries)
            key = F.pad(self.number_BT[:, T - queries - earlier :], padded).view(B, blocks + 1, band)
            query, key = key[:, 1:], torch.cat([key[:, :-1], key[:, 1:]], 2)
            together = query[..., None] == key[:, :, None]
            self.made[queries, band] = mask & together.view(-1, 1, band, 2 * band)
        return self.made[queries, band]

    def edges(self, queries: int) -> tuple[Tensor, Tensor]:
        """Add up the lengths of the documents of all rows, one behind the other, for a kernel that takes sequences of
        any length: int32 (S + 1,), of what each has of its row's last positions, so many, and of all its positions.

        Eagerly S is their number, which waits for the device once a batch. Compiled it is fixed, and the rest of them
        is empty; more documents than that stop the program, so ask `fits` first.
        """
        key = (-queries, None)
        if key not in self.made:
            B, T = self.first_BT.shape
            first_BT = self.first_BT.clone()
            first_BT[:, 0] = True
            number_N = first_BT.flatten().cumsum(0)
            places = room(B, T)
            if torch.compiler.is_compiling():
                torch._assert_async(number_N[-1] <= places, "more documents than a compiled graph has places for")
            else:
                places = int(number_N[-1])
            # Where a document would begin that is not there, all positions are over.
            of_all = torch.searchsorted(number_N, torch.arange(1, places + 2, device=number_N.device))
            of_last = of_all // T * queries + (of_all % T - (T - queries)).clamp_min(0)
            self.made[key] = torch.stack([of_last, of_all]).int()
        of_last, of_all = self.made[key]
        return of_last, of_all


def room(sequences: int, tokens: int) -> int:
    """Count the documents that a compiled graph has places for, in so many sequences of so many tokens."""
    return sequences * (1 + -(-tokens // TOKENS_A_DOCUMENT))


def fits(tokens_BT: Tensor, bos_id: int | None) -> bool:
    """Tell whether a compiled graph surely has places for these rows' documents; None: there are none in it."""
    return bos_id is None or int((tokens_BT == bos_id).sum()) + len(tokens_BT) <= room(*tokens_BT.shape)


def earlier(x_BTD: Tensor, before_B1D: Tensor | None, documents: Documents | None) -> Tensor:
    """Give each position what the one before it has, (B, T, D): 0 at a document's beginning.

    before_B1D: what the position before the first has; None: there is none. documents: None where a row is one.
    """
    y = F.pad(x_BTD, (0, 0, 1, 0))[:, :-1] if before_B1D is None else before_B1D
    return y if documents is None else y.masked_fill(documents.first_BT[..., None], 0)
