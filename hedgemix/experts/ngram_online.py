"""The n-gram experts of `ngram`, one token at a time: what a decoder, which knows only earlier tokens, can keep.

`ngram_index` numbers the pairs of a whole text in advance; here a table grows with the text. The rows are the same,
bitwise on a CPU: the same integers go through the same operations. What a context showed in the memory is looked up
when the text first comes to that context.
"""

from __future__ import annotations

import numpy as np

from hedgemix.experts.memory_lookup import MemoryLookup
from hedgemix.validate import check_orders

FEW_TOKENS, MANY_TOKENS = 6, 32
"""Up to so few tokens are added to a row one by one, which is sooner done than an array of them is made; an array of
so many is kept."""
Gains = tuple[np.float32, np.ndarray, np.ndarray]
"""What a context leaves of the row below, the tokens that followed it, and what is added to each."""


class OnlineNgram:
    """Keeps counts of the tokens so far, in every order, and makes the rows they give the next one."""

    def __init__(
        self, orders: tuple[int, ...], vocab_size: int, discount: float, memory: MemoryLookup | None = None
    ) -> None:
        """Begin before the first token, or behind those of a memory, which is as deep as the orders ask. Raises
        RecipeError as `check_orders` does."""
        check_orders(orders)
        self.orders, self.vocab_size, self.discount = orders, vocab_size, discount
        self.memory = memory or MemoryLookup(np.zeros(0, np.uint16), vocab_size, 0)
        before_M = self.memory.tokens_M
        self.count_V = np.bincount(before_M, minlength=vocab_size).astype(np.int32)
        self.total, self.distinct = len(before_M), int((self.count_V > 0).sum())
        self.tokens: list[int] = before_M[max(self.total - max(self.memory.depth, 1), 0) :].tolist()
        """The last of the memory, and the text so far."""
        self.followers: dict[int, dict[tuple[int, ...], dict[int, int]]] = {n: {} for n in orders if n > 1}
        """For each order and context that the text came to, how often each token followed it, counted as
        `ngram_index.counted` says."""
        self.gains: dict[int, Gains] = {}
        """Of contexts that many tokens followed, by `id` of what is in `followers`, until it changes."""
        self.now: dict[int, dict[int, int]] | None = None

    def predict(self, out_KV: np.ndarray) -> None:
        """Make probability rows, float32, of the next token, one for each of `orders`, in memory (orders, V); see
        `NgramRows.rows`."""
        discount = np.float32(self.discount)
        distinct = np.float32(self.distinct if self.total else 1)
        row_V = out_KV[0]
        np.copyto(row_V, self.count_V, casting="same_kind")
        row_V += distinct / np.float32(self.vocab_size)
        row_V /= self.total + distinct
        orders = out_KV[self.orders[0] == 1 :]
        for order_V, seen in zip(orders, self._seen().values(), strict=True):
            if not seen:
                np.copyto(order_V, row_V)
            elif len(seen) <= FEW_TOKENS:
                scale = np.float32(1) / np.float32(sum(seen.values()))
                np.multiply(row_V, discount * np.float32(len(seen)) * scale, out=order_V)
                for token, count in seen.items():
                    order_V[token] += (np.float32(count) - discount) * scale
            else:
                share, token_F, gain_F = self.gains.get(id(seen)) or self._gains(seen, discount)
                np.multiply(row_V, share, out=order_V)
                order_V[token_F] += gain_F
            row_V = order_V

    def _gains(self, seen: dict[int, int], discount: np.float32) -> Gains:
        token_F = np.fromiter(seen, np.int64, len(seen))
        count_F = np.fromiter(seen.values(), np.float32, len(seen))
        scale = np.float32(1) / np.float32(sum(seen.values()))
        gains = discount * np.float32(len(seen)) * scale, token_F, (count_F - discount) * scale
        if len(seen) >= MANY_TOKENS:
            self.gains[id(seen)] = gains
        return gains

    def longest_class(self) -> int:
        """Find 1 + the place, among the orders above 1, of the longest whose context was seen; 0 when none was."""
        return max((at for at, seen in enumerate(self._seen().values(), start=1) if seen), default=0)

    def update(self, token: int) -> None:
        """Count the next token."""
        for n, seen in reversed(self._seen().items()):
            if len(self.tokens) >= n - 1:
                seen[token] = seen.get(token, 0) + 1
                self.gains.pop(id(seen), None)
                if seen[token] > 1:
                    break  # a pair that is not new counts in no lower order
        self.distinct += int(self.count_V[token] == 0)
        self.count_V[token] += 1
        self.total += 1
        self.tokens.append(token)
        self.now = None

    def _seen(self) -> dict[int, dict[int, int]]:
        """What followed the last tokens, for each order above 1; empty where they are too few."""
        if self.now is None:
            self.now = {n: self._behind(n) for n in self.followers}
        return self.now

    def _behind(self, n: int) -> dict[int, int]:
        if len(self.tokens) < n - 1:
            return {}
        context = tuple(self.tokens[1 - n :])
        known = self.followers[n].get(context)
        if known is None:
            found = self.memory.ranges(self.tokens[-self.memory.depth :]) if self.memory.depth else []
            longer = next((m for m in self.followers if m > n), n)
            known = self.memory.followers(found[n - 2], range(n, longer)) if len(found) >= n - 1 else {}
            self.followers[n][context] = known
        return known
