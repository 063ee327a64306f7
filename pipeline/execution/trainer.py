"""Ray Train's trainer without the processes that nobody asks for: each takes seconds of a core to start, every seed.

It overrides what Ray keeps to itself: should a later Ray call these otherwise, its own processes start again. It does
without TorchTrainer, which is this trainer with another default, because its import is torch's.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipeline.execution.process_group import free_address, join


class GlooBackend(Backend):
    """Joins Ray Train's workers over gloo. They leave the group as their processes end."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Have every worker join; one alone has nobody to join."""
        if (ranks := len(worker_group)) > 1:
            address = worker_group.execute_single(0, free_address)
            joining = [
                worker_group.execute_single_async(rank, join, address, "gloo", rank, ranks) for rank in range(ranks)
            ]
            ray.get(joining)


class Gloo(BackendConfig):
    """Configures a training on CPUs, as TorchConfig does one on GPUs."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return what joins the workers."""
        return GlooBackend


class ThisMachine(FixedScalingPolicy):
    """Takes the machine as it is: a Ray of our own has no autoscaler to ask for more."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Ask for nothing, so that no coordinator of requests is started."""

    def _maybe_send_resource_request(self) -> None:
        """Ask for nothing."""


class Workers(WorkerGroup):
    """Starts workers with the environment that a Ray of our own gives every process, and nothing besides."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return {}


class TrainControllerHere(TrainController):
    """Controls the training of a Ray of our own."""

    worker_group_cls = Workers


class Trainer(DataParallelTrainer):
    """Trains with a process for its controller, one for its barrier and one a worker, and no manager of Ray datasets:
    ours are files. On a machine of our own (`alone`) there is no cleaner either, which would ask the dashboard that is
    not there for a lost controller once a second, and no coordinator of an autoscaler. On CPUs there, its processes
    have no settings of their own, for which Ray would start each twice, but may be ones that wait. On a GPU they are
    new: one that was used before would keep the choice of its first GPU."""

    def __init__(self, *arguments: Any, alone: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.alone = alone

    def _create_default_callbacks(self) -> list[Any]:
        needless = (DatasetsCallback, PlacementGroupCleanerCallback) if self.alone else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, needless)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.alone:
            parts["scaling_policy"] = ThisMachine(self.scaling_config)
        if not self.alone or self.scaling_config.use_gpu:
            return super()._initialize_and_run_controller(**parts)
        controller = ray.remote(num_cpus=0)(TrainControllerHere).remote(**parts)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
