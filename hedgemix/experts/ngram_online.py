"""The n-gram experts of `ngram`, one token at a time: what a decoder, which knows only earlier tokens, can keep.

`ngram_index` numbers the pairs of a whole text in advance; here a table grows with the text. The rows are the same,
bitwise on a CPU: the same integers go through the same operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hedgemix.validate import check_orders


class OnlineNgram:
    """Counts the tokens so far, in every order, and makes the rows they give the next one."""

    def __init__(self, orders: tuple[int, ...], vocab_size: int) -> None:
        """Raises RecipeError as `check_orders` does."""
        check_orders(orders)
        self.orders, self.vocab_size = orders, vocab_size
        self.count_V = torch.zeros(vocab_size, dtype=torch.int32)
        self.tokens: list[int] = []
        self.followers: dict[int, dict[tuple[int, ...], dict[int, int]]] = {n: {} for n in orders if n > 1}
        """For each order and context, how often each token followed it."""

    def predict(self) -> list[Tensor]:
        """Make probability rows (V,), float32, of the next token, one for each of `orders`; see `NgramRows.rows`."""
        total = len(self.tokens)
        distinct = int((self.count_V > 0).sum()) if total else 1
        p_V = (self.count_V + torch.tensor(float(distinct)) / self.vocab_size) / torch.tensor(float(total + distinct))
        out = [p_V] if self.orders[0] == 1 else []
        for n in self.followers:
            if seen := self._seen(n):
                token_F = torch.tensor(list(seen))
                count_F = torch.tensor(list(seen.values()))
                scale = 1.0 / (count_F.sum() + len(seen))
                p_V = p_V * (len(seen) * scale)
                p_V[token_F] += count_F * scale
            out.append(p_V)
        return out

    def longest_class(self) -> int:
        """Find 1 + the place, among the orders above 1, of the longest whose context was seen; 0 when none was."""
        return max((at for at, n in enumerate(self.followers, start=1) if self._seen(n)), default=0)

    def update(self, token: int) -> None:
        """Count the next token."""
        for n, contexts in self.followers.items():
            if len(self.tokens) >= n - 1:
                seen = contexts.setdefault(tuple(self.tokens[1 - n :]), {})
                seen[token] = seen.get(token, 0) + 1
        self.count_V[token] += 1
        self.tokens.append(token)

    def _seen(self, n: int) -> dict[int, int]:
        if len(self.tokens) < n - 1:
            return {}
        return self.followers[n].get(tuple(self.tokens[1 - n :]), {})
