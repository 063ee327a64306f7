"""TensorBoard, MLflow and Weights & Biases as trackers: a seed is a run, tags are `<stage>/<column>`.

Each has a file of its own, which imports the package only when the tracker is checked or made. Where MLflow and W&B
write, and with what credentials, their own environment variables say. The same command goes on with a killed driver's
runs, and work that is done again does not stand twice: TensorBoard drops what it has of it, the others, which take no
point back, are not told again.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.storage.store import Storage
from pipeline.tracking.mlflow_tracker import MLflow, check_mlflow
from pipeline.tracking.tensorboard_tracker import TensorBoard
from pipeline.tracking.tracked_record import TrackedRecord
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.wandb_tracker import Wandb, check_wandb

SERVICES: dict[str, Callable[[TrackedRecord], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": Wandb}
"""What --track may name. A new tracker: one file, one line here."""
USABLE: dict[str, Callable[[Storage], None]] = {"mlflow": check_mlflow, "wandb": check_wandb}
"""What raises RecipeError for a tracker that cannot work here, before anything starts."""
