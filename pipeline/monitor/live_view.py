"""What a person watches: each seed's stage, progress, bits per byte and time left; of a study a line a variant.

On a terminal the view is redrawn in place, elsewhere (a job's log, CI) it is one plain line when a seed's stage changes
and one every `PLAIN_SECONDS` while it runs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 20.0
ENDED = ("done", "failed")
WIDEST_NAME = 26
"""Characters of a variant's name that a study's view shows, so that its line fits 80 columns."""


class View:
    """Draws seeds' states; `update` may be called often."""

    def __init__(self, console: Console) -> None:
        self.console, self.began = console, time.monotonic()
        self.states: dict[Any, dict[str, Any]] = {}
        self.printed: dict[Any, tuple[str, float]] = {}
        self.live = Live(console=console, refresh_per_second=4) if redraws(console) else None

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.update(self.table())
            self.live.stop()

    def update(self, states: Mapping[Any, dict[str, Any]]) -> None:
        """Show these seeds' states from now on; seeds not named keep theirs."""
        self.states |= states
        if self.live:
            self.live.update(self.table())
            return
        for name, state in self.states.items():
            stage, at = self.printed.get(name, ("", 0.0))
            now = time.monotonic()
            running = 0 < state.get("fraction", 0.0) < 1
            if state["stage"] != stage or (running and now - at >= PLAIN_SECONDS):
                self.printed[name] = (state["stage"], now)
                line = f"[{now - self.began:6.1f} s] {self.line(name, state)}".rstrip()
                self.console.print(line, markup=False, soft_wrap=True)

    def line(self, name: Any, state: dict[str, Any]) -> str:
        """Write a seed's state in a line."""
        detail = "  ".join(part for part in (percent(state), figures(state), left(state)) if part)
        return f"seed {name}: {state['stage']}  {detail}"

    def table(self) -> Table:
        """Draw the view: a line a seed."""
        table = Table(box=None, pad_edge=False)
        for heading in ("seed", "stage", "", "progress", "", "time left"):
            table.add_column(heading)
        for seed, state in self.states.items():
            bar = ProgressBar(total=1.0, completed=state.get("fraction", 0.0), width=24)
            table.add_row(str(seed), state["stage"], bar, percent(state), figures(state), left(state))
        return table


class StudyView(View):
    """Draws the state of each variant: how many of its seeds are done, the mean so far, and what is at work."""

    def __enter__(self) -> StudyView:
        super().__enter__()
        return self

    def update_seeds(self, variants: Mapping[str, dict[int, dict[str, Any]]]) -> None:
        """Show the states of these variants' seeds from now on."""
        self.update({name: of_variant(seeds) for name, seeds in variants.items()})

    def line(self, name: Any, state: dict[str, Any]) -> str:
        """Write a variant's state in a line."""
        detail = "  ".join(part for part in (figures(state), state["at_work"]) if part)
        return f"{name}: {state['stage']}  {detail}"

    def table(self) -> Table:
        """Draw the view: a line a variant."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("variant", "seeds", "bits/byte", "at work"):
            table.add_column(heading, no_wrap=True)
        for name, state in self.states.items():
            shown = name if len(name) <= WIDEST_NAME else name[: WIDEST_NAME - 1] + "…"
            mean = f"{state['bpb']:.4f}" if "bpb" in state else ""
            cells = (shown, state["stage"], mean, state["at_work"])
            table.add_row(*(Text(cell) for cell in cells))
        return table


def of_variant(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Sum up the states of a variant's seeds as a state of its own."""
    stages = Counter(state["stage"] for state in seeds.values())
    working = {seed: state for seed, state in seeds.items() if state["stage"] not in (*ENDED, "waiting")}
    bits = [state["bpb"] for state in seeds.values() if state["stage"] == "done"]
    counts = [f"{stages['done']}/{len(seeds)} done"]
    counts += [f"{stages['failed']} failed"] if stages["failed"] else []
    at_work = (f"{seed}: {state['stage']} {percent(state).strip()}".rstrip() for seed, state in working.items())
    mean = {"bpb": sum(bits) / len(bits)} if bits else {}
    part = sum(1.0 if state["stage"] in ENDED else 0.5 * (seed in working) for seed, state in seeds.items())
    return {"stage": ", ".join(counts), "at_work": ", ".join(at_work), "fraction": part / len(seeds), **mean}


def redraws(console: Console) -> bool:
    """Say whether lines can be drawn over; FORCE_COLOR makes no terminal of a job's log."""
    return console.is_terminal and console.file.isatty()


def percent(state: dict[str, Any]) -> str:
    """Write how much of the stage is done; empty where it does not tell."""
    return f"{100 * state['fraction']:3.0f} %" if "fraction" in state else ""


def figures(state: dict[str, Any]) -> str:
    """Write what the stage measures: bits per byte, or step, loss and speed of a training, else its detail."""
    if "bpb" in state:
        return f"{state['bpb']:.4f} bits/byte"
    if "loss_nats" in state:
        return f"step {state['step']}, {state['loss_nats']:.3f} nats/token, {state['tokens_per_second']:,.0f} tokens/s"
    return state.get("detail", "")


def left(state: dict[str, Any]) -> str:
    """Estimate the time left as minutes:seconds from the part that is done; empty before the first and after the
    last."""
    fraction, elapsed = state.get("fraction", 0.0), state.get("elapsed_seconds", 0.0)
    if not 0 < fraction < 1 or not elapsed:
        return ""
    seconds = int(elapsed / fraction * (1 - fraction))
    return f"{seconds // 60}:{seconds % 60:02d} left"
