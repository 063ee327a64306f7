"""Causal attention: over a whole sequence, over a band of a long one, or one position at a time behind a cache.

Queries may come for the last positions only; keys and values come for all.

Shapes: B sequences, H heads, T query positions (keys and values may have more before them), E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hedgemix.model.documents import Documents
from hedgemix.model.layers import causal_attention


def windowed(q_BHTE: Tensor) -> bool:
    """Tell whether `windowed_attention` takes these queries."""
    return q_BHTE.is_cuda and on_device(q_BHTE.dtype, q_BHTE.shape[-1], q_BHTE.device)


def on_device(dtype: torch.dtype, head_width: int, device: torch.device) -> bool:
    """Tell whether this GPU has FlashAttention 2 for such heads."""
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    return flash_takes(dtype, head_width, torch.cuda.get_device_capability(device))


# A compiler asks once, and writes the answer into the graph; torch.compiler.assume_constant_result says the same, and
# loads the compiler for it.
on_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def flash_takes(dtype: torch.dtype, head_width: int, capability: tuple[int, int]) -> bool:
    """Tell whether FlashAttention 2 has kernels for such heads on a GPU of this compute capability."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and head_width % 8 == 0 and head_width <= 256 and capability >= (8, 0)


def windowed_attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, band: int) -> Tensor:
    """Attend as `banded_attention` does, by the kernel's own window: half the keys, and no mask to write or plan
    for."""
    q, k, v = (x.transpose(1, 2) for x in (q_BHTE, k_BHTE, v_BHTE))
    return _flash(q, k, v, None, None, q.shape[1], k.shape[1], band).transpose(1, 2)


def document_attention(
    q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, band: int | None, documents: Documents
) -> Tensor:
    """Attend as `attention` does within documents, by the kernel's sequences of any length: no mask, and no product of
    two documents.

    Never run on a GPU yet: what is known is that the numbers given to the kernel are right, that torch traces the call
    and its gradient, and what the kernel's documentation says of them.
    """
    B, _, queries, _ = q_BHTE.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BHTE, v_BHTE))
    y = _flash(q, k, v, *documents.edges(queries), queries, k_BHTE.shape[2], band)
    return y.unflatten(0, (B, queries)).transpose(1, 2)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor | None, of_k: Tensor | None, max_q: int, max_k: int, band: int | None
) -> Tensor:
    """Call the kernel on (B, T, H, E), or with edges on (B * T, H, E). A sequence's last query is at its last key's
    position: it sees window_size_left keys before it, window_size_right after."""
    y, *_ = torch.ops.aten._flash_attention_forward(
        query=q,
        key=k,
        value=v,
        cum_seq_q=of_q,
        cum_seq_k=of_k,
        max_q=max_q,
        max_k=max_k,
        dropout_p=0.0,
        is_causal=band is None,
        return_debug_mask=False,
        window_size_left=None if band is None else band - 1,
        window_size_right=None if band is None else 0,
    )
    return y


def banded_attention(
    q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, band: int, documents: Documents | None = None
) -> Tensor:
    """Attend causally from each position to itself and the `band - 1` positions before it; returns (B, H, T, E).

    Queries are of the last T of the positions that keys and values have. Where no kernel has a window they are cut into
    blocks of `band`, each of which attends to itself and the block before it, so the work is 2 * band keys a query,
    whatever T is.
    """
    if windowed(q_BHTE):
        return windowed_attention(q_BHTE, k_BHTE, v_BHTE, band)
    B, H, T, E = q_BHTE.shape
    blocks = -(-T // band)
    padding = blocks * band - T
    earlier = min(k_BHTE.shape[2] - T, band)  # keys before the first query's own that it can see
    q = F.pad(q_BHTE, (0, 0, 0, padding))

    def with_previous(x: Tensor) -> Tensor:
        x = F.pad(x[:, :, -T - earlier :], (0, 0, band - earlier, padding)).view(B, H, blocks + 1, band, E)
        return torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3).transpose(1, 2).reshape(B * blocks, H, 2 * band, E)

    query = torch.arange(band, device=q.device)[:, None] + band
    key = torch.arange(2 * band, device=q.device)
    inside = (key <= query) & (key > query - band)
    first = inside & (key >= band - earlier)
    mask = torch.stack([first] + [inside] * (blocks - 1)).repeat(B, 1, 1)[:, None]
    if documents is not None:
        mask = documents.band_mask(mask, T, band)
    q = q.view(B, H, blocks, band, E).transpose(1, 2).reshape(B * blocks, H, band, E)
    y = F.scaled_dot_product_attention(q, with_previous(k_BHTE), with_previous(v_BHTE), attn_mask=mask)
    return y.view(B, blocks, H, band, E).transpose(1, 2).reshape(B, H, blocks * band, E)[:, :, :T]


@dataclass
class Cache:
    """Keeps what a growing text leaves behind: with it, `features` runs one more token instead of the whole text
    again."""

    keys: list[Tensor]
    """Of each layer, (B, H, positions, E)."""
    values: list[Tensor]
    tokens_B1: Tensor
    """The last token run, for the bigram embedding."""
    x_B1D: Tensor
    """The last token's input, for the smear gate."""
    begins_B: Tensor | None = None
    """Position at which each sequence's document began, int64; None where it does not matter."""
    length: int = 0
    """Tokens run so far."""

    def attend(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BHTE: Tensor,
        v_BHTE: Tensor,
        band: int | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Keep the new keys and values; attend from the new positions, one at a time once there are earlier ones."""
        stop = self.length + k_BHTE.shape[2]
        self.keys[layer][:, :, self.length : stop], self.values[layer][:, :, self.length : stop] = k_BHTE, v_BHTE
        if self.length == 0:
            return attention(q_BHTE, k_BHTE, v_BHTE, band, documents)
        start = 0 if band is None else max(0, stop - band)
        k, v = (kept[layer][:, :, start:stop].to(q_BHTE.dtype) for kept in (self.keys, self.values))
        mask = None
        if documents is not None and self.begins_B is not None:
            begins_B = self.begins_B.masked_fill(documents.first_BT[:, 0], self.length)
            mask = (torch.arange(start, stop, device=k.device) >= begins_B[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q_BHTE, k, v, attn_mask=mask)

    def advance(self, tokens_BT: Tensor, x_BTD: Tensor, documents: Documents | None) -> None:
        """Remember what the next token needs of those just run, (B, T), and their inputs, (B, T, D)."""
        self.tokens_B1, self.x_B1D = tokens_BT[:, -1:], x_BTD[:, -1:]
        if documents is not None and self.begins_B is not None:
            begins_B = self.length + documents.last_begins()
            self.begins_B = torch.where(documents.first_BT.any(1), begins_B, self.begins_B)
        self.length += tokens_BT.shape[1]


def attention(
    q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, band: int | None, documents: Documents | None = None
) -> Tensor:
    """Attend causally over the whole sequence, or over the last `band` positions, of these within the position's own
    document if documents are given; queries of the last positions may come alone. Returns (B, H, queries, E)."""
    queries, keys = q_BHTE.shape[2], k_BHTE.shape[2]
    if documents is not None and windowed(q_BHTE):
        return document_attention(q_BHTE, k_BHTE, v_BHTE, band, documents)
    if band is None or band >= keys:
        if queries == keys:
            return causal_attention(q_BHTE, k_BHTE, v_BHTE, documents)
        # is_causal would count both from the first position.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BHTE.device).tril(keys - queries)
        if documents is not None:
            mask = documents.mask(queries)
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=mask)
    return banded_attention(q_BHTE, k_BHTE, v_BHTE, band, documents)
