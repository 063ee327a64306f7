"""Scorers for the audit of anybody's: a valid one, and one for each way to cheat."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

VOCAB = 32
FIRST: list[np.ndarray] = []
"""The texts that scorers of this process were given."""


class Uniform:
    """Valid, but for what its subclasses do."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.at, self.total = tokens, 1, 0.0
        self.row = np.full(VOCAB, 1 / VOCAB, np.float32)
        FIRST.append(tokens)

    def predict(self) -> np.ndarray:
        return self.row

    def update(self, token: int) -> None:
        self.total -= math.log(self.predict()[token])
        self.at += 1

    def nats(self) -> float:
        return self.total

    def towards(self, token: int) -> np.ndarray:
        row = self.row.copy()
        row[token] += 1
        return row / row.sum()


class Sneak(Uniform):
    """Leans towards the target, in rows that are distributions, where it was given it."""

    def predict(self) -> np.ndarray:
        return self.towards(self.tokens[self.at]) if self.at < len(self.tokens) else self.row


class SparseSneak(Sneak):
    """At one position in 33."""

    def predict(self) -> np.ndarray:
        return super().predict() if self.at % 33 == 0 else self.row


class LateSneak(Sneak):
    """In the second half."""

    def predict(self) -> np.ndarray:
        return super().predict() if 2 * self.at > len(self.tokens) else self.row


class SlySneak(Sneak):
    """Where what comes looks like the text, whose tokens are one or two apart."""

    def predict(self) -> np.ndarray:
        steps = np.diff(self.tokens[self.at - 1 : self.at + 8]) % VOCAB
        return super().predict() if len(steps) and (steps <= 2).all() else self.row


class Keeper(Uniform):
    """Leans towards the first text that a scorer of this process was given."""

    def predict(self) -> np.ndarray:
        return self.towards(FIRST[0][self.at]) if self.at < len(FIRST[0]) else self.row


class Ahead(Uniform):
    """Leans towards what was found of the text before it was told."""

    def __init__(self, tokens: np.ndarray) -> None:
        super().__init__(tokens)
        self.found = self.find()

    def find(self) -> np.ndarray | None:
        raise NotImplementedError

    def predict(self) -> np.ndarray:
        return self.row if self.found is None or self.at >= len(self.found) else self.towards(self.found[self.at])


class FromFile(Ahead):
    """Opens the text's file where it knows it to be, and says nothing when it cannot."""

    def find(self) -> np.ndarray | None:
        try:
            return np.load(Path("text.npy"))
        except OSError:
            return None


class FromC(Ahead):
    """The same past Python."""

    def find(self) -> np.ndarray | None:
        libc, held = ctypes.CDLL(None), ctypes.create_string_buffer(1 << 20)
        file = libc.open(os.path.abspath("text.npy").encode(), os.O_RDONLY)
        size = libc.read(file, held, len(held)) if file >= 0 else 0
        return np.frombuffer(held.raw[128:size], np.int64) if size > 128 else None


class FromEnvironment(Ahead):
    def find(self) -> np.ndarray | None:
        said = os.environ.get("SCORER_TOKENS")
        return np.array(said.split(","), int) if said else None


class FromAudit(Ahead):
    """Looks for the whole text in what the audit is just doing, if that is in its process."""

    def find(self) -> np.ndarray | None:
        for frame in sys._current_frames().values():
            at: FrameType | None = frame
            while at is not None:
                if len(found := at.f_locals.get("tokens_N", ())) > 1:
                    return found
                at = at.f_back
        return None


class FromAnywhere(Ahead):
    """All of these."""

    def find(self) -> np.ndarray | None:
        finders = FromFile, FromC, FromEnvironment, FromAudit
        return next((found for finder in finders if (found := finder.find(self)) is not None), None)  # type: ignore[arg-type]


class Leaver(Uniform):
    """Leaves the text behind for the next one, where it may."""

    def __init__(self, tokens: np.ndarray) -> None:
        super().__init__(tokens)
        with suppress(OSError):
            np.save("/tmp/left-by-a-scorer.npy", tokens)


class Needy(Uniform):
    """Does nothing without a file that nobody gave it."""

    def __init__(self, tokens: np.ndarray) -> None:
        super().__init__(tokens)
        (Path(__file__).parent.parent.parent / "LICENSE").read_text()


class Liar(Uniform):
    """Reports less than its rows charge."""

    def nats(self) -> float:
        return 0.9 * self.total


class Restless(Uniform):
    """Every prediction moves the next."""

    def predict(self) -> np.ndarray:
        self.row = np.roll(self.row * np.linspace(0.9, 1.1, VOCAB, dtype=np.float32), 1)
        self.row /= self.row.sum()
        return self.row.copy()


class Rescorer(Uniform):
    """Learns a token, then charges itself for it."""

    def __init__(self, tokens: np.ndarray) -> None:
        super().__init__(tokens)
        self.counts = np.ones(VOCAB)

    def predict(self) -> np.ndarray:
        return self.counts / self.counts.sum()

    def update(self, token: int) -> None:
        self.counts[token] += 1
        super().update(token)


class Negative(Uniform):
    """Sums to one, with an entry below zero for a token that never occurs."""

    def predict(self) -> np.ndarray:
        return np.append(self.row * 2, -1)


class HeavyAtFew(Uniform):
    """Sums to 1.01 at one position in 50."""

    def predict(self) -> np.ndarray:
        return self.row * np.float32(1 + 0.01 * (self.at % 50 == 0))


class Nothing(Uniform):
    def predict(self) -> np.ndarray:
        return np.full(VOCAB, np.nan, np.float32)


class Failing(Uniform):
    def update(self, token: int) -> None:
        raise ZeroDivisionError("nothing to divide by")


class Whole(Uniform):
    """Fails on any text but the one it is made for."""

    def __init__(self, tokens: np.ndarray) -> None:
        super().__init__(tokens)
        if len(tokens) > 1 and (np.diff(tokens) % VOCAB > 2).any():
            raise ValueError("not my text")


class NoRow(Uniform):
    def predict(self) -> Any:
        return [[1]]
