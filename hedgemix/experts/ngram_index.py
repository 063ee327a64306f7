"""The index of a text's n-grams and matches: what the text alone tells of them, found without a loop over tokens.

No hash table. One stable sort of the whole text numbers every (context, token) pair so that the pairs of a context are
contiguous and in order of first appearance. What a context has shown before position t is then a prefix of its pairs,
and only the pairs' running counts have to be kept (`ngram`). Knowing the text in advance is bookkeeping, not a leak: a
row reads only pairs that occurred before it (tests change the future and compare bitwise).

The index depends on the text alone, and on the memory in front of it, which is read and not scored: positions are the
text's, counts and pairs those of both. Build it once, save it, and let every process map the same files.

Shapes: M tokens of the memory, N of the text, B positions of a block, P pairs of one order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hedgemix.data.shards import PIECE_TOKENS, TokenStream
from hedgemix.experts import match, sorted_ngrams
from hedgemix.validate import check_match_lengths, check_orders

_COLUMNS = ("first_N", "pair_N", "distinct_N", "token_P")


@dataclass(frozen=True)
class OrderIndex:
    """Holds the pairs of one order. All arrays int32; a position without n-1 predecessors has pair -1 and distinct
    0."""

    first_N: np.ndarray
    """First pair of the position's context."""
    pair_N: np.ndarray
    """The position's own pair (context and the token that follows it here)."""
    distinct_N: np.ndarray
    """How many different tokens had followed the context before: none where it had not occurred."""
    token_P: np.ndarray
    """Each pair's token."""


@dataclass(frozen=True)
class NgramIndex:
    """Holds a text, the pairs of every order above 1 and its matches; see `build`."""

    memory_M: np.ndarray
    """The tokens in front of the text."""
    memory_pair_M: dict[int, np.ndarray]
    """Their pairs, by order, as `OrderIndex.pair_N` has the text's."""
    tokens_N: np.ndarray
    vocab_size: int
    orders: tuple[int, ...]
    tables: dict[int, OrderIndex]
    match: match.MatchIndex


def build(
    tokens: np.ndarray | TokenStream,
    orders: tuple[int, ...],
    vocab_size: int,
    match_lengths: tuple[int, ...] = (),
    folder: Path | None = None,
    memory_bytes: int = sorted_ngrams.MEMORY_BYTES,
    memory_M: np.ndarray | None = None,
) -> NgramIndex:
    """Number the pairs of each order, and find the matches of each length.

    Takes integer tokens (N,), and those (M,) of the memory in front of them; 12 bytes a token and order, and 16 for the
    matches. They go into plain .npy files and one .json of `folder`, which `load` maps, or into memory when it is None;
    beside them `sorted_ngrams.Grams` says what memory is used. A folder holds 13 bytes a token more during the work.
    Raises RecipeError as `check_orders` and `check_match_lengths` do, and for tokens that do not fit.
    """
    check_orders(orders)
    check_match_lengths(match_lengths)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    arrays = sorted_ngrams.Arrays(folder)
    memory_M = np.zeros(0, np.uint16) if memory_M is None else memory_M
    tokens_N = _keep(memory_M, tokens, arrays)
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
        (folder / "index.json").write_text(json.dumps(meta | {"memory_tokens": len(memory_M)}), encoding="utf-8")
    return _behind(len(memory_M), NgramIndex(memory_M[:0], {}, tokens_N, vocab_size, tuple(orders), tables, matches))


def _keep(memory_M: np.ndarray, tokens: np.ndarray | TokenStream, arrays: sorted_ngrams.Arrays) -> np.ndarray:
    """Store the tokens, the memory's first, as an array of the index."""
    if isinstance(tokens, np.ndarray) and arrays.folder is None and not len(memory_M):
        return np.ascontiguousarray(tokens)
    kind, size = tokens.dtype if isinstance(tokens, np.ndarray) else np.uint16, len(memory_M)
    kept_N = arrays.result("tokens_N", size + len(tokens), kind)
    kept_N[:size] = memory_M
    for start in range(0, len(tokens), PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, len(tokens))
        piece = tokens[start:stop] if isinstance(tokens, np.ndarray) else tokens.read(start, stop - start)
        kept_N[size + start : size + stop] = piece
    return kept_N


def _behind(size: int, whole: NgramIndex) -> NgramIndex:
    """The index of the text behind the first `size` tokens of a whole: views of its arrays."""
    if not size:
        return whole

    def text(columns: OrderIndex | match.MatchIndex) -> dict[str, Any]:
        return {name: column[size:] for name, column in vars(columns).items() if name.endswith("_N")}

    return replace(
        whole,
        memory_M=whole.tokens_N[:size],
        memory_pair_M={n: counted_pairs(whole, n, slice(size)) for n in whole.tables},
        tokens_N=whole.tokens_N[size:],
        tables={n: replace(table, **text(table)) for n, table in whole.tables.items()},
        match=replace(whole.match, **text(whole.match)),
    )


def _index_order(found: sorted_ngrams.Grams, n: int) -> OrderIndex:
    total, arrays = len(found.tokens_N), found.arrays
    first_N, pair_N, distinct_N = (arrays.result(f"order{n}_{name}", total) for name in _COLUMNS[:3])
    for column, fill in ((first_N, 0), (pair_N, -1), (distinct_N, 0)):
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
        distinct_N[at] = seen - first
        tokens[pairs : pairs + len(heads)] = found.tokens_N[at[fresh]]
        pairs += len(heads)
    token_P = arrays.result(f"order{n}_token_P", pairs)
    for span in found.spans(pairs):
        token_P[span] = tokens[span]
    return OrderIndex(first_N, pair_N, distinct_N, token_P)


def load(folder: Path) -> NgramIndex:
    """Map an index that `build` left in a folder, read only: processes of one machine share its pages."""
    meta = json.loads((folder / "index.json").read_text(encoding="utf-8"))

    def read(name: str) -> np.ndarray:
        # torch shares token_P and knows no read-only tensors; nobody writes to it, so its pages stay shared.
        mode: Literal["r", "c"] = "c" if name.endswith("token_P") else "r"
        return np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False)

    orders = tuple(meta["orders"])
    tables = {n: OrderIndex(*(read(f"order{n}_{name}") for name in _COLUMNS)) for n in orders if n > 1}
    matches = match.load(folder, tuple(meta["match_lengths"]))
    tokens_N = read("tokens_N")
    whole = NgramIndex(tokens_N[:0], {}, tokens_N, meta["vocab_size"], orders, tables, matches)
    return _behind(meta.get("memory_tokens", 0), whole)  # an older index has no memory


def counted(index: NgramIndex, n: int, start: int, stop: int) -> np.ndarray:
    """Tell which positions order n counts, bool (B,): every one in the highest order, in a lower one those whose pair
    of the next order is new, so that a pair counts once for each longer context it was met in (Kneser and Ney 1995)."""
    above = next((table for order, table in index.tables.items() if order > n), None)
    if above is None:
        return np.ones(stop - start, bool)
    pair_B = above.pair_N[start:stop]
    # Pairs of a context are numbered by age: a new one has the number of those before it.
    return (pair_B < 0) | (pair_B == above.first_N[start:stop] + above.distinct_N[start:stop])


def counted_pairs(index: NgramIndex, n: int, here: slice) -> np.ndarray:
    """List the pairs of the positions that order n counts, int32 (B,), -1 for the others."""
    pair_B = index.tables[n].pair_N[here]
    start, stop, _ = here.indices(len(index.tokens_N))
    return np.where(counted(index, n, start, stop), pair_B, np.int32(-1))


def longest_class(index: NgramIndex, start: int, stop: int) -> np.ndarray:
    """Classify what occurred before of each position's context, (B,) int64: 0 nothing, then one class for each order
    above 1, then one for each match length; the last that did counts."""
    class_B = np.zeros(stop - start, np.int64)
    for number, table in enumerate(index.tables.values(), start=1):
        class_B[table.distinct_N[start:stop] > 0] = number
    matched_B = index.match.class_N[start:stop]
    return np.where(matched_B > 0, len(index.tables) + matched_B, class_B)
