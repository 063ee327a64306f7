"""The plots of a study's report, in the style of a record's."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.analysis.significance import Summary
from pipeline.report.figures import FAINT, SERIES, colours, drawing, legend, lower_part, smooth, styled

GOOD, BAD, UNDECIDED = SERIES[2], SERIES[7], SERIES[8]
WORD_COLOURS = {"better": GOOD, "worse": BAD}
NAME_WIDTH, NAME_LINES = 26, 2
"""Characters of a variant's name in a line of an axis, and lines."""
SPAN = 3.0
"""An axis shows so many median half-widths beside the outermost difference."""
CURVE_POINTS = 400


def wrapped(name: str) -> str:
    """Break a name into lines for an axis; what is too long ends in an ellipsis."""
    lines = textwrap.wrap(name, NAME_WIDTH, break_on_hyphens=False)
    if len(lines) > NAME_LINES:
        lines = [*lines[: NAME_LINES - 1], lines[NAME_LINES - 1][: NAME_WIDTH - 1] + "…"]
    return "\n".join(lines)


@styled
def differences(samples: Mapping[str, Summary], words: Mapping[str, str], margin: float) -> Figure:
    """Draw each variant's difference to the base with its interval, in the order given, coloured by its word; lines at
    0 and, where it is in sight, at the `margin` by which a record has to be better."""
    names = {name: wrapped(name) for name in samples}
    figure, (axes,) = drawing(0.95 + sum(0.2 + 0.12 * label.count("\n") for label in names.values()))
    halves = [sample.high - sample.mean for sample in samples.values() if sample.count > 1]
    outer = SPAN * float(np.median(halves)) if halves else 0.0
    means = [sample.mean for sample in samples.values()]
    low, high = min(0.0, *means) - outer, max(0.0, *means) + outer
    pad = 0.05 * (high - low) or 1e-4
    low, high = low - pad, high + pad
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


@styled
def learning(curves: Mapping[str, Sequence[list[dict[str, Any]]]]) -> Figure:
    """Draw training loss against seconds of the training clock, mean over a variant's seeds, a line a variant. curves:
    the lines of the step log of every seed, by variant."""
    figure, (axes,) = drawing(3.0 + 0.13 * len(curves))
    every = [line["loss_nats"] for logs in curves.values() for lines in logs for line in lines]
    dashes = ["-", "--", ":", "-."]
    for n, (colour, (name, logs)) in enumerate(zip(colours(len(curves)), curves.items(), strict=True)):
        seconds, nats = mean_curve(logs)
        style = dashes[n // len(SERIES) % len(dashes)]
        axes.plot(seconds, nats, style, color=colour, label=textwrap.shorten(name, 40, placeholder="…") or name[:40])
    axes.set_ylim(*lower_part(every))
    axes.set_xlabel("training seconds")
    axes.set_ylabel("loss, nats a token")
    legend(figure, axes, 1 if max(map(len, curves)) > 18 else 3)
    return figure


def mean_curve(logs: Sequence[list[dict[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Average the seeds' smoothed losses at equal seconds, as far as the shortest seed goes: seconds, nats."""
    times = [np.array([line["elapsed_seconds"] for line in lines]) for lines in logs]
    nats = [np.array([line["loss_nats"] for line in lines]) for lines in logs]
    start, stop = max(seconds[0] for seconds in times), min(seconds[-1] for seconds in times)
    grid = np.linspace(min(start, stop), stop, CURVE_POINTS)
    means = [smooth(values, max(1, len(values) // 50)) for values in nats]
    return grid, np.mean([np.interp(grid, seconds, each) for seconds, each in zip(times, means, strict=True)], axis=0)
