"""The audit of anybody's scorer, from outside its process: it is told each token once its row is there, or, when it
needs the whole text, decoys for what it must not know.

A scorer is made by a callable, named `module:object`, that is given the tokens known at the beginning, int64: the first
one, which is context. Each later one is asked for, then told:

    scorer = object(tokens)
    for token in text[1:]:
        row = scorer.predict()      # probabilities of the next token, (V,); changes nothing
        scorer.update(token)        # and only now learns it

`scorer.nats()` is optional: the total that it reports for what it was told so far. It works in an isolated process (see
`sandbox`) that can read code and the files it is given; see `scorer_process`. With `whole_text` it is given the text at
once, as an evaluator in batches needs it: then new processes are given copies that are true before a drawn position and
drawn tokens from there on, and up to that position their rows have to be those that the true text gave.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console

from hedgemix.audit import namespaces, own_code, sandbox
from hedgemix.audit.checks import relative, wrong_or
from hedgemix.audit.findings import Finding, failed, markdown, print_finding, timed
from hedgemix.audit.plan import SEED_BITS
from hedgemix.audit.scorer_process import END, PREDICT, TOTAL
from hedgemix.audit.streamed import LEAKS
from hedgemix.config import RecipeError
from hedgemix.data.shards import map_shard
from hedgemix.runtime.files import replacing

LOG_SUM = 1e-5
"""Largest |log of the sum| of a row: float32 rounding of 1,024 probabilities is some 1e-6."""
NATS = 1e-6
"""Largest relative difference between a scorer's own total and that of its rows."""
LARGEST_ROW = 1 << 20
KNOWN_WINDOW, KNOWN_WINDOWS = 16, 64
"""Tokens of a window of the text that is looked for in what the scorer can read, and how many are."""


@dataclass(frozen=True)
class Given:
    """Says which scorer is audited, and how."""

    scorer: str
    """module:object"""
    files: tuple[Path, ...] = ()
    """What it may read beside code."""
    whole_text: bool = False
    """Whether it is given the text at once."""
    folder: Path = field(default_factory=Path.cwd)
    """Where its module is looked for first, and its relative paths begin."""

    def code(self) -> list[Path]:
        """List the files of code that the module's name begins with in the folder, be it a package's or not."""
        top = str(self.folder / self.scorer.partition(":")[0].partition(".")[0])
        return [Path(name) for name in sorted(namespaces.files(top)) + [f"{top}.py"] * os.path.isfile(f"{top}.py")]


@dataclass
class Walk:
    """Holds what a scorer said on its way through a text; index t is position t, 0 is unused."""

    nats_N: np.ndarray
    sums_N: np.ndarray
    """Sum of each row."""
    least_N: np.ndarray
    """Smallest entry of each row; NaN when there is one."""
    rows: list[bytes] = field(default_factory=lambda: [b""])
    """A hash of each row."""
    unsteady: list[int] = field(default_factory=list)
    """Asked positions where a second predict() gave another row."""
    totals: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Its own total and that of its rows, after the asked positions and the last."""
    size: int = 0
    """V, of the last row."""
    confined: sandbox.Confined = field(default_factory=sandbox.Confined)

    def talk(self, tokens_N: np.ndarray, known: int, asked: Collection[int]) -> sandbox.Talk:
        """Make the conversation in which the scorer is given the first `known` tokens, and each later one of this
        walk's positions is told it when its row is there; asked: positions at which it is asked twice."""
        last = len(self.nats_N) - 1

        def converse(heard: BinaryIO, told: BinaryIO) -> None:
            def tell(*words: int) -> None:
                told.write(np.array(words, "<u4").tobytes())
                told.flush()

            told.write(np.concatenate([[known], tokens_N[:known]]).astype("<u4").tobytes())
            tell(PREDICT)
            for t in range(1, last + 1):
                token = int(tokens_N[t])
                row_V = self.hear_row(heard, t, token)
                if t in asked:
                    tell(PREDICT)
                    if self.hear_row(heard, t, token).tobytes() != row_V.tobytes():
                        self.unsteady.append(t)
                self.judge(t, token, row_V)
                if t in asked or t == last:
                    tell(token, TOTAL)
                    own = float(np.frombuffer(heard.read(8).ljust(8, b"\xff"), "<f8")[0])
                    if not math.isnan(own):
                        self.totals[t] = own, float(self.nats_N.sum())
                    tell(PREDICT if t < last else END)
                else:
                    tell(token, PREDICT)

        return converse

    def hear_row(self, heard: BinaryIO, t: int, token: int) -> np.ndarray:
        """Read a row, float64 (V,); raises EOFError where the scorer is gone, RecipeError where it is no row."""
        self.size = int(np.frombuffer(heard.read(4).ljust(4, b"\0"), "<u4")[0])
        if not self.size:
            raise EOFError
        if not token < self.size <= LARGEST_ROW:
            raise RecipeError(f"predict() gave {self.size:,} probabilities at position {t:,}, before token {token}")
        data = heard.read(8 * self.size)
        if len(data) < 8 * self.size:
            raise EOFError
        return np.frombuffer(data, "<f8")

    def judge(self, t: int, token: int, row_V: np.ndarray) -> None:
        """Take what a row gives its token, and what it sums to."""
        value = float(row_V[token])
        self.nats_N[t] = -math.log(value) if 0 < value < math.inf else math.inf
        with np.errstate(invalid="ignore", over="ignore"):
            self.sums_N[t], self.least_N[t] = row_V.sum(), row_V.min()
        self.rows.append(hashlib.blake2b(row_V.tobytes(), digest_size=16).digest())


class Refused(Exception):
    """Tells what a scorer was refused that then failed."""


def walk(given: Given, tokens_N: np.ndarray, last: int, asked: Collection[int]) -> Walk:
    """Take a new scorer, in a new process, through the text up to position `last`; raises RecipeError when it fails on
    its way, Refused when that was because it asked for more than it may read."""
    out = Walk(np.zeros(last + 1), np.zeros(last + 1), np.zeros(last + 1))
    talk = out.talk(tokens_N, len(tokens_N) if given.whole_text else 1, asked)

    def converse(heard: BinaryIO, told: BinaryIO) -> None:
        try:
            talk(heard, told)
        except EOFError:
            return  # it is gone; why, its process says

    arguments = {"name": given.scorer, "folder": str(given.folder)}
    try:
        outcome = sandbox.run(
            "hedgemix.audit.scorer_process:serve", arguments, [*given.code(), *given.files], talk=converse,
            folders=[given.folder],
        )  # fmt: skip
    except sandbox.WorkError as error:
        if error.refused:
            raise Refused(error.refused[0]) from error
        if str(error).startswith("RecipeError: "):
            raise RecipeError(str(error).removeprefix("RecipeError: ")) from None
        raise RecipeError(f"the scorer raised {error} after row {len(out.rows) - 1:,}") from error
    if len(out.rows) <= last:
        raise RecipeError(f"the scorer ended after row {len(out.rows) - 1:,}")
    out.confined = outcome.confined
    return out


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
    if tokens.max() >= LARGEST_ROW:
        raise RecipeError(f"--tokens {path}: id {tokens.max()} is not below {LARGEST_ROW:,}")
    return tokens.astype(np.int64)


def report(
    given: Given, path: Path, draws: int, cuts: int, seed: int | None, place: Path | None, console: Console
) -> int:
    """Audit a scorer on the tokens of a file, a line a check; the report goes to `place`, or is printed.

    seed: of all that is drawn; None: from the system's randomness. Returns 0 when every check passed, else 1. Raises
    RecipeError.
    """
    if draws < 1 or cuts < 1:
        raise RecipeError("--draws and --cuts must be positive")
    if missing := [file for file in given.files if not file.is_file()]:
        raise RecipeError(f"--files {missing[0]} is no file")
    tokens_N, name = read_tokens(path), given.scorer
    seed = secrets.randbits(SEED_BITS) if seed is None else seed
    console.print(f"{name} on {len(tokens_N) - 1:,} tokens of {path}", soft_wrap=True, highlight=False)
    findings, rate = run(given, tokens_N, draws, cuts, seed, lambda finding: print_finding(finding, console))
    facts = {
        "bits per token of its rows": rate,
        "tokens": len(tokens_N) - 1,
        "text": path.name,
        "given": "the whole text, or decoys" if given.whole_text else "each token once its row was there",
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
    given: Given,
    tokens_N: np.ndarray,
    draws: int,
    cuts: int,
    seed: int,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> tuple[list[Finding], float]:
    """Make the four findings, handed on one by one, and the bits a token of the scorer's rows."""
    generator, size = np.random.default_rng(seed), len(tokens_N)
    asked = {1, size - 1, *(int(t) for t in generator.integers(1, size, draws))}
    edges = np.linspace(1, size, cuts + 1).astype(int)
    places = [int(generator.integers(edges[i], max(edges[i + 1], edges[i] + 1))) for i in range(cuts)]
    findings: list[Finding] = []

    def find(finding: Finding) -> None:
        findings.append(finding)
        on_finding(finding)

    began = time.monotonic()
    try:
        base = walk(given, tokens_N, size - 1, asked)
    except Refused as error:
        find(Finding("self-contained", False, str(error), f"It asked for more than it may read: {error}; --files names "
                     "what it needs.", seconds=time.monotonic() - began))  # fmt: skip
        return findings, math.nan
    find(normalised(base, time.monotonic() - began))
    find(order(base, asked))
    find(timed(lambda: decoys(given, tokens_N, places, base, seed)) if given.whole_text else streamed(base))
    find(timed(lambda: self_contained(given, tokens_N, base.confined, generator)))
    return findings, float(base.nats_N[1:].sum()) / math.log(2) / (size - 1)


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
    return Finding("order", not wrong, headline, wrong_or(wrong, statement), figures)


def streamed(base: Walk) -> Finding:
    """Check that the rows were committed before their tokens were told by a process to which the kernel, not Python
    alone, closed the rest."""
    confined, rows = base.confined, len(base.rows) - 1
    closed = confined.namespaces or confined.landlock > 0
    statement = (
        f"A process that had the first token committed its row at all {rows:,} positions, each before it was told the "
        "token there; no row can rest on its token or on a later one."
    )
    if not closed:
        statement = "Not proved: no guard of the kernel keeps this process from opening the text's file."
    figures = {
        "positions": rows,
        "guarded_by": confined.guarded_by(),
        "left_open": confined.weakness() or "nothing known",
    }
    headline = f"all {rows:,} rows before their tokens" if closed else "no guard of the kernel is in force"
    return Finding("streamed", closed, headline, statement, figures)


def decoys(given: Given, tokens_N: np.ndarray, places: Sequence[int], base: Walk, seed: int) -> Finding:
    """Check that scorers in new processes say the same up to each of these positions, from which on their text is
    drawn."""
    wrong, compared = [], 0
    for cut in places:
        try:
            mine = walk(given, altered(tokens_N, cut, base.size, seed), cut, ())
        except (Refused, RecipeError) as error:
            wrong.append(f"with other tokens from position {cut:,} on it failed: {error}")
            continue
        wrong += [f"with other tokens from position {cut:,} on it asked for {each}" for each in mine.confined.refused]
        other = next((t for t in range(1, cut + 1) if mine.rows[t] != base.rows[t]), None)
        compared += cut
        if other is not None:
            wrong.append(f"with other tokens from position {cut:,} on, its row at {other:,} is another")
    missed = {f"{share:.0%} of the positions": (1 - share) ** len(places) for share in LEAKS}
    told = ", ".join(f"{value:.2g} for {name}" for name, value in missed.items())
    statement = (
        f"With all tokens from one of {len(places)} drawn positions on replaced, the rows of new processes up to there "
        f"({compared:,}) are the same to the bit. This is weaker than rows that are committed before their tokens are "
        f"told: a leak of a row's own token at a share of the positions is missed with probability {told}."
    )
    figures = {
        "positions": list(places),
        "rows_compared": compared,
        "missed_with_probability": missed,
        "violations": wrong[:8],
    }
    sound = f"{len(places)} cuts, {compared:,} rows; a leak at 10% is missed with {missed['10% of the positions']:.1g}"
    return Finding("blind", not wrong, wrong[0] if wrong else sound, wrong_or(wrong, statement), figures)


def altered(tokens_N: np.ndarray, cut: int, vocab_size: int, seed: int) -> np.ndarray:
    """Copy the tokens with another one, drawn evenly with the audit's seed, in place of each from `cut` on."""
    shift = np.random.default_rng([seed, cut]).integers(1, vocab_size, len(tokens_N) - cut)
    out = tokens_N.copy()
    out[cut:] = (out[cut:] + shift) % vocab_size
    return out


def self_contained(
    given: Given, tokens_N: np.ndarray, confined: sandbox.Confined, generator: np.random.Generator
) -> Finding:
    """Check that the scorer asked for nothing but code and what it was given, and that the text does not stand there
    word for word; name what it could know from."""
    unknown = [line.rpartition(" (")[0] for line in own_code.unaccounted(confined.loaded)]
    own = sorted({*map(os.path.realpath, (*given.code(), *given.files)), *unknown})
    starts = generator.integers(0, max(1, len(tokens_N) - KNOWN_WINDOW), KNOWN_WINDOWS)
    drawn = [tokens_N[start : start + KNOWN_WINDOW] for start in starts]
    told = [each for each in drawn if len(set(each.tolist())) >= KNOWN_WINDOW // 2]  # else it may stand anywhere
    windows = [each.astype(kind).tobytes() for each in told for kind in ("<u2", "<u4", "<i8")]
    wrong, sizes = [f"it asked for {each}" for each in confined.refused], {}
    for name in filter(os.path.isfile, own):
        content = Path(name).read_bytes()
        sizes[f"{name} {hashlib.sha256(content).hexdigest()[:16]}"] = len(content)
        if found := sum(window in content for window in windows):
            wrong.append(f"{found} of {len(told)} windows of {KNOWN_WINDOW} tokens stand in {name}")
    total = sum(sizes.values())
    statement = (
        f"It could read code and {len(given.files)} files; {total:,} bytes in {len(sizes)} files are its own or of no "
        "package, and no drawn window of the text stands in them as it is. What these bytes say of the text in "
        "another form is not known: count them."
    )
    figures = {
        "own_bytes": total,
        "own_files": sizes,
        "guarded_by": confined.guarded_by(),
        "left_open": confined.weakness() or "nothing known",
        "violations": wrong[:8],
    }
    sound = f"{total:,} bytes of its own in {len(sizes)} files"
    return Finding("self-contained", not wrong, wrong[0] if wrong else sound, wrong_or(wrong, statement), figures)
