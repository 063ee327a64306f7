"""Anybody's scorer at work in a process of its own: it says rows and hears tokens over two pipes.

It hears words (uint32, little-endian): how many tokens it is given at its beginning, these tokens, and then commands
and tokens as they come. PREDICT is answered by the size of the row and the row (uint32, float64), TOTAL by its own
total, NaN where it has none; END ends it, and any other word is a token to learn.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

from hedgemix.config import RecipeError
from hedgemix.runtime.files import Log

PREDICT, TOTAL, END = 2**32 - 1, 2**32 - 2, 2**32 - 3
"""Commands; no token has such an id."""


def serve(name: str, folder: str, pipe: list[int], log: Log) -> None:
    """Let the scorer that `module:object` makes answer, until it hears END. folder: what its relative paths begin
    at. Raises RecipeError for one that cannot be loaded, or gives what is no row."""
    with suppress(OSError):
        os.chdir(folder)
    with os.fdopen(pipe[0], "wb") as said, os.fdopen(pipe[1], "rb") as heard:
        given = np.array(hear(heard, int(hear(heard, 1)[0])), np.int64)
        scorer = load(name)(given)
        total = getattr(scorer, "nats", lambda: math.nan)
        while (word := int(hear(heard, 1)[0])) != END:
            if word == PREDICT:
                row_V = row(scorer.predict())
                said.write(np.uint32(len(row_V)).tobytes() + row_V.tobytes())
            elif word == TOTAL:
                said.write(np.array(float(total()), "<f8").tobytes())
            else:
                scorer.update(word)
                continue
            said.flush()


def hear(heard: BinaryIO, count: int) -> np.ndarray:
    """Read words, uint32 (count,); raises EOFError when no more come."""
    data = heard.read(4 * count)
    if len(data) < 4 * count:
        raise EOFError("the audit ended before the text")
    return np.frombuffer(data, "<u4")


def load(name: str) -> Callable[[np.ndarray], Any]:
    """Load the callable of "module:object"; raises RecipeError."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"--scorer {name!r} cannot be loaded: {error}; name it as module:object") from None


def row(given: Any) -> np.ndarray:
    """Take probabilities as float64 (V,), little-endian; raises RecipeError for anything else."""
    row_V = np.asarray(given)
    if row_V.ndim != 1 or row_V.dtype.kind != "f" or not len(row_V):
        raise RecipeError(f"predict() gave {row_V.dtype} of shape {row_V.shape}: not a row")
    return np.ascontiguousarray(row_V, "<f8")
