"""Whether the seconds that a record says it took fit together. They cannot be proved: another machine takes others.

Each stage tells its time in several places, written while it ran: its log or trace line by line, clock.json every
second, result.json at its end. A time that was lowered in one of them is in contradiction with the others; whoever
changes all of them alike is not found out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hedgemix.audit.checks import wrong_or
from hedgemix.audit.claim import Claim
from hedgemix.audit.findings import Finding
from hedgemix.config import TrainConfig
from hedgemix.runtime.files import read_json
from hedgemix.runtime.layout import CLOCK, LOG, RESULT, TRACE

ROUNDING = 1e-3
"""Seconds by which times that are told to the tenth of a millisecond may differ."""
CLOSING = 60.0
"""Seconds that a stage may take to end after it has told its time, its last checkpoint being on its way to storage."""
PHASES = ("scoring", "mixing", "ttt")


def check_seconds(claim: Claim) -> Finding:
    """Check that the seconds of training and evaluation are possible, and the same wherever they are told."""
    wrong: list[str] = []
    for faults in (log_faults, training_faults, evaluation_faults, clock_faults):
        try:
            wrong += faults(claim)
        except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
            wrong.append(f"seconds of {faults.__name__.partition('_')[0]} cannot be read ({error!r})")
    statement = (
        f"Seconds cannot be proved on another machine. Those of {len(claim.log)} steps and {len(claim.trace)} chunks "
        f"do not run backwards, add up to no more than {RESULT} says, whose numbers follow from the log, keep the "
        "budget that the recipe gives the training, and agree with the clock that was noted while the stages ran."
    )
    figures = {
        "train_seconds": claim.row["train_seconds"],
        "evaluate_seconds": claim.row["evaluate_seconds"],
        "violations": wrong[:8],
    }
    headline = wrong[0] if wrong else f"no contradiction in {len(claim.log)} steps and {len(claim.trace)} chunks"
    return Finding("seconds", not wrong, headline, wrong_or(wrong, statement), figures)


def log_faults(claim: Claim) -> list[str]:
    """Find where the training's log is not whole, runs backwards, or is not what its result tells."""
    return list(steps_told(claim.log, claim.trained, claim.recipe.train))


def steps_told(log: Sequence[dict[str, Any]], result: dict[str, Any], config: TrainConfig) -> Iterator[str]:
    """Yield what a log of steps, a line each, contradicts in the result of the training and in its recipe."""
    steps = result["steps"]
    if [line["step"] for line in log] != list(range(1, steps + 1)):
        yield f"{LOG} has not each of {steps:,} steps once, in order: {len(log):,} lines, the last of step {last(log)}"
        return
    if config.steps and config.steps != steps:
        yield f"{RESULT} says {steps:,} steps, the recipe takes {config.steps:,}"
    for line in log:
        if line["tokens"] != (tokens := line["step"] * config.batch_tokens):
            yield f"{LOG}: step {line['step']:,} ends at token {line['tokens']:,}, not {tokens:,}"
            break
    for name in ("elapsed_seconds", "fraction"):
        at = backwards([line[name] for line in log])
        if at is not None:
            yield f"{LOG}: {name} goes back, or is no number, at step {at + 1:,}"
    tail = [line["loss_nats"] for line in log][-max(1, steps // 10) :]
    told = {"tokens": log[-1]["tokens"], "train_loss_nats": sum(tail) / len(tail)}
    for name, value in told.items():
        if result[name] != value:
            yield f"{RESULT} says {name} {result[name]}, {LOG} {value}"


def training_faults(claim: Claim) -> Iterator[str]:
    """Yield what is impossible in the seconds that the training reports."""
    result, config = claim.trained, claim.recipe.train
    total, loop, calibrate = (result[f"{name}_seconds"] for name in ("train", "loop", "calibrate"))
    if not min(total, loop, calibrate, result["warmup_seconds"]) >= 0:
        yield f"{RESULT} of the training has seconds below 0"
    if not abs(total - loop - calibrate) <= ROUNDING:
        yield f"train_seconds {total} are not loop_seconds {loop} and calibrate_seconds {calibrate}"
    if not abs(result["ms_per_step"] * result["steps"] - 1000 * loop) <= 1000 * ROUNDING:
        yield f"ms_per_step {result['ms_per_step']} for {result['steps']:,} steps is not loop_seconds {loop}"
    began = claim.log[-1]["elapsed_seconds"]
    if not began <= loop + ROUNDING:
        yield f"{LOG}: the last step began after {began} s, the loop ended after {loop}"
    allowed = config.budget_seconds - config.reserve_seconds
    if not config.steps and not began < allowed + ROUNDING:
        yield f"{LOG}: a step began after {began} s, the recipe's loop ends after {allowed:g}"
    if not config.steps and not loop >= allowed - ROUNDING:
        yield f"loop_seconds {loop} are fewer than the {allowed:g} that the recipe's loop takes"


def evaluation_faults(claim: Claim) -> Iterator[str]:
    """Yield what is impossible in the seconds that the evaluation reports."""
    result, total = claim.result, 0.0
    for phase in PHASES:
        told = [line["seconds"][phase] for line in claim.trace]
        below = next((number for number, value in enumerate(told, start=1) if not value >= -ROUNDING), None)
        if below:
            yield f"{TRACE}: line {below} has {phase} seconds below 0"
        summed, reported = math.fsum(told), result[f"{phase}_seconds"]
        if not abs(summed - reported) <= ROUNDING:
            yield f"{RESULT} says {phase}_seconds {reported}, the trace's chunks add up to {summed}"
        total += summed
    if not total <= result["evaluate_seconds"] + ROUNDING:
        yield f"evaluate_seconds {result['evaluate_seconds']} are fewer than the {total} of its phases"


def clock_faults(claim: Claim) -> Iterator[str]:
    """Yield where the clock that ran along tells another time than the result."""
    for folder, result, name in (
        (claim.training, claim.trained, "train_seconds"),
        (claim.evaluation, claim.result, "evaluate_seconds"),
    ):
        if (told := noted(folder)) is None:
            yield f"{folder.name}/{CLOCK} is not there, or is none"
        elif not -ROUNDING <= told - result[name] <= CLOSING:
            yield f"{folder.name}: {RESULT} says {name} {result[name]}, {CLOCK} {told}"


def noted(folder: Path) -> float | None:
    """Read the seconds of a clock.json; None when there are none."""
    try:
        return float(read_json(folder / CLOCK)["elapsed_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def backwards(values: Sequence[float]) -> int | None:
    """Find the first place where a value is below the one before it, or below 0, or is no number; None without one."""
    before = 0.0
    for number, value in enumerate(values):
        if not value >= before:
            return number
        before = value
    return None


def last(log: Sequence[dict[str, Any]]) -> Any:
    """Return the last line's step."""
    return log[-1].get("step") if log else None
