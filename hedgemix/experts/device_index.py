"""The n-gram and match rows of `ngram` and `match` where the index lies on the device, for a GPU.

A span makes its rows, bitwise those of `NgramRows`, without a word from the host: every column is a slice of memory
that is there, all orders go through the same few array operations, and how many pairs and repeats a span has is known
from the start. So the host never waits for the device, and the device never for the host. 96 bytes a token of the text
with five orders above 1, and 8 a pair.

Shapes as in `ngram`; O orders above 1, F = O x B positions of a span by order, T repeats, S whole spans of the text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hedgemix.data.shards import PIECE_TOKENS
from hedgemix.experts import match
from hedgemix.experts.ngram_index import NgramIndex, counted, longest_class


class Resident:
    """Holds an index and the counts of the tokens before `position`, all in one device's memory."""

    def __init__(self, index: NgramIndex, device: torch.device | str, span_tokens: int, discount: float) -> None:
        """span_tokens: of the spans whose sizes are counted now: those that start at its multiples. Of any other span
        they are counted when it is met, and the host then waits for them. discount: as of `NgramRows`."""
        self.orders, self.vocab_size, self.position = index.orders, index.vocab_size, 0
        self.device, self.span_tokens, self.discount = torch.device(device), span_tokens, discount
        tables, total = list(index.tables.items()), len(index.tokens_N)

        def column(size: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, size, dtype=dtype, device=self.device)

        def put(out: Tensor, values: np.ndarray) -> None:
            # A copy: mapped files are read-only, which torch does not know.
            out.copy_(torch.from_numpy(np.array(values, np.float32 if out.is_floating_point() else np.int32)))

        self.text_3N, self.share_N = column(total, 3), column(total, dtype=torch.float32)
        """int32: each position's token, its class (`longest_class`) and the match's token; the match's share."""
        self.columns_4ON = column(total, 4, len(tables))
        """int32: `first_N`, `pair_N`, `distinct_N` and `counted`, of each order."""
        for start in range(0, total, PIECE_TOKENS):
            here = slice(start, min(start + PIECE_TOKENS, total))
            put(self.text_3N[0, here], index.tokens_N[here])
            put(self.text_3N[1, here], longest_class(index, here.start, here.stop))
            predicted_B = np.asarray(index.match.predicted_N[here])
            put(self.text_3N[2, here], predicted_B.clip(0))
            share_B = match.confidence(np.asarray(index.match.hits_N[here]), np.asarray(index.match.tries_N[here]))
            put(self.share_N[here], np.where(predicted_B >= 0, share_B.astype(np.float32), 0))
            for o, (n, table) in enumerate(tables):
                put(self.columns_4ON[0, o, here], table.first_N[here])
                put(self.columns_4ON[1, o, here], table.pair_N[here])
                put(self.columns_4ON[2, o, here], table.distinct_N[here])
                put(self.columns_4ON[3, o, here], counted(index, n, here.start, here.stop))
        self.memory_tokens = len(index.memory_M)
        for o, (n, _) in enumerate(tables):  # what has no context shares it with nothing: first pairs are not below 0
            alone = min(max(n - 1 - self.memory_tokens, 0), total)
            put(self.columns_4ON[0, o, :alone], -1 - np.arange(alone))
        # Before each order's pairs one slot that is never read: pair -1.
        sizes = [1 + len(table.token_P) for _, table in tables]
        ends = np.cumsum(sizes).tolist()
        base = [1 + end - size for end, size in zip(ends, sizes, strict=True)]
        self.base_O1 = torch.tensor(base, dtype=torch.int64, device=self.device)[:, None]
        self.token_P, self.count_P = column(sum(sizes)), column(sum(sizes))
        self.count_V = column(self.vocab_size)
        for at, (_, table) in zip(base, tables, strict=True):
            for start in range(0, len(table.token_P), PIECE_TOKENS):
                values = table.token_P[start : start + PIECE_TOKENS]
                put(self.token_P[at + start : at + start + len(values)], values)
        for start in range(0, self.memory_tokens, PIECE_TOKENS):
            here = slice(start, start + PIECE_TOKENS)
            token_B = torch.from_numpy(index.memory_M[here].astype(np.int64)).to(self.device)
            pairs_OB = np.array([pair_M[here] for pair_M in index.memory_pair_M.values()], np.int64)
            pair_OB = torch.from_numpy(pairs_OB.reshape(len(tables), len(token_B))).to(self.device)
            self._count(token_B, pair_OB)
        self._sizes = self._whole_spans()
        if self.memory_tokens:
            self.sizes(1, min(span_tokens, total))
        if total % span_tokens:
            self.sizes(total // span_tokens * span_tokens, total)

    def _whole_spans(self) -> dict[tuple[int, int], tuple[list[int], int]]:
        """`sizes` of every span that starts at a multiple of `span_tokens`, from one read of the device."""
        size, total = self.span_tokens, self.columns_4ON.shape[2]
        group, parts = max(PIECE_TOKENS // size, 1) * size, []
        for start in range(0, total // size * size, group):
            piece_4ON = self.columns_4ON[:, :, start : min(start + group, total // size * size)]
            parts.append(_sizes_of(piece_4ON.unflatten(2, (-1, size))))
        found = torch.cat(parts, 1).tolist() if parts else []
        whole = {}
        for span in range(total // size):
            *pairs_O, repeats = (row[span] for row in found)
            whole[span * size, (span + 1) * size] = pairs_O, repeats
        return whole

    def sizes(self, start: int, stop: int) -> tuple[list[int], int]:
        """Count a span's pairs, by order, and its repeats: positions that share a context with an earlier one of it,
        once for each of these."""
        # Without a memory the text's first token has no context: with it a span has the same ones.
        key = (0 if start == 1 and not self.memory_tokens else start, stop)
        if key not in self._sizes:
            *pairs_O, repeats = _sizes_of(self.columns_4ON[:, :, None, start:stop])[:, 0].tolist()
            self._sizes[key] = pairs_O, repeats
        return self._sizes[key]

    def text(self, start: int, stop: int) -> Tensor:
        """View, as int32 (3, B): tokens, their classes (`longest_class`) and what the match predicts."""
        return self.text_3N[:, start:stop]

    def fill(self, p_BKV: Tensor, text_3B: Tensor, start: int, stop: int, matches: bool) -> None:
        """Write `NgramRows.rows` of the positions, and behind them `match.rows`, into the first of p_BKV (float32,
        contiguous). text_3B: `text` as int64. Leaves the counts as they are.

        Raises ValueError unless they stand at start.
        """
        if self.position != start:
            raise ValueError(f"rows {start}..{stop} asked of counts that stand at {self.position}")
        top_BV = self._unigram_rows(text_3B[0], start)
        k = 0
        if self.orders[0] == 1:
            top_BV, k = p_BKV[:, 0].copy_(top_BV), 1
        if len(self.base_O1):
            top_BV = self._interpolate(p_BKV, top_BV, k, start, stop)
            k += len(self.base_O1)
        if matches:
            share_B1 = self.share_N[start:stop, None]
            torch.mul(top_BV, 1 - share_B1, out=p_BKV[:, k]).scatter_add_(1, text_3B[2, :, None], share_B1)

    def _unigram_rows(self, token_B: Tensor, start: int) -> Tensor:
        """As `ngram._unigram_rows`; counts in int32, since a sum in float32 would lose single ones beyond 2**24."""
        size = len(token_B)
        count_BV = torch.zeros(size, self.vocab_size, dtype=torch.int32, device=self.device)
        count_BV[0] = self.count_V
        count_BV[1:].scatter_add_(1, token_B[:-1, None], torch.ones_like(token_B[1:, None], dtype=torch.int32))
        count_BV = count_BV.cumsum(0, dtype=torch.int32)
        before = self.memory_tokens + start
        total_B1 = torch.arange(before, before + size, device=self.device)[:, None]
        backoff_B1 = torch.where(total_B1 > 0, (count_BV > 0).sum(1, keepdim=True), 1).float()
        return (count_BV + backoff_B1 / self.vocab_size) / (total_B1 + backoff_B1)

    def _interpolate(self, p_BKV: Tensor, top_BV: Tensor, k: int, start: int, stop: int) -> Tensor:
        """Rows of every order above 1, into p_BKV from column k on; returns the last."""
        pairs_O, repeats = self.sizes(start, stop)
        size, experts, vocab_size = p_BKV.shape
        first_OB, pair_OB, distinct_OB, counted_OB = self.columns_4ON[:, :, start:stop].long()
        later_T, earlier_T = _repeats(first_OB, repeats)
        distinct_F = distinct_OB.flatten()
        open_F = distinct_F.cumsum(0) - distinct_F
        row_R = torch.repeat_interleave(distinct_F, output_size=sum(pairs_O))
        # From a row's place among the R to the pair's number, and back.
        shift_F = (first_OB + self.base_O1).flatten() - open_F
        pair_R = shift_F[row_R] + torch.arange(len(row_R), device=self.device)
        count_R = self.count_P[pair_R]
        at_T = (pair_OB + self.base_O1).flatten()[earlier_T] - shift_F[later_T]
        count_R.index_add_(0, at_T, counted_OB.flatten()[earlier_T].int())
        total_OB = torch.zeros_like(distinct_F).index_add_(0, row_R, count_R.long()).view_as(distinct_OB)
        scale_OB = 1.0 / total_OB.clamp_min(1)
        factor_OB1 = torch.where(total_OB > 0, self.discount * distinct_OB * scale_OB, 1.0)[..., None]
        share_R = (count_R - self.discount) * scale_OB.flatten()[row_R]
        column_O1 = torch.arange(k, k + len(pairs_O), device=self.device)[:, None] * vocab_size
        row_F = (torch.arange(size, device=self.device) * (experts * vocab_size) + column_O1).flatten()
        place_R = row_F[row_R] + self.token_P[pair_R]
        flat = p_BKV.view(-1)
        # Each (row, token) occurs once, so adding is order-free and repeats bitwise.
        spans = zip(factor_OB1, share_R.split(pairs_O), place_R.split(pairs_O), strict=True)
        for o, (factor_B1, share, place) in enumerate(spans):
            top_BV = torch.mul(top_BV, factor_B1, out=p_BKV[:, k + o])
            flat.scatter_add_(0, place, share)
        return top_BV

    def advance(self, stop: int) -> None:
        """Count the tokens up to stop, after they were scored. Raises ValueError for a stop that lies behind."""
        if stop < self.position:
            raise ValueError(f"tokens {self.position}..{stop} asked of counts that stand at {self.position}")
        pair_OB, counted_OB = self.columns_4ON[1, :, self.position : stop], self.columns_4ON[3, :, self.position : stop]
        self._count(self.text_3N[0, self.position : stop], torch.where(counted_OB > 0, pair_OB, -1))
        self.position = stop

    def _count(self, token_B: Tensor, pair_OB: Tensor) -> None:
        self.count_V.index_add_(0, token_B, torch.ones_like(token_B, dtype=torch.int32))
        pair_F = (pair_OB + self.base_O1).flatten()
        self.count_P.index_add_(0, pair_F, torch.ones_like(pair_F, dtype=torch.int32))


def _ranks(first_FB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row's positions, sorted by context, earliest first: which they are, where their context begins in that
    order, and how many of the row came before in the same context."""
    first_FB, by_context_FB = first_FB.sort(dim=-1, stable=True)
    number_B = torch.arange(first_FB.shape[-1], device=first_FB.device)
    opens_FB = torch.zeros_like(by_context_FB)
    opens_FB[..., 1:] = torch.where(first_FB[..., 1:] != first_FB[..., :-1], number_B[1:], 0)
    opens_FB = opens_FB.cummax(-1).values
    return by_context_FB, opens_FB, number_B - opens_FB


def _sizes_of(columns_4OSB: Tensor) -> Tensor:
    """Pairs of each order, then all repeats, (O + 1, S) int64, of S spans."""
    repeats_OS = _ranks(columns_4OSB[0])[2].sum(-1)
    return torch.cat([columns_4OSB[2].sum(-1), repeats_OS.sum(0, keepdim=True)])


def _repeats(first_OB: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
    """All (later, earlier) positions of a span that share a context, as places of F."""
    by_context_OB, opens_OB, rank_OB = _ranks(first_OB)
    orders, size = first_OB.shape
    row_O1 = torch.arange(orders, device=first_OB.device)[:, None] * size
    by_context_F, opens_F = (by_context_OB + row_O1).flatten(), (opens_OB + row_O1).flatten()
    rank_F = rank_OB.flatten()
    later_T = torch.repeat_interleave(rank_F, output_size=repeats)
    behind_F = opens_F - (rank_F.cumsum(0) - rank_F)
    earlier_T = behind_F[later_T] + torch.arange(repeats, device=first_OB.device)
    return by_context_F[later_T], by_context_F[earlier_T]
