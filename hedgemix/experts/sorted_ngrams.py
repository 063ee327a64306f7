"""The m-grams of a text sorted in bounded memory, longer ones from shorter ones.

Positions stand in the order of the grams that begin there; a longer gram only reorders positions whose shorter grams
are equal. So whole groups of equal grams are sorted apart from each other, a block of them at a time, whatever the
length of the text (most significant digit first; inside a block least significant digit first, 16 bits a pass, as
Knuth, The Art of Computer Programming 3, section 5.2.5). Equality is exact: nothing is hashed.

Shapes: N tokens of the text, B positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from hedgemix.config import RecipeError

MEMORY_BYTES = 1 << 27
"""What a build keeps in memory beside its files: larger blocks leave the processor's cache and are slower."""
POSITION_BYTES = 128
"""Of a block, for each of its positions, all temporary arrays together."""
DIGIT = 1 << 16


@dataclass(frozen=True)
class Arrays:
    """Says where arrays of a text's length live: files of `folder`, mapped, or memory when it is None."""

    folder: Path | None

    def result(self, name: str, size: int, dtype: Any = np.int32) -> np.ndarray:
        """Make an array that stays: `name`.npy of the folder."""
        if self.folder is None:
            return np.empty(size, dtype)
        path = self.folder / f"{name}.npy"
        if size == 0:  # cannot be mapped
            np.save(path, np.empty(0, dtype))
            return np.empty(0, dtype)
        return np.lib.format.open_memmap(path, "w+", dtype, (size,))

    def scratch(self, size: int, dtype: Any = np.int32) -> np.ndarray:
        """Make an array that goes with the last reference to it, not filled; its file has no name."""
        if self.folder is None or size == 0:
            return np.empty(size, dtype)
        with TemporaryFile(dir=self.folder) as file:
            return np.memmap(file, dtype, "w+", shape=(size,))

    def zeros(self, size: int) -> np.ndarray:
        """Make a scratch array of int32 zeros."""
        if self.folder is None:
            return np.zeros(size, np.int32)
        return self.scratch(size)  # a file grows by zeros


@dataclass(frozen=True)
class Block:
    """Whole groups of equal grams, and how they fall into longer ones."""

    begin_B: np.ndarray
    """int32: where each gram begins, by gram, then by position."""
    opens_B: np.ndarray
    """bool: a group of equal grams starts."""
    sorted_B: np.ndarray
    """Places of the block in the order of the longer grams, positions rising among equal ones."""
    splits_B: np.ndarray
    """bool, in that order: a group of equal longer grams starts."""


class Grams:
    """Holds where the grams of one length begin, sorted; `grow` makes them longer."""

    def __init__(self, tokens_N: np.ndarray, vocab_size: int, arrays: Arrays, memory_bytes: int = MEMORY_BYTES) -> None:
        """Takes integer tokens (N,), mapped or not. Raises RecipeError for tokens that do not fit.

        Beside mapped files it takes `memory_bytes`, or POSITION_BYTES for each occurrence of the most frequent gram
        where that is more.
        """
        if len(tokens_N) >= 2**31:
            raise RecipeError(
                f"{len(tokens_N)} tokens: positions are 32-bit; score at most 2**31 - 1 (data.max_valid_tokens)"
            )
        self.tokens_N, self.vocab_size, self.arrays = tokens_N, vocab_size, arrays
        self.limit = max(memory_bytes // POSITION_BYTES, 1)
        self.digits = np.min_scalar_type(max(vocab_size - 1, 1))
        self.length, self.size = 1, len(tokens_N)
        self.begin_N = arrays.scratch(self.size)
        self.opens_N = arrays.scratch(self.size, bool)
        self.label_N: np.ndarray | None = None
        """Once `label` was called: where the same gram first began."""
        self._sort_tokens()

    def spans(self, size: int) -> Iterator[slice]:
        """Cut 0 .. size - 1 into pieces."""
        for start in range(0, size, self.limit):
            yield slice(start, min(start + self.limit, size))

    def _sort_tokens(self) -> None:
        count_V = np.zeros(self.vocab_size, np.int64)
        for span in self.spans(self.size):
            piece = self.tokens_N[span]
            if not (piece.min() >= 0 and piece.max() < self.vocab_size):
                raise RecipeError(f"tokens outside 0..{self.vocab_size - 1}: data.vocab_size does not fit the text")
            count_V += np.bincount(piece, minlength=self.vocab_size)
        start_V = np.cumsum(count_V) - count_V
        self.opens_N[:] = False
        self.opens_N[start_V[count_V > 0]] = True
        for span in self.spans(self.size):
            piece = self.tokens_N[span].astype(self.digits)
            by_token = np.argsort(piece, kind="stable")
            here_V = np.bincount(piece, minlength=self.vocab_size)
            place = np.repeat(start_V - (np.cumsum(here_V) - here_V), here_V) + np.arange(len(piece))
            self.begin_N[place] = by_token + span.start
            start_V += here_V

    def blocks(self) -> Iterator[slice]:
        """Cut the sorted grams into pieces of whole groups: at most `limit` grams, unless one group is larger."""
        start = 0
        while start < self.size:
            opens = np.flatnonzero(self.opens_N[start : min(start + self.limit + 1, self.size)])
            stop = start + self.limit
            if len(opens) > DIGIT and opens[DIGIT] <= self.limit:
                stop = start + int(opens[DIGIT])  # more groups than one pass of 16 bits sorts
            elif stop >= self.size:
                stop = self.size
            elif len(opens) > 1:
                stop = start + int(opens[-1])
            else:
                stop = self._next_open(stop)
            yield slice(start, stop)
            start = stop

    def _next_open(self, start: int) -> int:
        for at in range(start, self.size, self.limit):
            found = np.flatnonzero(self.opens_N[at : min(at + self.limit, self.size)])
            if len(found):
                return at + int(found[0])
        return self.size

    def grow(self) -> Iterator[Block]:
        """Make the grams one token longer, in the order of their tokens; what no longer fits the text goes."""
        behind = self.length

        def token(begin_B: np.ndarray) -> list[np.ndarray]:
            return [self.tokens_N[begin_B + behind].astype(self.digits)]

        return self._refine(self.length + 1, token)

    def grow_to(self, length: int) -> None:
        """Make the grams `length` long. Their order means nothing from here on, and grams that occur once go."""
        if self.label_N is None:
            self._label()
        while self.length < length:
            # Two overlapping shorter grams are equal exactly when the long one is.
            longer = min(length, 2 * self.length)
            label_N, behind = self.label_N, longer - self.length
            assert label_N is not None

            def labels(begin_B: np.ndarray, label_N: np.ndarray = label_N, behind: int = behind) -> list[np.ndarray]:
                found = label_N[begin_B + behind]
                return [found.astype(np.uint16), (found >> 16).astype(np.uint16)]

            for _ in self._refine(longer, labels):
                pass
            self._label()

    def _label(self) -> None:
        """Give equal grams the position where the first of them begins, and forget those that occur once."""
        total, old_N = len(self.tokens_N), self.label_N
        label_N = self.arrays.scratch(total)
        for span in self.spans(total):
            label_N[span] = np.arange(span.start, span.stop) if old_N is None else old_N[span]
        kept = 0
        for block in self.blocks():
            begin_B, opens_B = np.array(self.begin_N[block]), np.array(self.opens_N[block])
            starts = np.flatnonzero(opens_B)
            sizes = np.diff(starts, append=len(opens_B))
            label_N[begin_B] = np.repeat(begin_B[starts], sizes)
            again = np.repeat(sizes > 1, sizes)
            count = int(again.sum())
            self.begin_N[kept : kept + count], self.opens_N[kept : kept + count] = begin_B[again], opens_B[again]
            kept += count
        self.size, self.label_N = kept, label_N

    def _refine(self, length: int, keys: Callable[[np.ndarray], list[np.ndarray]]) -> Iterator[Block]:
        """keys: from positions (B,) the columns, least significant first, that tell longer grams apart."""
        wrote, last = 0, len(self.tokens_N) - length
        for block in self.blocks():
            begin_B, opens_B = np.array(self.begin_N[block]), np.array(self.opens_N[block])
            fits = begin_B <= last
            if not fits.all():
                begin_B, opens_B = begin_B[fits], opens_B[fits]
            columns = [*keys(begin_B), (np.cumsum(opens_B) - 1).astype(np.uint16)]
            sorted_B = np.argsort(columns[0], kind="stable")
            for column in columns[1:]:
                sorted_B = sorted_B[np.argsort(column[sorted_B], kind="stable")]
            splits_B = np.ones(len(sorted_B), bool)
            splits_B[1:] = False
            for column in columns:
                found = column[sorted_B]
                splits_B[1:] |= found[1:] != found[:-1]
            # Behind what is still to be read: blocks only shrink.
            stop = wrote + len(begin_B)
            self.begin_N[wrote:stop], self.opens_N[wrote:stop] = begin_B[sorted_B], splits_B
            wrote = stop
            yield Block(begin_B, opens_B, sorted_B, splits_B)
        self.size, self.length = wrote, length

    def repeats(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Find where grams begin that began before, and where they last did, both int32, in pieces."""
        for block in self.blocks():
            begin_B = np.array(self.begin_N[block])
            again = np.flatnonzero(~self.opens_N[block])
            yield begin_B[again], begin_B[again - 1]
