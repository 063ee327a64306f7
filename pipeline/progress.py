"""What a person watches: each seed's stage, progress, bits per byte and time left.

Workers send records to one board actor, which sets Ray's metrics by them; the driver polls it. On a terminal the view
is redrawn in place, elsewhere (a job's log, CI) it is one plain line when a seed's stage changes and one every
`PLAIN_SECONDS` while it runs.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from pipeline.gauges import Gauges
from pipeline.measures import ROW, measured

PLAIN_SECONDS = 20.0
UNREAD = 10_000
"""Records the board keeps for a driver that does not ask; the oldest go first."""


@dataclass(frozen=True)
class Told:
    """A progress record as it came to the board."""

    at_ns: int
    """When, by the board's clock; no two are equal."""
    seed: int
    stage: str
    record: dict[str, Any]


class Board:
    """The last record of every seed, and those that the driver has not read."""

    def __init__(self, record: str, meanings: dict[str, str]) -> None:
        self.seeds: dict[int, dict[str, Any]] = {}
        self.told: deque[Told] = deque(maxlen=UNREAD)
        self.at_ns = 0
        self.gauges = Gauges(record, meanings)

    def put(self, seed: int, stage: str, record: dict[str, Any]) -> None:
        self.seeds[seed] = {"stage": stage, **record}
        self.at_ns = max(self.at_ns + 1, time.time_ns())
        self.told.append(Told(self.at_ns, seed, stage, record))
        self.gauges.set(seed, stage, measured(stage, record))

    def row(self, seed: int, values: dict[str, float]) -> None:
        """What the seed's row holds by now."""
        self.gauges.set(seed, ROW, values)

    def read(self, after_ns: int = 0) -> tuple[dict[int, dict[str, Any]], list[Told]]:
        """The last record of every seed, and all that came after this time; earlier ones are forgotten. An answer
        that is lost on its way is given again."""
        while self.told and self.told[0].at_ns <= after_ns:
            self.told.popleft()
        return self.seeds, list(self.told)


BoardActor = ray.remote(num_cpus=0, max_restarts=-1, resources={"node:__internal_head__": 0.001})(Board)


class View:
    """Draws seeds' states; `update` may be called often."""

    def __init__(self, seeds: tuple[int, ...], console: Console) -> None:
        self.console, self.began = console, time.monotonic()
        self.states: dict[int, dict[str, Any]] = {seed: {"stage": "waiting"} for seed in seeds}
        self.printed: dict[int, tuple[str, float]] = {}
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> View:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.update(self.table())
            self.live.stop()

    def update(self, states: dict[int, dict[str, Any]]) -> None:
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
        table = Table(box=None, pad_edge=False)
        for heading in ("seed", "stage", "", "progress", "", "time left"):
            table.add_column(heading)
        for seed, state in self.states.items():
            bar = ProgressBar(total=1.0, completed=state.get("fraction", 0.0), width=24)
            table.add_row(str(seed), state["stage"], bar, percent(state), figures(state), left(state))
        return table


def percent(state: dict[str, Any]) -> str:
    return f"{100 * state['fraction']:3.0f} %" if "fraction" in state else ""


def figures(state: dict[str, Any]) -> str:
    if "bpb" in state:
        return f"{state['bpb']:.4f} bits/byte"
    if "loss_nats" in state:
        return f"step {state['step']}, {state['loss_nats']:.3f} nats/token, {state['tokens_per_second']:,.0f} tokens/s"
    return state.get("detail", "")


def left(state: dict[str, Any]) -> str:
    fraction, elapsed = state.get("fraction", 0.0), state.get("elapsed_seconds", 0.0)
    if not 0 < fraction < 1 or not elapsed:
        return ""
    seconds = int(elapsed / fraction * (1 - fraction))
    return f"{seconds // 60}:{seconds % 60:02d} left"
