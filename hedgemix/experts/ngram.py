"""Exact causal n-gram experts, Kneser-Ney interpolated, at the speed of array operations.

`ngram_index` numbers the pairs of a context in order of first appearance; here their running counts are kept, and make
the rows of many positions at once. `ngram_online` makes the same rows, bitwise, one token after another.

Shapes: N tokens of the text, B positions of a block, V vocabulary, P pairs of one order, R ragged (position, pair).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch
from torch import Tensor

from hedgemix.data.shards import PIECE_TOKENS
from hedgemix.experts import sorted_ngrams
from hedgemix.experts.ngram_index import NgramIndex, OrderIndex, counted, counted_pairs


class NgramRows:
    """Makes the rows of an index's orders from counts of the tokens before `position`, on the CPU;
    `device_index.Resident` does so on a GPU."""

    def __init__(self, index: NgramIndex, discount: float) -> None:
        """Begin before the first token of the text, all of the memory counted. discount: taken from every pair's count,
        between 0 and 1.

        A mapped index has its counts mapped too, from a file without a name in the folder for temporary ones: 4 bytes a
        pair there, and none of memory that the kernel cannot take back.
        """
        arrays = sorted_ngrams.Arrays(None)
        if any(isinstance(t.token_P, np.memmap) for t in index.tables.values()):
            arrays = sorted_ngrams.Arrays(Path(gettempdir()))
        self.index, self.discount, self.position = index, discount, 0
        self.unigram_V = torch.zeros(index.vocab_size, dtype=torch.int32)
        self.token_P = {n: torch.from_numpy(table.token_P) for n, table in index.tables.items()}
        self.count_P = {n: torch.from_numpy(arrays.zeros(len(table.token_P))) for n, table in index.tables.items()}
        for start in range(0, len(index.memory_M), PIECE_TOKENS):
            here = slice(start, start + PIECE_TOKENS)
            self._count(index.memory_M[here], {n: pair_M[here] for n, pair_M in index.memory_pair_M.items()})

    def rows(self, start: int, stop: int) -> list[Tensor]:
        """Make probability rows (B, V), float32, of positions start..stop-1, one tensor for each of index.orders.

        The row of position t counts every token before t, those inside the block too, so the rows do not depend on how
        the text is cut into blocks (bitwise). Kneser and Ney 1995, interpolated (Chen and Goodman 1998, section 2.7):
        p_n(w|c) = (count(c, w) - d + d D_c p_{n-1}(w|c')) / count(c), with D_c tokens that followed c, d the discount
        and counts as `ngram_index.counted` says; an unseen context keeps p_{n-1}. The unigram counts every token and is
        Witten-Bell interpolated with the uniform distribution. Moves no count.

        Raises ValueError unless the counts stand at start.
        """
        self._check(start, stop)
        p_BV = _unigram_rows(self.unigram_V, _tensor(self.index.tokens_N[start:stop]), len(self.index.memory_M) + start)
        out = [p_BV] if self.index.orders[0] == 1 else []
        for n, table in self.index.tables.items():
            p_BV = self._interpolate(p_BV, n, table, start, stop)
            out.append(p_BV)
        return out

    def advance(self, stop: int) -> None:
        """Count the tokens up to stop, after they were scored. Raises ValueError for a stop that lies behind."""
        self._check(self.position, stop)
        here = slice(self.position, stop)
        self._count(self.index.tokens_N[here], {n: counted_pairs(self.index, n, here) for n in self.index.tables})
        self.position = stop

    def _count(self, tokens_B: np.ndarray, pairs_B: dict[int, np.ndarray]) -> None:
        token_B = _tensor(tokens_B)
        self.unigram_V.index_add_(0, token_B, torch.ones_like(token_B, dtype=torch.int32))
        for n, pair_host in pairs_B.items():
            pair_B = _tensor(pair_host[pair_host >= 0])
            self.count_P[n].index_add_(0, pair_B, torch.ones_like(pair_B, dtype=torch.int32))

    def _check(self, start: int, stop: int) -> None:
        if self.position != start or not start <= stop <= len(self.index.tokens_N):
            raise ValueError(f"tokens {start}..{stop} asked of counts that stand at {self.position}")

    def _interpolate(self, p_BV: Tensor, n: int, table: OrderIndex, start: int, stop: int) -> Tensor:
        vocab_size = p_BV.shape[1]
        first_host, pair_host = table.first_N[start:stop], table.pair_N[start:stop]
        distinct_host = table.distinct_N[start:stop].astype(np.int64)
        first_B, distinct_B = _tensor(first_host), _tensor(distinct_host)
        open_B = distinct_B.cumsum(0) - distinct_B
        pairs = int(distinct_host.sum())
        row_R = torch.repeat_interleave(distinct_B, output_size=pairs)
        pair_R = (first_B - open_B)[row_R] + torch.arange(pairs)
        count_R = self.count_P[n][pair_R]
        later_host, earlier_host = _repeats(first_host, pair_host, counted(self.index, n, start, stop))
        later, pair = _tensor(later_host), _tensor(pair_host[earlier_host])
        count_R.index_add_(0, open_B[later] + pair - first_B[later], torch.ones_like(later, dtype=torch.int32))
        total_B = torch.zeros_like(distinct_B).index_add_(0, row_R, count_R.long())
        scale_B = 1.0 / total_B.clamp_min(1)
        out_BV = p_BV * torch.where(total_B > 0, self.discount * distinct_B * scale_B, 1.0)[:, None]
        # Each (row, token) occurs once, so adding is order-free.
        place_R = row_R * vocab_size + self.token_P[n][pair_R]
        out_BV.view(-1).scatter_add_(0, place_R, (count_R - self.discount) * scale_B[row_R])
        return out_BV


def _unigram_rows(count_V: Tensor, token_B: Tensor, before: int) -> Tensor:
    """before: tokens that were counted."""
    size, vocab_size = len(token_B), len(count_V)
    count_BV = _running(count_V, token_B)
    distinct_B1 = (count_BV > 0).sum(1, keepdim=True)
    total_B1 = torch.arange(before, before + size)[:, None]
    backoff_B1 = torch.where(total_B1 > 0, distinct_B1, 1).float()
    return (count_BV + backoff_B1 / vocab_size) / (total_B1 + backoff_B1)


def _running(count_V: Tensor, token_B: Tensor) -> Tensor:
    """The counts (B, V), int32, before each token; a sum in float32 would lose single ones beyond 2**24."""
    # Measured, 512 rows of 1,024: 0.4 ms; a cumulative sum down the columns takes 3 ms.
    rows, now_V = np.empty((len(token_B), len(count_V)), np.int32), count_V.numpy().copy()
    for row_V, token in zip(rows, token_B.tolist(), strict=True):
        row_V[:] = now_V
        now_V[token] += 1
    return torch.from_numpy(rows)


def _repeats(first_B: np.ndarray, pair_B: np.ndarray, counted_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (later, earlier) positions of a block that share a context, where the earlier one is counted."""
    known = np.flatnonzero(pair_B >= 0)
    by_context = known[np.argsort(first_B[known], kind="stable")]
    opens = np.flatnonzero(_changes(first_B[by_context]))
    group = np.repeat(opens, np.diff(opens, append=len(by_context)))
    rank = np.arange(len(by_context)) - group
    before = np.arange(rank.sum()) - np.repeat(np.cumsum(rank) - rank, rank)
    later, earlier = np.repeat(by_context, rank), by_context[np.repeat(group, rank) + before]
    return later[counted_B[earlier]], earlier[counted_B[earlier]]


def _changes(values: np.ndarray) -> np.ndarray:
    """True where a run of equal values starts."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def _tensor(values: np.ndarray) -> Tensor:
    # A copy: mapped files are read-only, which torch does not know.
    return torch.from_numpy(np.array(values)).long()
