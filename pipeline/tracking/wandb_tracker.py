"""Weights & Biases' runs, online or in files for `wandb sync`."""

from __future__ import annotations

import os
import secrets
from typing import Any

from hedgemix.config import RecipeError, to_dict
from pipeline.monitor.metrics import POSITION, ROW
from pipeline.storage.store import Storage
from pipeline.tracking.tracked_record import TrackedRecord
from pipeline.tracking.tracker import variable

PROJECT = "hedgemix"
"""Where WANDB_PROJECT names none."""


class Wandb:
    """Begins runs of one group. Offline they lie in the record's folder, for `wandb sync`, one a seed and driver:
    nothing tells there what an earlier one holds."""

    def __init__(self, subject: TrackedRecord) -> None:
        import wandb

        self.subject, self.wandb = subject, wandb
        driver = f"-{secrets.token_hex(4)}" if offline() else ""
        self.identity = f"{subject.identity()}{driver}"
        self.runs: dict[int, Any] = {}
        self.last_position: dict[tuple[int, str], float] = {}

    def run(self, seed: int) -> Any:
        """Return the seed's run, which the first call begins or, online, resumes."""
        if seed not in self.runs:
            self.subject.folder.mkdir(parents=True, exist_ok=True)
            run = self.wandb.init(
                project=variable("WANDB_PROJECT", PROJECT),
                group=self.subject.record,
                name=f"{self.subject.record} seed {seed}",
                id=f"{self.identity}-seed{seed}",
                resume="allow",
                config=to_dict(self.subject.recipe) | {"seed": seed},
                dir=os.environ.get("WANDB_DIR") or str(self.subject.folder),
                reinit="create_new",
                # It would look at this process: its output, its command line, its repository, its machine.
                settings=self.wandb.Settings(
                    console="off", disable_git=True, save_code=False, silent=True, x_disable_meta=True,
                    x_disable_stats=True, x_save_requirements=False,
                ),
            )  # fmt: skip
            for stage, column in POSITION.items():
                run.define_metric(f"{stage}/{column}")
                run.define_metric(f"{stage}/*", step_metric=f"{stage}/{column}")
                self.last_position[seed, stage] = run.summary.get(f"{stage}/{column}", -1)
            self.runs[seed] = run
        return self.runs[seed]

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        """Log the values; a position that the run has already is left out."""
        run = self.run(seed)
        if position > self.last_position.get((seed, stage), -1):
            self.last_position[seed, stage] = position
            run.log({f"{stage}/{name}": value for name, value in values.items()})

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        """Write the row's values into the run's summary, and finish it with exit code 0 or 1."""
        run = self.run(seed)
        run.summary.update({f"{ROW}/{name}": value for name, value in values.items()})
        self.runs.pop(seed).finish(exit_code=0 if done else 1)

    def flush(self) -> None:
        """Do nothing: it sends by itself."""

    def close(self) -> None:
        """Finish the runs of seeds without a row with exit code 255, and wait for W&B's process."""
        for run in self.runs.values():
            run.finish(exit_code=255)
        self.wandb.teardown()  # waits for its process, whose files are not whole before


def offline() -> bool:
    """Say whether its own settings keep it from sending; it reads the environment once a process."""
    import wandb

    return wandb.setup().settings.mode not in ("online", "shared")


def check_wandb(storage: Storage) -> None:
    """Raise RecipeError when W&B has no key and is not offline, ImportError when it is not installed."""
    import wandb

    if not offline() and not wandb.login(prompt=False):
        raise RecipeError("--track wandb finds no key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline")
