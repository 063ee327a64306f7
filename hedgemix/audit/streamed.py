"""The check `streamed`: what the evaluation charged, against rows that were committed before their tokens were told.

A process that can open the artifact, and nothing else, commits the row of a target; then, and only then, it is told the
token; see `commitment`. Its rows cannot rest on what comes later, whatever its code does. Where every charge is what
such a row gives the token, the score is a code length, in the order of the text, by construction.

Shapes: N tokens of the text, B rows judged at once, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from hedgemix.audit import own_code, sandbox
from hedgemix.audit.findings import Finding
from hedgemix.audit.replay import Source
from hedgemix.config import EvaluateConfig
from hedgemix.evaluate.scoring_order import Piece, pieces

ROW_SUM = 1e-5
"""How far a row's sum may be from 1; float32 rounding of 1,024 log probabilities gives some 1e-6."""
TOKEN_NATS = {"float32": 1e-3, "bfloat16": 1e-3}
SUM = {"float32": 1e-6, "bfloat16": 1e-6}
"""Largest difference of a charge, in nats, and relative one of their sum, by the precision of the model's products: one
token at a time they are rounded otherwise than many at once."""
SPELLED = 1e-9
"""Largest relative difference between a chunk's bits and the sum of its charges, which are the same numbers."""
LEAKS = 0.01, 1 / 33, 0.1
"""Shares of the text at which a leak is asked about."""
ROWS = 256


@dataclass
class Committed:
    """Holds what the rows gave the tokens, and what was wrong with rows."""

    tokens_N: np.ndarray
    """The text, uint16, which only this side has."""
    vocab_size: int
    stretches: Sequence[Piece]
    """Whose rows are asked for."""
    nats_N: np.ndarray = field(init=False)
    """What the committed row charges each target, NaN where there is none."""
    largest_off: float = 0.0
    """|sum - 1| of the row furthest from a distribution."""
    unsound: list[int] = field(default_factory=list)
    """Positions whose rows are no distributions."""

    def __post_init__(self) -> None:
        self.nats_N = np.full(len(self.tokens_N), np.nan)

    def asked(self) -> np.ndarray:
        """List the positions asked for."""
        return np.concatenate([np.arange(each.start, each.stop) for each in self.stretches])

    def talk(self, progress: Callable[[float], None]) -> sandbox.Talk:
        """Make the conversation in which every row of the stretches is taken before its token is told."""
        told_N, stretches, total = self.tokens_N.astype("<u2"), self.stretches, len(self.asked())
        log_rows_BV = np.empty((ROWS, self.vocab_size), "<f4")

        def converse(heard: BinaryIO, told: BinaryIO) -> None:
            known = done = 0
            for stretch in stretches:
                told.write(told_N[known : stretch.start].tobytes())
                told.flush()
                for start in range(stretch.start, stretch.stop, ROWS):
                    rows_BV = log_rows_BV[: min(ROWS, stretch.stop - start)]
                    for t, row_V in enumerate(rows_BV, start):
                        if heard.readinto(row_V.data.cast("B")) < row_V.nbytes:  # type: ignore[attr-defined]
                            return
                        told.write(told_N[t : t + 1].tobytes())
                        told.flush()
                    self.judge(start, rows_BV)
                    done += len(rows_BV)
                    progress(done / total)
                known = stretch.stop

        return converse

    def judge(self, start: int, log_rows_BV: np.ndarray) -> None:
        """Take what the rows of positions from `start` on give the tokens there, and see whether they are
        distributions."""
        here = np.arange(len(log_rows_BV))
        log_rows_BV = log_rows_BV.astype(np.float64)
        self.nats_N[start + here] = -log_rows_BV[here, self.tokens_N[start + here]]
        with np.errstate(over="ignore"):
            off_B = np.abs(np.exp(log_rows_BV).sum(1) - 1)
        off_B[~np.isfinite(log_rows_BV).all(1)] = math.inf
        self.largest_off = max(self.largest_off, float(off_B.max()))
        self.unsound += (start + np.flatnonzero(~(off_B <= ROW_SUM))).tolist()


def draw(spans: Sequence[Piece], config: EvaluateConfig, most_tokens: int, seed: int) -> tuple[list[Piece], int, int]:
    """Draw what is proved of a text: all of it where it has at most `most_tokens`; else the first piece, the last, and
    others at random, as many as these tokens hold and one at least.

    Returns the stretches, in order, and of how many pieces between the first and the last how many were drawn.
    """
    every = [piece for chunk in spans for piece in pieces(chunk, config)]
    if every[-1].stop - 1 <= most_tokens:
        return [Piece(1, every[-1].stop)], max(len(every) - 2, 0), max(len(every) - 2, 0)
    longest = max(piece.stop - piece.start for piece in every)
    between = len(every) - 2
    count = max(0, min(between, max(1, most_tokens // longest - 2)))
    drawn = 1 + np.random.default_rng(seed).choice(max(between, 1), count, replace=False)
    stretches: list[Piece] = []
    for piece in (every[number] for number in sorted({0, *map(int, drawn), len(every) - 1})):
        if stretches and stretches[-1].stop == piece.start:
            stretches[-1] = Piece(stretches[-1].start, piece.stop)
        else:
            stretches.append(piece)
    return stretches, between, count


def missed(share: float, between: int, drawn: int) -> float:
    """Compute the probability that `drawn` of the pieces `between` first and last hold none of the share of them that a
    leak is confined to, the most that it can hide: at random positions it is in every piece."""
    leaking = max(1, math.ceil(share * between))
    return math.prod((between - leaking - i) / (between - i) for i in range(min(drawn, between - leaking + 1)))


def commit(
    work: str, source: Source, stretches: Sequence[Piece], readable: Sequence[Any], vocab_size: int,
    progress: Callable[[float], None],
) -> tuple[Committed, sandbox.Outcome, float]:  # fmt: skip
    """Hold the conversation with the predictor in a process of its own; returns also the seconds that it took. Raises
    WorkError when the predictor fails."""
    began, committed = time.monotonic(), Committed(source.read(), vocab_size, stretches)
    arguments = {
        "artifact_path": source.artifact,
        "config": source.config,
        "n_tokens": source.schedule_tokens,
        "stretches": [[each.start, each.stop] for each in stretches],
        "device": source.device,
    }
    outcome = sandbox.run(work, arguments, readable, talk=committed.talk(progress))
    return committed, outcome, time.monotonic() - began


def check(
    committed: Committed, charged_N: np.ndarray, lines: Sequence[Mapping[str, Any]], name: str, dtype: str,
    drawn: Sequence[int], confined: sandbox.Confined, seconds: float,
) -> Finding:  # fmt: skip
    """Check that the evaluation charged what the committed rows give the tokens.

    charged_N: what its run charged each position, in nats. lines: its trace. name: of the number that is the score.
    drawn: pieces between the first and the last, and how many of them were proved. confined: what the predictor's
    process asked for.
    """
    nats_N = committed.nats_N
    asked = committed.asked()
    off_B = np.abs(charged_N[asked] - nats_N[asked])
    off_B[~np.isfinite(off_B)] = math.inf
    beyond = asked[off_B > TOKEN_NATS[dtype]]
    mine, theirs = float(nats_N[asked].sum()), float(charged_N[asked].sum())
    sums = abs(theirs - mine) / mine if math.isfinite(mine) and math.isfinite(theirs) and mine else math.inf
    wrong = [f"position {t:,}: its row is no distribution" for t in committed.unsound]
    wrong += [f"position {t:,}: charged {charged_N[t]:.6g} nats, its row says {nats_N[t]:.6g}" for t in beyond.tolist()]
    if not sums <= SUM[dtype]:
        wrong.append(f"{theirs:.6f} nats charged, the rows say {mine:.6f}")
    wrong += misspelled(charged_N, lines, name)
    wrong += [f"the predictor asked for more: {each}" for each in confined.refused]
    wrong += [f"the predictor has unknown code: {file}" for file in own_code.unaccounted(confined.loaded)]
    total, proved, (between, count) = len(nats_N) - 1, len(asked), drawn
    leaks = {f"{share:.0%} of the text": missed(share, between, count) for share in LEAKS} if proved < total else {}
    worst = float(off_B.max(initial=0.0))
    statement = (
        f"A process that could open the artifact only committed its row at {proved:,} of {total:,} positions, each "
        f"before it was told the token there: all are distributions, and give the tokens what the evaluation charged."
    )
    if leaks:
        told = ", ".join(f"{value:.2g} for {name}" for name, value in leaks.items())
        statement += f" A leak confined to a share of the pieces is missed with probability {told}."
    figures = {
        "positions_proved": proved,
        "positions": total,
        "share_proved": proved / total,
        "missed_with_probability": leaks,
        "largest_difference_nats": worst,
        "tolerance_nats": TOKEN_NATS[dtype],
        "relative_difference_of_the_sum": sums,
        "tolerance_of_the_sum": SUM[dtype],
        "largest_sum_off_1": committed.largest_off,
        "rows_that_are_no_distribution": len(committed.unsound),
        "positions_charged_otherwise": len(beyond),
        "guarded_by": confined.guarded_by(),
        "left_open": confined.weakness() or "nothing known",
        "violations": wrong[:8],
    }
    share = f"{proved:,} of {total:,}" if leaks else f"all {total:,}"
    headline = wrong[0] if wrong else f"{share} positions within {worst:.0e} nats, their sum {sums:.0e}"
    return Finding(
        "streamed", not wrong, headline,
        f"Violated: {wrong[0]} ({len(wrong) - 1} more)." if wrong else statement, figures, seconds,
    )  # fmt: skip


def misspelled(charged_N: np.ndarray, lines: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Find chunks whose bits in the trace are not the sum of their charges."""
    wrong, start = [], 1
    for line in lines:
        bits = float(charged_N[start : start + line["tokens"]].sum()) / math.log(2)
        start += line["tokens"]
        if not abs(bits - line["bits"][name]) <= SPELLED * max(bits, 1.0):
            wrong.append(f"chunk {line['chunk']}: its charges add up to {bits:.3f} bits, its line says "
                         f"{line['bits'][name]:.3f}")  # fmt: skip
    if start != len(charged_N):
        wrong.append(f"{start - 1:,} targets are in the trace's lines, of {len(charged_N) - 1:,}")
    return wrong
