"""Token shards in the official FineWeb format: 256 little-endian int32 (20240520, 1, count), then uint16 tokens.

Shards are memory-mapped, so 10 GB of them cost no memory. `open_shard` looks at every token id, since one that the
vocabulary lacks would only show as an index error inside a GPU kernel, minutes into a timed run.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from hedgemix.config import RecipeError
from hedgemix.runtime.files import replacing

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN = np.dtype("<u2")
PIECE_TOKENS = 1 << 20  # fits a core's cache: the check runs at the speed of memory


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write integer tokens of shape (n,), each in 0..65535, as one shard; raises ValueError for others."""
    if tokens.ndim != 1 or (len(tokens) and (tokens.min() < 0 or tokens.max() > 65535)):
        raise ValueError(f"{path}: a shard takes one row of tokens in 0..65535, not shape {tokens.shape}")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with replacing(Path(path)) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, TOKEN).data)


def map_shard(path: str | Path) -> np.memmap:
    """Map the tokens of a shard, read-only uint16 of shape (n,), after checking that the header fits the file.

    Raises RecipeError saying what was found, what was expected and what to do.
    """
    fix = "fetch or write it again"
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", 256)
    except OSError as error:
        raise RecipeError(f"data.shards_dir: shard {path} cannot be read ({error.strerror}); {fix}") from None
    if size < HEADER_BYTES + TOKEN.itemsize:
        raise RecipeError(
            f"data.shards_dir: shard {path} is empty: {size} bytes, expected {HEADER_BYTES} of header and tokens; {fix}"
        )
    magic, version, count = map(int, header[:3])
    if magic != MAGIC:
        raise RecipeError(
            f"data.shards_dir: {path} is not a token shard: it begins with {magic}, expected {MAGIC}; "
            "keep other files out of the folder"
        )
    if version != VERSION:
        raise RecipeError(
            f"data.shards_dir: shard {path} has format version {version}, expected {VERSION}; "
            "write it as uint16 tokens behind a version 1 header"
        )
    expected = HEADER_BYTES + count * TOKEN.itemsize
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise RecipeError(
            f"data.shards_dir: shard {path} is {what}: {size} bytes, expected {expected} for the {count} tokens "
            f"its header counts; {fix}"
        )
    return np.memmap(path, TOKEN, "r", offset=HEADER_BYTES, shape=(count,))


def open_shard(path: str | Path, vocab_size: int) -> np.memmap:
    """Map a shard as `map_shard` does, and check that every token id is below `vocab_size`; raises RecipeError
    otherwise."""
    tokens = map_shard(path)
    for start in range(0, len(tokens), PIECE_TOKENS):
        piece = tokens[start : start + PIECE_TOKENS]
        if piece.max() >= vocab_size:
            place = start + int(np.argmax(piece >= vocab_size))
            raise RecipeError(
                f"data.shards_dir: shard {path} has token {tokens[place]} at position {place}, expected ids below "
                f"data.vocab_size {vocab_size}; set data.vocab_size and data.tokenizer to what made the shards"
            )
    return tokens


class TokenStream:
    """Reads several shards as one row of tokens, from the start up to `limit` tokens (0: all)."""

    def __init__(self, shards: Sequence[str | Path | np.ndarray], limit: int = 0) -> None:
        self._shards = [shard if isinstance(shard, np.ndarray) else map_shard(shard) for shard in shards]
        self._starts = list(accumulate((len(shard) for shard in self._shards), initial=0))
        self._length = min(self._starts[-1], limit or self._starts[-1])

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> np.ndarray:
        """Copy tokens start..start+count as uint16 of shape (count,); raises IndexError outside the stream."""
        if start < 0 or count < 0 or start + count > self._length:
            raise IndexError(f"tokens {start}..{start + count} of a stream of {self._length}")
        tokens = np.empty(count, np.uint16)
        done, index = 0, bisect_right(self._starts, start) - 1
        while done < count:
            inside = start + done - self._starts[index]
            piece = self._shards[index][inside : inside + count - done]
            tokens[done : done + len(piece)] = piece
            done += len(piece)
            index += 1
        return tokens


def tokens_between(tokens: np.ndarray | TokenStream, start: int, stop: int) -> np.ndarray:
    """Give tokens[start:stop] of a text, integers (N,) or a stream of them, in the type they are stored in."""
    return tokens.read(start, max(stop - start, 0)) if isinstance(tokens, TokenStream) else tokens[start:stop]
