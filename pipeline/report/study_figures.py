"""The plots of a study's report, in the style of a record's."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.analysis.significance import Summary
from pipeline.report.figures import FAINT, SERIES, Figure, colours, drawing, legend, smooth, styled

GOOD, BAD, UNDECIDED = SERIES[2], SERIES[7], SERIES[8]
WORD_COLOURS = {"better": GOOD, "worse": BAD}
NAME_WIDTH, NAME_LINES = 26, 2
"""Characters of a variant's name in a line of an axis, and lines."""
SPAN = 3.0
"""An axis shows so many median half-widths beside the outermost difference."""
CURVE_POINTS = 400
LONGEST = 40
"""Characters of a name in a legend."""


def wrapped(name: str) -> str:
    """Break a name into lines for an axis; what is too long ends in an ellipsis."""
    lines = textwrap.wrap(name, NAME_WIDTH, break_on_hyphens=False)
    if len(lines) > NAME_LINES:
        lines = [*lines[: NAME_LINES - 1], lines[NAME_LINES - 1][: NAME_WIDTH - 1] + "…"]
    return "\n".join(map(literal, lines))


def literal(name: str) -> str:
    """Escape what matplotlib would set as mathematics, or take for a line without a name."""
    return name.replace("$", r"\$").lstrip("_")


@styled
def differences(samples: Mapping[str, Summary], words: Mapping[str, str], margin: float) -> Figure:
    """Draw each variant's difference to the base with its interval, in the order given, coloured by its word; lines at
    0 and, where it is in sight, at the `margin` by which a record has to be better."""
    names = {name: wrapped(name) for name in samples}
    figure, (axes,) = drawing(0.95 + sum(0.2 + 0.12 * label.count("\n") for label in names.values()))
    low, high = sight(list(samples.values()))
    for place, (name, sample) in enumerate(samples.items()):
        colour = WORD_COLOURS.get(words[name], UNDECIDED)
        if sample.count > 1:
            axes.plot([max(low, sample.low), min(high, sample.high)], [place, place], color=colour)
            for end, beyond, mark in ((low, sample.low < low, "<"), (high, sample.high > high, ">")):
                if beyond:
                    axes.plot([end], [place], mark, color=colour, markersize=5, clip_on=False)
        axes.plot(
            [sample.mean], [place], "o", color=colour, markersize=5, fillstyle="full" if sample.count > 1 else "none"
        )
    axes.axvline(0, color=FAINT, linewidth=1)
    if low < -margin:
        axes.axvline(-margin, color=FAINT, linewidth=0.8, linestyle="--")
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("bits per byte more than the base; left is better")
    return figure


def sight(samples: Sequence[Summary]) -> tuple[float, float]:
    """Choose an axis that shows every difference, 0, and every interval that does not dwarf the others."""
    spread = [sample for sample in samples if sample.count > 1]
    outer = SPAN * float(np.median([sample.high - sample.mean for sample in spread])) if spread else 0.0
    means = [0.0, *(sample.mean for sample in samples)]
    low = max(min(means) - outer, min([*means, *(sample.low for sample in spread)]))
    high = min(max(means) + outer, max([*means, *(sample.high for sample in spread)]))
    pad = 0.05 * (high - low) or 1e-4
    return low - pad, high + pad


@styled
def learning(curves: Mapping[str, Sequence[list[dict[str, Any]]]]) -> Figure:
    """Draw training loss against seconds of the training clock, mean over a variant's seeds, a line a variant, and
    below by how much each is above the first. curves: the lines of the step log of every seed, by variant."""
    figure, (loss, apart) = drawing(3.8 + 0.13 * len(curves), 2, (1.7, 1))
    means = {name: mean_curve(logs) for name, logs in curves.items()}
    first_seconds, first_nats = next(iter(means.values()))
    aparts = []
    for n, (colour, (name, (seconds, nats))) in enumerate(zip(colours(len(means)), means.items(), strict=True)):
        style = ("-", "--", ":", "-.")[n // len(SERIES) % 4]
        loss.plot(
            seconds, nats, style, color=colour, label=literal(name if len(name) <= LONGEST else f"{name[:LONGEST]}…")
        )
        both = seconds[seconds <= first_seconds[-1]]
        away = np.interp(both, seconds, nats) - np.interp(both, first_seconds, first_nats)
        away = smooth(away, max(1, len(away) // 20))  # else the batches' own noise hides it
        apart.plot(both, away, style, color=colour)
        aparts.append(away[len(away) // 10 :])
    late = np.concatenate([nats[len(nats) // 10 :] for _, nats in means.values()])
    loss.set_ylim(*padded(late))
    apart.set_ylim(*padded(np.concatenate(aparts)))
    loss.set_ylabel("loss, nats a token")
    apart.set_ylabel(f"above {next(iter(means))}")
    apart.set_xlabel("training seconds")
    legend(figure, loss, 1 if max(map(len, curves)) > 18 else 3)
    return figure


def padded(values: np.ndarray) -> tuple[float, float]:
    """Choose the limits of an axis that these values fill."""
    low, high = float(values.min()), float(values.max())
    pad = 0.06 * (high - low) or 1e-3
    return low - pad, high + pad


def mean_curve(logs: Sequence[list[dict[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Average the seeds' smoothed losses at equal seconds, as far as the shortest seed goes: seconds, nats."""
    times = [np.array([line["elapsed_seconds"] for line in lines]) for lines in logs]
    nats = [np.array([line["loss_nats"] for line in lines]) for lines in logs]
    start, stop = max(seconds[0] for seconds in times), min(seconds[-1] for seconds in times)
    grid = np.linspace(min(start, stop), stop, CURVE_POINTS)
    means = [smooth(values, max(1, len(values) // 50)) for values in nats]
    return grid, np.mean([np.interp(grid, seconds, each) for seconds, each in zip(times, means, strict=True)], axis=0)
