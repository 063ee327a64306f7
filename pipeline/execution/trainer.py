"""Ray Train's trainer without the processes that nobody asks for: each takes seconds of a core to start, every seed.

It overrides what Ray keeps to itself: should a later Ray call these otherwise, its own processes start again. It does
without TorchTrainer, which is this trainer with another default, because its import is torch's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import placement_group

from pipeline.execution.placement import remove_group
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


class NoBarrier:
    """Stands where Ray Train has an actor at which workers meet to report: ours report to the board."""

    def options(self, **_: Any) -> NoBarrier:
        """Ask for nothing."""
        return self

    remote = options


class Workers(WorkerGroup):
    """Starts workers with the environment that a Ray of our own gives every process, and nothing besides. Their place
    has the training's name: it outlives a controller that is no actor, and goes when the next of that name comes."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return {}

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        name, workers = self._train_run_context.run_config.name, worker_group_context.num_workers
        remove_group(name)
        bundles = [worker_group_context.resources_per_worker] * workers
        return DefaultPlacementGroupHandle(placement_group(bundles, worker_group_context.placement_strategy, name=name))

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[index] for name, values in train_context_args.items()},
                )
                for index, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class TrainControllerHere(TrainController):
    """Controls the training of a Ray of our own, in the process that asks for it."""

    worker_group_cls = Workers


def run_controller_here(**parts: Any) -> Any:
    """Control a training until its end, in this process, and return its result."""
    worker_group.SynchronizationActor = NoBarrier()
    state._shutdown_sync_actor = lambda barrier: None
    controller = TrainControllerHere(**parts)
    asyncio.run(controller.run())
    return controller.get_result()


class Trainer(DataParallelTrainer):
    """Trains with a process for its controller, one for its barrier and one a worker, and no manager of Ray datasets:
    ours are files. On a machine of our own (`alone`) there is no cleaner either, which would ask the dashboard that is
    not there for a lost controller once a second, and no coordinator of an autoscaler. On CPUs there, controller and
    barrier are no processes, and workers have no settings of their own, for which Ray would start each twice, but may
    be processes that wait. On a GPU they are new: one that was used before would keep the choice of its first GPU."""

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
        return run_controller_here(**parts)
