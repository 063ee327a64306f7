"""Exact causal n-gram experts, with Witten-Bell interpolation, at the speed of array operations.

No hash table and no loop over tokens. One stable sort of the whole text numbers every (context, token) pair so that the
pairs of a context are contiguous and in order of first appearance. What a context has shown before position t is then a
prefix of its pairs, and only the pairs' running counts have to be kept. Knowing the text in advance is bookkeeping, not
a leak: a row reads only pairs that occurred before it (tests change the future and compare bitwise).

The index depends on the text alone. Build it once, save it, and let every process map the same files.

Shapes: N tokens of the text, B positions of a block, V vocabulary, P pairs of one order, R ragged (position, pair).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hedgemix.data.shards import PIECE_TOKENS, TokenStream
from hedgemix.experts import match, sorted_ngrams
from hedgemix.validate import check_match_lengths, check_orders

_COLUMNS = ("first_N", "pair_N", "count_N", "distinct_N", "token_P")


@dataclass(frozen=True)
class OrderIndex:
    """The pairs of one order. All arrays int32; a position without n-1 predecessors has pair -1 and count 0."""

    first_N: np.ndarray
    """First pair of the position's context."""
    pair_N: np.ndarray
    """The position's own pair (context and the token that follows it here)."""
    count_N: np.ndarray
    """How often the context occurred before."""
    distinct_N: np.ndarray
    """How many different tokens had followed it before."""
    token_P: np.ndarray
    """Each pair's token."""


@dataclass(frozen=True)
class NgramIndex:
    """A text, the pairs of every order above 1 and its matches; see `build_index`."""

    tokens_N: np.ndarray
    vocab_size: int
    orders: tuple[int, ...]
    tables: dict[int, OrderIndex]
    match: match.MatchIndex


@dataclass
class NgramState:
    """Counts of the tokens before `position`."""

    unigram_V: Tensor
    pair_count: dict[int, Tensor]
    position: int = 0
    token_P: dict[int, Tensor] = field(default_factory=dict, repr=False)


def build_index(
    tokens: np.ndarray | TokenStream,
    orders: tuple[int, ...],
    vocab_size: int,
    match_lengths: tuple[int, ...] = (),
    folder: Path | None = None,
    memory_bytes: int = sorted_ngrams.MEMORY_BYTES,
) -> NgramIndex:
    """Number the pairs of each order, and find the matches of each length.

    Takes integer tokens (N,); 16 bytes a token and order, and 16 for the matches. They go into plain .npy files and one
    .json of `folder`, which `load` maps, or into memory when it is None; beside them `sorted_ngrams.Grams` says what
    memory is used. A folder holds 13 bytes a token more during the work.
    Raises RecipeError as `check_orders` and `check_match_lengths` do, and for tokens that do not fit.
    """
    check_orders(orders)
    check_match_lengths(match_lengths)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    arrays = sorted_ngrams.Arrays(folder)
    tokens_N = _keep(tokens, arrays)
    found = sorted_ngrams.Grams(tokens_N, vocab_size, arrays, memory_bytes)
    matches = match.start(len(tokens_N), match_lengths, arrays)
    tables = {}
    match.follow(matches, found)
    for n in range(2, orders[-1] + 1):
        if n in orders:
            tables[n] = _index_order(found, n)
        else:
            for _ in found.grow():
                pass
        match.follow(matches, found)
    for m in match_lengths:
        if m > found.length:
            found.grow_to(m)
            match.follow(matches, found)
    match.rate(matches, found)
    if folder is not None:
        meta = {"vocab_size": vocab_size, "orders": orders, "match_lengths": match_lengths}
        (folder / "index.json").write_text(json.dumps(meta))
    return NgramIndex(tokens_N, vocab_size, tuple(orders), tables, matches)


def _keep(tokens: np.ndarray | TokenStream, arrays: sorted_ngrams.Arrays) -> np.ndarray:
    """The tokens as an array of the index."""
    if isinstance(tokens, np.ndarray) and arrays.folder is None:
        return np.ascontiguousarray(tokens)
    kept_N = arrays.result("tokens_N", len(tokens), tokens.dtype if isinstance(tokens, np.ndarray) else np.uint16)
    for start in range(0, len(tokens), PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, len(tokens))
        piece = tokens[start:stop] if isinstance(tokens, np.ndarray) else tokens.read(start, stop - start)
        kept_N[start:stop] = piece
    return kept_N


def _index_order(found: sorted_ngrams.Grams, n: int) -> OrderIndex:
    total, arrays = len(found.tokens_N), found.arrays
    first_N, pair_N, count_N, distinct_N = (arrays.result(f"order{n}_{name}", total) for name in _COLUMNS[:4])
    for column, fill in ((first_N, 0), (pair_N, -1), (count_N, 0), (distinct_N, 0)):
        column[: n - 1] = fill
    tokens, pairs = arrays.scratch(total), 0
    for block in found.grow():
        size, at = len(block.begin_B), block.begin_B + np.int32(n - 1)
        opens = np.flatnonzero(block.opens_B)
        lengths = np.diff(opens, append=size)
        heads = np.flatnonzero(block.splits_B)
        fresh = np.zeros(size, bool)
        fresh[block.sorted_B[heads]] = True
        # Pairs are numbered by context, then by age: the order in which the block meets them.
        seen = np.cumsum(fresh, dtype=np.int32)
        seen += np.int32(pairs) - fresh
        first = np.repeat(seen[opens], lengths)
        pair = np.empty(size, np.int32)
        pair[block.sorted_B] = np.repeat(seen[block.sorted_B[heads]], np.diff(heads, append=size))
        first_N[at], pair_N[at] = first, pair
        count_N[at] = np.arange(size, dtype=np.int32) - np.repeat(opens.astype(np.int32), lengths)
        distinct_N[at] = seen - first
        tokens[pairs : pairs + len(heads)] = found.tokens_N[at[fresh]]
        pairs += len(heads)
    token_P = arrays.result(f"order{n}_token_P", pairs)
    for span in found.spans(pairs):
        token_P[span] = tokens[span]
    return OrderIndex(first_N, pair_N, count_N, distinct_N, token_P)


def _changes(values: np.ndarray) -> np.ndarray:
    """True where a run of equal values starts."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def load(folder: Path) -> NgramIndex:
    """Map an index that `build_index` left in a folder, read only: processes of one machine share its pages."""
    meta = json.loads((folder / "index.json").read_text())

    def read(name: str) -> np.ndarray:
        # torch shares token_P and knows no read-only tensors; nobody writes to it, so its pages stay shared.
        mode: Literal["r", "c"] = "c" if name.endswith("token_P") else "r"
        return np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False)

    orders = tuple(meta["orders"])
    tables = {n: OrderIndex(*(read(f"order{n}_{name}") for name in _COLUMNS)) for n in orders if n > 1}
    matches = match.load(folder, tuple(meta["match_lengths"]))
    return NgramIndex(read("tokens_N"), meta["vocab_size"], orders, tables, matches)


def start_state(index: NgramIndex) -> NgramState:
    """Counts before the first token, on the CPU; `device_index.Resident` has them on a GPU.

    A mapped index has its counts mapped too, from a file without a name in the folder for temporary ones: 4 bytes a
    pair there, and none of memory that the kernel cannot take back.
    """
    arrays = sorted_ngrams.Arrays(None)
    if any(isinstance(t.token_P, np.memmap) for t in index.tables.values()):
        arrays = sorted_ngrams.Arrays(Path(gettempdir()))
    tokens = {n: torch.from_numpy(table.token_P) for n, table in index.tables.items()}
    counts = {n: torch.from_numpy(arrays.zeros(len(table.token_P))) for n, table in index.tables.items()}
    return NgramState(torch.zeros(index.vocab_size, dtype=torch.int32), counts, 0, tokens)


def rows(state: NgramState, index: NgramIndex, start: int, stop: int) -> list[Tensor]:
    """Probability rows (B, V), float32, of positions start..stop-1, one tensor for each of index.orders.

    The row of position t counts every token before t, those inside the block too, so the rows do not depend on how the
    text is cut into blocks (bitwise). Witten and Bell 1991, as interpolation (Chen and Goodman 1998, section 2.5):
    p_n(w|c) = (count(c, w) + D_c p_{n-1}(w|c')) / (count(c) + D_c); an unseen context keeps p_{n-1}; below the unigram
    lies the uniform distribution. Leaves the state as it is. Raises ValueError unless the state stands at start.
    """
    if state.position != start or not start <= stop <= len(index.tokens_N):
        raise ValueError(f"rows {start}..{stop} asked of counts that stand at {state.position}")
    p_BV = _unigram_rows(state.unigram_V, _tensor(index.tokens_N[start:stop]), start)
    out = [p_BV] if index.orders[0] == 1 else []
    for n, table in index.tables.items():
        p_BV = _interpolate(p_BV, table, state.pair_count[n], state.token_P[n], start, stop)
        out.append(p_BV)
    return out


def _unigram_rows(count_V: Tensor, token_B: Tensor, start: int) -> Tensor:
    size, vocab_size = len(token_B), len(count_V)
    count_BV = _running(count_V, token_B)
    distinct_B1 = (count_BV > 0).sum(1, keepdim=True)
    total_B1 = torch.arange(start, start + size)[:, None]
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


def _interpolate(p_BV: Tensor, table: OrderIndex, pair_count: Tensor, token_P: Tensor, start: int, stop: int) -> Tensor:
    vocab_size = p_BV.shape[1]
    first_host, pair_host = table.first_N[start:stop], table.pair_N[start:stop]
    distinct_host = table.distinct_N[start:stop].astype(np.int64)
    first_B, distinct_B = _tensor(first_host), _tensor(distinct_host)
    total_B = _tensor(table.count_N[start:stop]) + distinct_B
    open_B = distinct_B.cumsum(0) - distinct_B
    pairs = int(distinct_host.sum())
    row_R = torch.repeat_interleave(distinct_B, output_size=pairs)
    pair_R = (first_B - open_B)[row_R] + torch.arange(pairs)
    count_R = pair_count[pair_R]
    later_host, earlier_host = _repeats(first_host, pair_host)
    later, pair = _tensor(later_host), _tensor(pair_host[earlier_host])
    count_R.index_add_(0, open_B[later] + pair - first_B[later], torch.ones_like(later, dtype=torch.int32))
    scale_B = 1.0 / total_B.clamp_min(1)
    out_BV = p_BV * torch.where(total_B > 0, distinct_B * scale_B, 1.0)[:, None]
    # Each (row, token) occurs once, so adding is order-free.
    out_BV.view(-1).scatter_add_(0, row_R * vocab_size + token_P[pair_R], count_R * scale_B[row_R])
    return out_BV


def _repeats(first_B: np.ndarray, pair_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (later, earlier) positions of a block that share a context."""
    known = np.flatnonzero(pair_B >= 0)
    by_context = known[np.argsort(first_B[known], kind="stable")]
    opens = np.flatnonzero(_changes(first_B[by_context]))
    group = np.repeat(opens, np.diff(opens, append=len(by_context)))
    rank = np.arange(len(by_context)) - group
    before = np.arange(rank.sum()) - np.repeat(np.cumsum(rank) - rank, rank)
    return np.repeat(by_context, rank), by_context[np.repeat(group, rank) + before]


def advance(state: NgramState, index: NgramIndex, start: int, stop: int) -> None:
    """Count the tokens start..stop-1, after they were scored. Raises ValueError unless the state stands at start."""
    if state.position != start or not start <= stop <= len(index.tokens_N):
        raise ValueError(f"tokens {start}..{stop} given to counts that stand at {state.position}")
    _count(state, index, start, stop, 1)
    state.position = stop


def retreat(state: NgramState, index: NgramIndex, start: int) -> None:
    """Take the tokens from start on back out of the counts. Raises ValueError when the state stands before start."""
    if not 0 <= start <= state.position:
        raise ValueError(f"tokens from {start} on taken out of counts that stand at {state.position}")
    _count(state, index, start, state.position, -1)
    state.position = start


def _count(state: NgramState, index: NgramIndex, start: int, stop: int, by: int) -> None:
    token_B = _tensor(index.tokens_N[start:stop])
    state.unigram_V.index_add_(0, token_B, torch.full_like(token_B, by, dtype=torch.int32))
    for n, table in index.tables.items():
        pair_host = table.pair_N[start:stop]
        pair_B = _tensor(pair_host[pair_host >= 0])
        state.pair_count[n].index_add_(0, pair_B, torch.full_like(pair_B, by, dtype=torch.int32))


def longest_class(index: NgramIndex, start: int, stop: int) -> np.ndarray:
    """What occurred before of each position's context, (B,) int64: 0 nothing, then one class for each order above 1,
    then one for each match length; the last that did counts."""
    class_B = np.zeros(stop - start, np.int64)
    for number, table in enumerate(index.tables.values(), start=1):
        class_B[table.count_N[start:stop] > 0] = number
    matched_B = index.match.class_N[start:stop]
    return np.where(matched_B > 0, len(index.tables) + matched_B, class_B)


def _tensor(values: np.ndarray) -> Tensor:
    # A copy: mapped files are read-only, which torch does not know.
    return torch.from_numpy(np.array(values)).long()
