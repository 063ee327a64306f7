"""What a person watches: each seed's stage, progress, bits per byte and time left.

On a terminal the view is redrawn in place, elsewhere (a job's log, CI) it is one plain line when a seed's stage changes
and one every `PLAIN_SECONDS` while it runs.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

PLAIN_SECONDS = 20.0


class View:
    """Draws seeds' states; `update` may be called often."""

    def __init__(self, seeds: tuple[int, ...], console: Console) -> None:
        self.console, self.began = console, time.monotonic()
        self.states: dict[int, dict[str, Any]] = {seed: {"stage": "waiting"} for seed in seeds}
        self.printed: dict[int, tuple[str, float]] = {}
        self.live = Live(console=console, refresh_per_second=4) if redraws(console) else None

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.update(self.table())
            self.live.stop()

    def update(self, states: dict[int, dict[str, Any]]) -> None:
        """Show these seeds' states from now on; seeds not named keep theirs."""
        self.states |= states
        if self.live:
            self.live.update(self.table())
            return
        for seed, state in self.states.items():
            stage, at = self.printed.get(seed, ("", 0.0))
            now = time.monotonic()
            running = 0 < state.get("fraction", 0.0) < 1
            if state["stage"] != stage or (running and now - at >= PLAIN_SECONDS):
                self.printed[seed] = (state["stage"], now)
                detail = "  ".join(part for part in (percent(state), figures(state), left(state)) if part)
                line = f"[{now - self.began:6.1f} s] seed {seed}: {state['stage']}  {detail}".rstrip()
                self.console.print(line, markup=False, soft_wrap=True)

    def table(self) -> Table:
        """Draw the view: a line a seed."""
        table = Table(box=None, pad_edge=False)
        for heading in ("seed", "stage", "", "progress", "", "time left"):
            table.add_column(heading)
        for seed, state in self.states.items():
            bar = ProgressBar(total=1.0, completed=state.get("fraction", 0.0), width=24)
            table.add_row(str(seed), state["stage"], bar, percent(state), figures(state), left(state))
        return table


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
