"""The n-gram experts of `ngram`, one token at a time: what a decoder, which knows only earlier tokens, can keep.

`ngram_index` numbers the pairs of a whole text in advance; here a table grows with the text. The rows are the same,
bitwise on a CPU: the same integers go through the same operations. What a context showed in the memory is looked up
when the text first comes to that context.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hedgemix.experts.memory_lookup import MemoryLookup
from hedgemix.validate import check_orders


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
        self.count_V = torch.from_numpy(np.bincount(before_M, minlength=vocab_size).astype(np.int32))
        self.total = len(before_M)
        self.tokens: list[int] = before_M[max(self.total - orders[-1], 0) :].tolist()
        """The last of the memory, and the text so far."""
        self.followers: dict[int, dict[tuple[int, ...], dict[int, int]]] = {n: {} for n in orders if n > 1}
        """For each order and context that the text came to, how often each token followed it, counted as
        `ngram_index.counted` says."""

    def predict(self) -> list[Tensor]:
        """Make probability rows (V,), float32, of the next token, one for each of `orders`; see `NgramRows.rows`."""
        total = self.total
        distinct = int((self.count_V > 0).sum()) if total else 1
        p_V = (self.count_V + torch.tensor(float(distinct)) / self.vocab_size) / torch.tensor(float(total + distinct))
        out = [p_V] if self.orders[0] == 1 else []
        for n in self.followers:
            if seen := self._seen(n):
                token_F = torch.tensor(list(seen))
                count_F = torch.tensor(list(seen.values()))
                scale = 1.0 / count_F.sum()
                p_V = p_V * (self.discount * torch.tensor(len(seen)) * scale)
                p_V[token_F] += (count_F - self.discount) * scale
            out.append(p_V)
        return out

    def longest_class(self) -> int:
        """Find 1 + the place, among the orders above 1, of the longest whose context was seen; 0 when none was."""
        return max((at for at, n in enumerate(self.followers, start=1) if self._seen(n)), default=0)

    def update(self, token: int) -> None:
        """Count the next token."""
        for n in reversed(self.followers):
            if len(self.tokens) >= n - 1:
                seen = self._seen(n)
                seen[token] = seen.get(token, 0) + 1
                if seen[token] > 1:
                    break  # a pair that is not new counts in no lower order
        self.count_V[token] += 1
        self.total += 1
        self.tokens.append(token)

    def _seen(self, n: int) -> dict[int, int]:
        if len(self.tokens) < n - 1:
            return {}
        context = tuple(self.tokens[1 - n :])
        if context not in self.followers[n]:
            found = list(self.memory.ranges(context))
            longer = next((m for m in self.followers if m > n), n)
            known = self.memory.followers(found[-1], range(n, longer)) if len(found) == n - 1 else {}
            self.followers[n][context] = known
        return self.followers[n][context]
