"""The audit of anybody's scorer, which has the text: by what can be seen of it when the text is changed.

A scorer is made by a callable, named `module:object`, that is given the text: integers (N,). Being given all of it, a
batched evaluator can be wrapped; the audit changes the text it gives and watches whether what it must not reach moves.
The first token is context; each later one is asked for, then told:

    scorer = object(tokens)
    for token in tokens[1:]:
        row = scorer.predict()      # probabilities of the next token, (V,); changes nothing
        scorer.update(token)        # and only now learns it

`scorer.nats()` is optional: the total that it reports for what it was told so far.
"""

from __future__ import annotations

import importlib
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console

from hedgemix.audit.checks import Record, relative, wrong_or
from hedgemix.audit.findings import Finding, failed, markdown, print_finding, timed
from hedgemix.audit.plan import SEED_BITS
from hedgemix.config import RecipeError
from hedgemix.data.shards import map_shard
from hedgemix.runtime.files import replacing

LOG_SUM = 1e-5
"""Largest |log of the sum| of a row: float32 rounding of 1,024 probabilities is some 1e-6."""
NATS = 1e-6
"""Largest relative difference between a scorer's own total and that of its rows."""


class Scorer(Protocol):
    """Predicts each token of a text before it is told it: the interface of what is audited."""

    def predict(self) -> np.ndarray:
        """Give the probabilities (V,), floating point, of the next token; asked again, the same."""
        ...

    def update(self, token: int) -> None:
        """Learn the token that `predict` was about."""
        ...


@dataclass
class Walk:
    """Holds what a scorer said on its way through a text; index t is position t, 0 is unused."""

    nats_N: np.ndarray
    sums_N: np.ndarray
    """Sum of each row."""
    least_N: np.ndarray
    """Smallest entry of each row; NaN when there is one."""
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    """The rows asked for."""
    unsteady: list[int] = field(default_factory=list)
    """Asked positions where a second predict() gave another row."""
    totals: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Its own total and that of its rows, after the asked positions and the last."""


def load(name: str) -> Callable[[np.ndarray], Scorer]:
    """Load the callable of "module:object", looked for from the working folder too; raises RecipeError."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"--scorer {name!r} cannot be loaded: {error}; name it as module:object") from None


def read_tokens(path: Path) -> np.ndarray:
    """Read the tokens of a shard in the official format (.bin) or of a NumPy file (.npy), int64 (N,); raises
    RecipeError for other files."""
    if path.suffix == ".bin":
        tokens = np.array(map_shard(path), np.int64)
    elif path.suffix == ".npy":
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RecipeError(f"--tokens {path} cannot be read: {error}") from None
    else:
        raise RecipeError(f"--tokens {path}: give a shard (.bin) or a NumPy file of integers (.npy)")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) < 4 or tokens.min() < 0:
        raise RecipeError(
            f"--tokens {path}: {tokens.dtype} of shape {tokens.shape}, needed is one row of 4 ids or more"
        )
    return tokens.astype(np.int64)


def report(name: str, path: Path, draws: int, cuts: int, seed: int | None, place: Path | None, console: Console) -> int:
    """Audit the scorer `name` on the tokens of a file, a line a check; the report goes to `place`, or is printed.

    seed: of all that is drawn; None: from the system's randomness. Returns 0 when every check passed, else 1. Raises
    RecipeError.
    """
    if draws < 1 or cuts < 1:
        raise RecipeError("--draws and --cuts must be positive")
    make, tokens_N = load(name), read_tokens(path)
    seed = secrets.randbits(SEED_BITS) if seed is None else seed
    console.print(f"{name} on {len(tokens_N) - 1:,} tokens of {path}", soft_wrap=True, highlight=False)
    findings, rate = run(make, tokens_N, draws, cuts, seed, lambda finding: print_finding(finding, console))
    facts = {
        "bits per token of its rows": rate,
        "tokens": len(tokens_N) - 1,
        "text": path.name,
        "drawn with seed": str(seed),
    }
    text = markdown(f"Audit of {name}: {rate:.4f} bits per token", facts, findings)
    if place is None:
        console.print(text, markup=False, soft_wrap=True, highlight=False)
    else:
        with replacing(place) as file:
            file.write(text.encode())
        console.print(f"  report: {place}", soft_wrap=True, highlight=False)
    return 1 if failed(findings) else 0


def run(
    make: Callable[[np.ndarray], Scorer],
    tokens_N: np.ndarray,
    draws: int,
    cuts: int,
    seed: int,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> tuple[list[Finding], float]:
    """Make the four findings, handed on one by one, and the bits a token of the scorer's rows."""
    generator, size = np.random.default_rng(seed), len(tokens_N)
    asked = {1, size - 1, *(int(t) for t in generator.integers(1, size, draws))}
    edges = np.linspace(1, size - 1, cuts + 1).astype(int)
    places = [int(generator.integers(edges[i], max(edges[i + 1], edges[i] + 1))) for i in range(cuts)]
    began = time.monotonic()
    base = walk(make, tokens_N, size - 1, {*asked, *places})
    findings = [normalised(base, time.monotonic() - began), order(base, asked)]
    for finding in findings:
        on_finding(finding)
    for changed in ("target", "future"):
        finding = timed(partial(changed_copies, make, tokens_N, changed, places, base, seed))
        findings.append(finding)
        on_finding(finding)
    return findings, float(base.nats_N[1:].sum()) / math.log(2) / (size - 1)


def walk(make: Callable[[np.ndarray], Scorer], tokens_N: np.ndarray, last: int, asked: Collection[int]) -> Walk:
    """Take a new scorer through the text up to position `last`; raises RecipeError when it fails on its way."""
    out = Walk(np.zeros(last + 1), np.zeros(last + 1), np.zeros(last + 1))
    t = 0
    try:
        scorer = make(tokens_N.copy())
        own_total = getattr(scorer, "nats", None)
        for t in range(1, last + 1):
            step(scorer, out, t, int(tokens_N[t]), t in asked)
            if own_total and (t in asked or t == last):
                out.totals[t] = float(own_total()), float(out.nats_N.sum())
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"the scorer raised {type(error).__name__} at position {t}: {error}") from error
    return out


def step(scorer: Scorer, out: Walk, t: int, token: int, asked: bool) -> None:
    """Ask for one prediction, look at it, and tell the scorer the token."""
    row_V = np.array(scorer.predict())
    if row_V.ndim != 1 or row_V.dtype.kind != "f" or token >= len(row_V):
        raise RecipeError(f"predict() gave {row_V.dtype} of shape {row_V.shape} before token {token}: not a row")
    if asked:
        out.rows[t] = row_V
        if not np.array_equal(np.array(scorer.predict()), row_V, equal_nan=True):
            out.unsteady.append(t)
    value = float(row_V[token])
    out.nats_N[t] = -math.log(value) if value > 0 else math.inf
    out.sums_N[t], out.least_N[t] = row_V.sum(dtype=np.float64), row_V.min()
    scorer.update(token)


def normalised(base: Walk, seconds: float) -> Finding:
    """Check that every row sums to one and has no negative entry."""
    sums, least = base.sums_N[1:], base.least_N[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_sums = np.nan_to_num(np.abs(np.log(sums)), nan=math.inf)
    worst = int(log_sums.argmax())
    bad = int((~(least >= 0)).sum())
    passed = bool(log_sums[worst] <= LOG_SUM) and not bad
    statement = (
        f"Of {len(sums):,} rows the one that is furthest from a distribution, at position {worst + 1:,}, sums to "
        f"{sums[worst]:.6g}; {bad:,} rows have negative entries or NaN."
    )
    figures = {
        "rows": len(sums),
        "largest_log_sum": float(log_sums[worst]),
        "tolerance": LOG_SUM,
        "mean_sum": float(sums.mean()),
        "rows_negative_or_nan": bad,
    }
    headline = f"largest |log sum| {log_sums[worst]:.1e} in {len(sums):,} rows; mean sum {sums.mean():.4g}"
    return Finding("normalised", passed, headline, statement, figures, seconds)


def order(base: Walk, asked: Collection[int]) -> Finding:
    """Check that predicting changes nothing, and that the scorer's own total is that of the rows it gave before each
    update."""
    off = {t: relative(own, total) for t, (own, total) in base.totals.items() if own != total}
    first = min((t for t, value in off.items() if not value <= NATS), default=None)
    wrong = [f"a second predict() at position {base.unsteady[0]:,} gave another row"] if base.unsteady else []
    if first is not None:
        own, total = base.totals[first]
        wrong.append(f"at position {first:,} it reports {own:.6g} nats, its rows before the updates {total:.6g}")
    compared = f"its own total is that of its rows at {len(base.totals)} positions"
    compared = compared if base.totals else "it reports no total of its own to compare"
    statement = f"predict() gave the same row twice at {len(asked)} positions, and {compared}."
    figures = {
        "positions": len(asked),
        "positions_with_another_row": len(base.unsteady),
        "totals_compared": len(base.totals),
        "largest_relative_difference": max(off.values(), default=0.0),
    }
    headline = wrong[0] if wrong else f"predict() repeats; {len(base.totals)} totals compared"
    return Finding("order", not wrong, headline, f"Violated: {wrong[0]}." if wrong else statement, figures)


def changed_copies(
    make: Callable[[np.ndarray], Scorer], tokens_N: np.ndarray, changed: str, places: list[int], base: Walk, seed: int
) -> Finding:
    """Check that new scorers, on copies of the text changed at these places, say the same up to there."""
    copies = []
    for cut in places:
        row_V = base.rows[cut]
        mine = walk(make, altered(tokens_N, changed, cut, len(row_V), seed), cut, {cut})
        stop = cut + (changed == "future")
        other = np.flatnonzero(mine.nats_N[1:stop] != base.nats_N[1:stop])
        copies.append(
            {
                "position": cut,
                "row_equal": np.array_equal(mine.rows[cut], row_V, equal_nan=True),
                "row_difference": float(np.abs(mine.rows[cut] - row_V).max()),
                "nats_compared": stop - 1,
                "nats_different": len(other),
                "first_different": int(other[0]) + 1 if len(other) else None,
            }
        )
    return blind(changed, copies)


def altered(tokens_N: np.ndarray, changed: str, cut: int, vocab_size: int, seed: int) -> np.ndarray:
    """Copy the tokens with another one, drawn evenly with the audit's seed, in place of each of the changed part: the
    token at `cut` (changed: "target"), or all after it."""
    part = slice(cut, cut + 1) if changed == "target" else slice(cut + 1, None)
    shift = np.random.default_rng([seed, cut]).integers(1, vocab_size, len(tokens_N[part]))
    out = tokens_N.copy()
    out[part] = (out[part] + shift) % vocab_size
    return out


def blind(what: str, copies: Sequence[Record]) -> Finding:
    """Check that copies of the text charge the same up to where they differ. what: target or future, the part that was
    changed in each."""
    wrong = []
    for copy in copies:
        place = f"position {copy['position']:,}"
        if not copy["row_equal"]:
            wrong.append(f"{place}: its row moved by up to {copy['row_difference']:.2g}")
        if copy["nats_different"]:
            wrong.append(
                f"{place}: {copy['nats_different']:,} charges up to it changed, from {copy['first_different']:,} on"
            )
    part = "only the token there" if what == "target" else "every token after it"
    compared = sum(copy["nats_compared"] for copy in copies)
    statement = (
        f"With {part} replaced, the row of a new scorer at each of {len(copies)} positions and all charges up to it "
        f"({compared:,}) are the same to the bit."
    )
    figures = {
        "positions": [copy["position"] for copy in copies],
        "charges_compared": compared,
        "charges_different": sum(copy["nats_different"] for copy in copies),
        "largest_row_difference": max((copy["row_difference"] for copy in copies), default=math.nan),
        "violations": wrong[:8],
    }
    headline = wrong[0] if wrong else f"{len(copies)} rows and {compared:,} charges bitwise the same"
    return Finding(f"blind-to-{what}", bool(copies) and not wrong, headline, wrong_or(wrong, statement), figures)
