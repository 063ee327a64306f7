"""What a memory tells an expert that works one token after another: where the last tokens occurred in it.

The memory's positions are sorted once by the tokens before them, the nearest first (a suffix array of the reversed
text; Manber and Myers 1990). The positions that follow the same n tokens then lie side by side, and those that follow
the same n + 1 inside them: a context is found by narrowing a range, token by token. Tables of contexts, as they grow
with a text, would take gigabytes for a memory of millions of tokens; this takes 12 bytes a token.

Shapes: M tokens of the memory, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from hedgemix.config import RecipeError

FEW_PLACES = 48
"""Up to here a range is looked at place by place: NumPy takes longer to begin than that."""


class MemoryLookup:
    """Finds contexts of at most `depth` tokens in a memory, integers (M,)."""

    def __init__(self, memory_M: np.ndarray, vocab_size: int, depth: int) -> None:
        """Raises RecipeError for tokens outside the vocabulary."""
        if len(memory_M) and not 0 <= memory_M.min() <= memory_M.max() < vocab_size:
            raise RecipeError(f"the memory has tokens outside 0..{vocab_size - 1}: its tokenizer is not the model's")
        self.tokens_M, self.depth, size = np.ascontiguousarray(memory_M), depth, len(memory_M)
        # In front of the memory stands a token that is none, so that no context reaches beyond its beginning.
        kind = np.min_scalar_type(vocab_size)
        self._padded = np.concatenate([np.full(depth, vocab_size, kind), memory_M.astype(kind)])
        self._places_M = np.arange(size, dtype=np.int32)
        for back in range(depth, 0, -1):  # stable, so the nearest token decides, and then the next
            before_M = self._padded[depth - back : depth - back + size]
            self._places_M = self._places_M[np.argsort(before_M[self._places_M], kind="stable")]
        # What is looked at one by one: a view of memory gives plain integers, in a third of the time.
        self._places, self._tokens = self._places_M.data, self._padded.data
        last_M = self._padded[self._places_M + max(depth - 1, 0)]
        self._first_V: list[int] = np.searchsorted(last_M, np.arange(vocab_size + 1)).tolist()
        """Where the places behind each token begin."""
        self._asked: list[int] | None = None
        self._found: list[tuple[int, int]] = []

    def ranges(self, context: Sequence[int]) -> list[tuple[int, int]]:
        """Narrow the sorted places to those behind the last 1, 2, ... tokens of a context, as long as there are any."""
        asked = context[-self.depth :] if self.depth else []
        if list(asked) != self._asked:
            self._asked, self._found = list(asked), self._narrow(asked)
        return self._found

    def _narrow(self, context: Sequence[int]) -> list[tuple[int, int]]:
        if not context or not 0 <= context[-1] < len(self._first_V) - 1:
            return []
        places, padded, found = self._places, self._tokens, []
        left, right = self._first_V[context[-1]], self._first_V[context[-1] + 1]
        if left < right:
            found.append((left, right))
        for back in range(2, len(context) + 1 if found else 0):
            offset, token = self.depth - back, context[-back]

            def before(at: int, offset: int = offset) -> int:
                return padded[places[at] + offset]

            # Most ranges are whole, or of one place, long before the context ends: both ends are looked at first.
            first = before(left)
            last = first if right - left == 1 else before(right - 1)
            if not first <= token <= last:
                break
            if first != token:
                left = bisect_left(range(right), token, left, right, key=before)
            if last != token:
                right = bisect_right(range(right), token, left, right, key=before)
            if left == right:
                break
            found.append((left, right))
        return found

    def followers(self, found: tuple[int, int], backs: range = range(0)) -> dict[int, int]:
        """Count the tokens that stand at the places of a range: each once for every different content of the places so
        many tokens back, or each time where `backs` is empty. The range must be of a context one token shorter than the
        first of `backs`."""
        left, right = found
        if right - left <= FEW_PLACES:
            return self._few_followers(left, right, backs)
        places = self._places_M[left:right]
        follower = self.tokens_M[places].astype(np.int64)
        if len(backs):
            # What is equal so far back lies side by side.
            opens = np.zeros(len(places), bool)
            for back in backs:
                token = self._padded[places + (self.depth - back)]
                opens[1:] |= token[1:] != token[:-1]
            kinds = int(follower.max()) + 1
            pair = np.cumsum(opens) * kinds + follower
            pair.sort()
            first = np.ones(len(pair), bool)
            np.not_equal(pair[1:], pair[:-1], out=first[1:])
            follower = pair[first] % kinds
        count_V = np.bincount(follower)
        tokens = np.flatnonzero(count_V)
        return dict(zip(tokens.tolist(), count_V[tokens].tolist(), strict=True))

    def _few_followers(self, left: int, right: int, backs: range) -> dict[int, int]:
        places, padded, depth = self._places, self._tokens, self.depth
        counts: dict[int, int] = {}
        if not len(backs):
            for at in range(left, right):
                token = padded[places[at] + depth]
                counts[token] = counts.get(token, 0) + 1
            return counts
        content: list[int] = []
        for at in range(left, right):
            stop = places[at] + depth
            here = padded[stop - backs[-1] : stop - backs[0] + 1].tolist()
            if here != content:
                content, counted = here, set[int]()
            token = padded[stop]
            if token not in counted:
                counted.add(token)
                counts[token] = counts.get(token, 0) + 1
        return counts

    def latest(self, found: tuple[int, int]) -> int:
        """Find the last of the places of a range."""
        return int(self._places_M[slice(*found)].max())
