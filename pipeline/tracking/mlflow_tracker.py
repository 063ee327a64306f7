"""MLflow's runs, on a server or in a database in the runs folder."""

from __future__ import annotations

import logging
import os
import time
from typing import Any
from urllib.parse import urlsplit

from hedgemix.config import RecipeError
from pipeline.monitor.metrics import POSITION, ROW
from pipeline.storage.store import Storage
from pipeline.tracking.tracked_record import TrackedRecord
from pipeline.tracking.tracker import variable

EXPERIMENT = "hedgemix"
"""Where MLFLOW_EXPERIMENT_NAME names none."""
PARAMS_PER_REQUEST, METRICS_PER_REQUEST = 100, 1000
"""What MLflow takes at once."""


class MLflow:
    """Sends a seed's points in one request a flush."""

    def __init__(self, subject: TrackedRecord) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self.subject, self.Metric, self.Param, self.RunTag = subject, Metric, Param, RunTag
        self.client = mlflow_client(subject.storage)
        name = variable("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self.client.get_experiment_by_name(name)
        self.experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.identity = subject.identity()
        self.run_ids: dict[int, str] = {}
        self.last_position: dict[tuple[int, str], float] = {}
        self.unsent: dict[int, list[Any]] = {}

    def run_id(self, seed: int) -> str:
        """Return the id of the seed's run, which an earlier driver may have begun."""
        if seed in self.run_ids:
            return self.run_ids[seed]
        where = f"tags.`hedgemix.record_id` = '{self.identity}' and tags.seed = '{seed}'"
        if runs := self.client.search_runs([self.experiment_id], where, max_results=1):
            run_id = runs[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
            for stage, column in POSITION.items():
                history = self.client.get_metric_history(run_id, f"{stage}/{column}")
                self.last_position[seed, stage] = max((metric.step for metric in history), default=-1)
        else:
            tags = {"record": self.subject.record, "seed": str(seed), "hedgemix.record_id": self.identity}
            name = f"{self.subject.record} seed {seed}"
            run_id = self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
            params = [self.Param(name, value) for name, value in self.subject.settings().items()]
            for start in range(0, len(params), PARAMS_PER_REQUEST):
                self.client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
        self.run_ids[seed] = run_id
        return run_id

    def point(self, seed: int, stage: str, position: int, values: dict[str, float], at_seconds: float) -> None:
        """Hold the values until the next flush; a position that the run has already is left out."""
        self.run_id(seed)
        if position <= self.last_position.get((seed, stage), -1):
            return
        self.last_position[seed, stage] = position
        self.unsent.setdefault(seed, []).extend(
            self.Metric(f"{stage}/{name}", value, int(1000 * at_seconds), position) for name, value in values.items()
        )

    def row(self, seed: int, done: bool, values: dict[str, float]) -> None:
        """Send the row's values, and end the seed's run: FINISHED or FAILED."""
        self.run_id(seed)
        now_ms = int(1000 * time.time())
        self.unsent.setdefault(seed, []).extend(
            self.Metric(f"{ROW}/{name}", value, now_ms, 0) for name, value in values.items()
        )
        self.flush()
        self.client.set_terminated(self.run_ids.pop(seed), "FINISHED" if done else "FAILED")

    def flush(self) -> None:
        """Send what is held, in requests of METRICS_PER_REQUEST."""
        for seed in list(self.unsent):
            metrics = self.unsent.pop(seed)
            for start in range(0, len(metrics), METRICS_PER_REQUEST):
                self.client.log_batch(self.run_id(seed), metrics=metrics[start : start + METRICS_PER_REQUEST])

    def close(self) -> None:
        """End the runs of seeds without a row: KILLED."""
        for run_id in self.run_ids.values():
            self.client.set_terminated(run_id, "KILLED")


def mlflow_address(storage: Storage) -> str:
    """Return the address of the server that MLFLOW_TRACKING_URI names, else of a database in the runs folder."""
    return variable("MLFLOW_TRACKING_URI", f"sqlite:///{storage.root / '_mlflow.db'}")


def mlflow_client(storage: Storage) -> Any:
    """Make a client of the server or database that `mlflow_address` names."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they tell of each table they make
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=mlflow_address(storage))


def check_mlflow(storage: Storage) -> None:
    """Raise RecipeError when MLflow cannot work here, ImportError when it is not installed."""
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
        message = str(error).splitlines()[0].replace(address, "its address")
        raise RecipeError(f"--track mlflow, MLFLOW_TRACKING_URI: {message}") from None
