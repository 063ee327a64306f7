"""TensorBoard, MLflow and Weights & Biases as trackers: a seed is a run, tags are `<stage>/<column>`.

Each package is imported when it is asked for. Where MLflow and W&B write, and with what credentials, their own
environment variables say. The same command goes on with a killed driver's runs, and work that is done again does not
stand twice: TensorBoard drops what it has of it, the others, which take no point back, are not told again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hedgemix.config import RecipeError, to_dict
from pipeline.metrics import POSITION, ROW
from pipeline.storage import Storage
from pipeline.tracked_record import TrackedRecord
from pipeline.tracker import Tracker, variable

PROJECT = "hedgemix"
"""MLflow's experiment and W&B's project, where the environment names none."""
PUSH_SECONDS = 60.0
"""How often event files go to an object store."""
MLFLOW_AT_ONCE = 100
"""Parameters of a request; metrics may be a thousand."""


class TensorBoard:
    """Event files under the record's folder, by seed and stage; `tensorboard --logdir` of the runs folder shows all."""

    def __init__(self, subject: TrackedRecord) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.summary, self.EventsWriter, self.Event = summary, EventsWriter, Event
        self.start = SessionLog(status=SessionLog.START)
        self.subject, self.folder = subject, subject.folder / "tensorboard"
        self.writers: dict[tuple[int, str], Any] = {}
        self.last: dict[tuple[int, str], int] = {}
        self.unflushed: set[tuple[int, str]] = set()
        self.pushed = time.monotonic()

    def stage_folder(self, seed: int, stage: str) -> Path:
        return self.folder / f"seed{seed}" / stage

    def writer(self, seed: int, stage: str, position: int) -> Any:
        """The stage's file. Readers drop what stands at this position and after when it does not go on from there."""
        place = (seed, stage)
        if place not in self.writers:
            folder, root = self.stage_folder(seed, stage), self.subject.storage.root.resolve()
            if not folder.resolve().is_relative_to(root):
                raise ValueError(f"{folder} leads out of {root} by a link")
            folder.mkdir(parents=True, exist_ok=True)
            # Two files of one second would have one name; they are read in the order of names.
            self.writers[place] = self.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if position <= self.last.get(place, position):
            self.writers[place].write_event(self.Event(step=position, wall_time=time.time(), session_log=self.start))
        self.last[place] = position
        self.unflushed.add(place)
        return self.writers[place]

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        writer = self.writer(seed, stage, position)
        for name, value in values.items():
            told = self.summary.scalar(f"{stage}/{name}", value)
            writer.write_event(self.Event(step=position, wall_time=at_seconds, summary=told))

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        self.point(seed, ROW, 0, values, time.time())
        recipe = self.summary.text("recipe", f"```json\n{json.dumps(to_dict(self.subject.recipe), indent=1)}\n```")
        self.writers[seed, ROW].write_event(self.Event(step=0, wall_time=time.time(), summary=recipe))

    def flush(self) -> None:
        for place in self.unflushed:
            self.writers[place].flush()
        self.unflushed = set()
        if time.monotonic() - self.pushed > PUSH_SECONDS:
            with contextlib.suppress(OSError):  # the next time takes them too
                self.push()

    def push(self) -> None:
        """To an object store, if that is where the runs folder lies."""
        self.pushed = time.monotonic()
        if self.subject.storage.remote:
            for place in self.writers:
                for file in self.stage_folder(*place).glob("events.*"):
                    self.subject.storage.push(file)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.push()


class MLflow:
    """Points go out in one request a seed and flush."""

    def __init__(self, subject: TrackedRecord) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self.subject, self.Metric, self.Param, self.RunTag = subject, Metric, Param, RunTag
        self.client = mlflow_client(subject.storage)
        name = variable("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        self.experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.identity = subject.identity()
        self.runs: dict[int, str] = {}
        self.last: dict[tuple[int, str], float] = {}
        self.waiting: dict[int, list[Any]] = {}

    def run(self, seed: int) -> str:
        """The id of the seed's run, which an earlier driver may have begun."""
        if seed in self.runs:
            return self.runs[seed]
        where = f"tags.`hedgemix.record_id` = '{self.identity}' and tags.seed = '{seed}'"
        if found := self.client.search_runs([self.experiment], where, max_results=1):
            run = found[0].info.run_id
            self.client.update_run(run, status="RUNNING")
            for stage, column in POSITION.items():
                history = self.client.get_metric_history(run, f"{stage}/{column}")
                self.last[seed, stage] = max((metric.step for metric in history), default=-1)
        else:
            tags = {"record": self.subject.record, "seed": str(seed), "hedgemix.record_id": self.identity}
            name = f"{self.subject.record} seed {seed}"
            run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
            params = [self.Param(name, value) for name, value in self.subject.settings().items()]
            for start in range(0, len(params), MLFLOW_AT_ONCE):
                self.client.log_batch(run, params=params[start : start + MLFLOW_AT_ONCE])
        self.runs[seed] = run
        return run

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        self.run(seed)
        if position <= self.last.get((seed, stage), -1):
            return
        self.last[seed, stage] = position
        self.waiting.setdefault(seed, []).extend(
            self.Metric(f"{stage}/{name}", value, int(1000 * at_seconds), position) for name, value in values.items()
        )

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        self.run(seed)
        now = int(1000 * time.time())
        self.waiting.setdefault(seed, []).extend(
            self.Metric(f"{ROW}/{name}", value, now, 0) for name, value in values.items()
        )
        self.flush()
        self.client.set_terminated(self.runs.pop(seed), "FINISHED" if done else "FAILED")

    def flush(self) -> None:
        for seed in list(self.waiting):
            metrics = self.waiting.pop(seed)
            for start in range(0, len(metrics), 1000):
                self.client.log_batch(self.run(seed), metrics=metrics[start : start + 1000])

    def close(self) -> None:
        for run in self.runs.values():
            self.client.set_terminated(run, "KILLED")


def mlflow_address(storage: Storage) -> str:
    """The server that MLFLOW_TRACKING_URI names, else a database in the runs folder."""
    return variable("MLFLOW_TRACKING_URI", f"sqlite:///{storage.root / '_mlflow.db'}")


def mlflow_client(storage: Storage) -> Any:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they tell of each table they make
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=mlflow_address(storage))


def check_mlflow(storage: Storage) -> None:
    from mlflow.exceptions import MlflowException

    if storage.remote and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise RecipeError(
            "--track mlflow keeps a database in the runs folder, which an object store cannot hold; set "
            "MLFLOW_TRACKING_URI to a server's address"
        )
    address = mlflow_address(storage)
    if urlsplit(address).scheme in ("http", "https") and "@" in address:
        raise RecipeError(
            "MLFLOW_TRACKING_URI has a user or a key before an @, which MLflow repeats in messages; give them by "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    try:
        mlflow_client(storage)
    except MlflowException as error:
        told = str(error).splitlines()[0].replace(address, "its address")
        raise RecipeError(f"--track mlflow, MLFLOW_TRACKING_URI: {told}") from None


class Wandb:
    """Runs of one group. Offline they lie in the record's folder, for `wandb sync`, one a seed and driver: nothing
    tells there what an earlier one holds."""

    def __init__(self, subject: TrackedRecord) -> None:
        import wandb

        self.subject, self.wandb = subject, wandb
        own = f"-{secrets.token_hex(4)}" if offline() else ""
        self.identity = f"{subject.identity()}{own}"
        self.runs: dict[int, Any] = {}
        self.last: dict[tuple[int, str], float] = {}

    def run(self, seed: int) -> Any:
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
                self.last[seed, stage] = run.summary.get(f"{stage}/{column}", -1)
            self.runs[seed] = run
        return self.runs[seed]

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        run = self.run(seed)
        if position > self.last.get((seed, stage), -1):
            self.last[seed, stage] = position
            run.log({f"{stage}/{name}": value for name, value in values.items()})

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        run = self.run(seed)
        run.summary.update({f"{ROW}/{name}": value for name, value in values.items()})
        self.runs.pop(seed).finish(exit_code=0 if done else 1)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        for run in self.runs.values():
            run.finish(exit_code=255)
        self.wandb.teardown()  # waits for its process, whose files are not whole before


def offline() -> bool:
    import wandb

    return wandb.setup().settings.mode not in ("online", "shared")


def check_wandb(storage: Storage) -> None:
    import wandb

    if not offline() and not wandb.login(prompt=False):
        raise RecipeError("--track wandb finds no key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline")


SERVICES: dict[str, Callable[[TrackedRecord], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": Wandb}
USABLE: dict[str, Callable[[Storage], None]] = {"mlflow": check_mlflow, "wandb": check_wandb}
