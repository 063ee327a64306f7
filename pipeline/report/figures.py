"""The plots of a report, each as one SVG whose colours a page may set for light and dark.

They are drawn for a column of a phone's width, with text as text. A colour of `COLOURS` comes out as a variable with
that colour as its default; `standalone_svg` makes a file of its own of it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

# A notebook's shell names a way to draw that is the notebook's own, and may be none here.
os.environ["MPLBACKEND"] = "agg"

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Inputs = ParamSpec("Inputs")
INK, FAINT, GRID = "#24292f", "#57606a", "#d0d7de"
SERIES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#1b7c83", "#cf222e", "#6e7781")
COLOURS = {INK: "ink", FAINT: "faint", GRID: "grid"} | {colour: f"s{n}" for n, colour in enumerate(SERIES)}
"""Name of the page's variable for each colour that is drawn."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hedgemix",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.constrained_layout.use": True,
}
WIDTH = 4.4
"""Inches; 72 of SVG's points each."""
MOST_POINTS = 600
"""Of a line: more cannot be told apart, and would make a page of megabytes."""


def svg(figure: Figure) -> str:
    """Write the figure as an SVG element, as wide as what holds it."""
    held = io.StringIO()
    figure.savefig(held, format="svg", transparent=True, metadata={"Date": None})
    text = held.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in COLOURS.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    head, mark, rest = text.partition(">")
    return re.sub(r' (width|height)="[0-9.]+pt"', "", head) + mark + rest


def standalone_svg(drawn: str) -> str:
    """Turn an SVG element into a file that programs which know no variables can show, on white."""
    text = re.sub(r"var\(--\w+, (#[0-9a-f]{6})\)", r"\1", drawn)
    head, mark, rest = text.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head} style="background:#fff"{mark}{rest}'


def styled(draw: Callable[Inputs, Figure]) -> Callable[Inputs, str]:
    """Wrap a function that draws, to draw in STYLE and return SVG."""

    @wraps(draw)
    def drawn(*arguments: Inputs.args, **options: Inputs.kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            return svg(draw(*arguments, **options))

    return drawn


def drawing(height: float, rows: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """Make a figure with `rows` axes above each other that share x; height in inches."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)
    return figure, list(axes[:, 0])


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Add the legend below the axes: there it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.4, columnspacing=1.2)


def thinned(values: np.ndarray) -> np.ndarray:
    """Choose the indices of at most MOST_POINTS values, the first and the last among them."""
    return np.unique(np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int))


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Average each value with those before it, `span` in all, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - span, 0)
    return (sums[stop] - sums[start]) / (stop - start)


@styled
def training(logs: Mapping[int, list[dict[str, Any]]]) -> Figure:
    """Draw loss and learning rate against seconds of the training clock, a line a seed."""
    figure, (loss, rate) = drawing(3.3, 2, (2.6, 1))
    for colour, (seed, lines) in zip(colours(len(logs)), logs.items(), strict=True):
        seconds = np.array([line["elapsed_seconds"] for line in lines])
        nats = np.array([line["loss_nats"] for line in lines])
        kept = thinned(seconds)
        means = smooth(nats, max(1, len(nats) // 50))
        loss.plot(seconds[kept], means[kept], color=colour, label=f"seed {seed}")
        rate.plot(seconds[kept], np.array([line["matrix_rate"] for line in lines])[kept], color=colour)
    loss.set_ylabel("loss, nats a token")
    loss.set_ylim(*lower_part([line["loss_nats"] for lines in logs.values() for line in lines]))
    rate.set_ylabel("matrix rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("training seconds")
    legend(figure, loss, 4)
    return figure


def lower_part(values: Sequence[float]) -> tuple[float, float]:
    """Choose the limits of an axis that leave out the steep beginning."""
    low, high = np.quantile(values, (0.001, 0.95))
    return float(low - 0.05 * (high - low)), float(high + 0.15 * (high - low))


@styled
def running(stages: Mapping[str, np.ndarray], kilobytes: np.ndarray, seeds: int) -> Figure:
    """Draw bits per byte of the text so far under each stage: values (seeds, chunks)."""
    figure, (axes,) = drawing(3.2)
    for colour, (name, values) in zip(colours(len(stages)), stages.items(), strict=True):
        dashed = "--" if name.endswith("*") else "-"
        kept = thinned(kilobytes)
        axes.plot(kilobytes[kept], values.mean(0)[kept], dashed, color=colour, label=name)
        if seeds > 1:
            axes.fill_between(
                kilobytes[kept], values.min(0)[kept], values.max(0)[kept], color=colour, alpha=0.12, linewidth=0
            )
    axes.set_xlabel("text so far, kB")
    axes.set_ylabel("bits per byte so far")
    legend(figure, axes, 4)
    return figure


@styled
def weights(shares: Mapping[str, np.ndarray], kilobytes: np.ndarray, what: str) -> Figure:
    """Draw the weights (chunks,) of what is mixed, stacked to 1."""
    figure, (axes,) = drawing(2.7)
    kept = thinned(kilobytes)
    stacked = np.stack([values[kept] for values in shares.values()])
    axes.stackplot(kilobytes[kept], stacked, labels=list(shares), colors=colours(len(shares)), alpha=0.85)
    axes.set_xlim(kilobytes[0], kilobytes[-1])
    axes.set_ylim(0, 1)
    axes.set_xlabel("text so far, kB")
    axes.set_ylabel(what)
    legend(figure, axes, 4)
    return figure


@styled
def saved(groups: Sequence[str], bars: Mapping[str, Sequence[float]], below: str, beside: str) -> Figure:
    """Draw bits saved (above 0) and lost (below) in each group, a bar a stage."""
    figure, (axes,) = drawing(2.8)
    places, width = np.arange(len(groups)), 0.8 / len(bars)
    for n, (colour, (name, values)) in enumerate(zip(SERIES, bars.items(), strict=False)):
        axes.bar(places + (n - (len(bars) - 1) / 2) * width, values, width, color=colour, label=name)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_xticks(places, groups)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    legend(figure, axes, 4)
    return figure


@styled
def sorted_savings(stages: Mapping[str, np.ndarray]) -> Figure:
    """Draw bits per byte saved in each document, documents in the order of their saving."""
    figure, (axes,) = drawing(2.8)
    for colour, (name, values) in zip(SERIES, stages.items(), strict=False):
        ordered = np.sort(values)[::-1]
        share = 100 * (np.arange(len(ordered)) + 0.5) / len(ordered)
        kept = thinned(share)
        axes.plot(share[kept], ordered[kept], color=colour, label=name)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of documents, most helped first")
    axes.set_ylabel("bits per byte saved")
    legend(figure, axes, 4)
    return figure


@styled
def ladder(stages: Mapping[str, Sequence[float]]) -> Figure:
    """Draw bits per byte after each stage: a dot a seed, a bar at their mean."""
    figure, (axes,) = drawing(0.9 + 0.32 * len(stages))
    for place, values in enumerate(stages.values()):
        mean = float(np.mean(values))
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color=INK)
        axes.plot(values, [place] * len(values), "o", color=SERIES[0], markersize=4, alpha=0.7)
        axes.annotate(
            f"{mean:.4f}", (1.02, place), xycoords=("axes fraction", "data"), va="center", annotation_clip=False
        )
    axes.set_yticks(range(len(stages)), list(stages))
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("bits per byte, lower is better")
    return figure


@styled
def bars(parts: Mapping[str, float], below: str, form: str) -> Figure:
    """Draw amounts as bars from the left, with their figures."""
    figure, (axes,) = drawing(0.7 + 0.2 * len(parts))
    drawn = axes.barh(list(parts), list(parts.values()), color=SERIES[0], height=0.7)
    axes.bar_label(drawn, [format(value, form) for value in parts.values()], padding=3, fontsize=7)
    axes.margins(x=0.18, y=0.02)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(below)
    return figure


@styled
def budget(phases: Mapping[str, Sequence[float]], names: Sequence[str], limit: float) -> Figure:
    """Draw seconds of each phase, stacked, a bar a seed; a line at the limit where it is in sight."""
    figure, (axes,) = drawing(1.05 + 0.26 * len(names))
    left = np.zeros(len(names))
    for colour, (name, seconds) in zip(colours(len(phases)), phases.items(), strict=True):
        axes.barh(list(names), seconds, left=left, color=colour, height=0.65, label=name)
        left += np.asarray(seconds)
    if limit <= 2 * left.max():
        axes.axvline(limit, color=INK, linestyle="--", linewidth=1)
        axes.annotate("limit ", (limit, 1.0), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=7)
    axes.set_xlim(0, 1.04 * max(left.max(), limit if limit <= 2 * left.max() else 0))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds")
    legend(figure, axes, 4)
    return figure


def colours(count: int) -> list[str]:
    """List so many, the same again from the start where there are more than SERIES has."""
    return [SERIES[n % len(SERIES)] for n in range(count)]
