"""Which of Ray Train's processes a training starts: those that Ray would start by itself but for the needless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from ray.exceptions import WorkerCrashedError
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, scaling_policy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipeline.execution import process_group, trainer
from pipeline.execution.trainer import Trainer
from support import tiny_record


def work() -> None:
    """Never called here."""


def callbacks(trainer: DataParallelTrainer) -> set[str]:
    return {type(callback).__name__ for callback in trainer._create_default_callbacks()}


@pytest.mark.parametrize(
    ("alone", "needless"),
    [(True, {"DatasetsCallback", "PlacementGroupCleanerCallback"}), (False, {"DatasetsCallback"})],
)
@pytest.mark.parametrize("use_gpu", [False, True])
def test_no_process_is_started_that_nobody_asks(
    monkeypatch: pytest.MonkeyPatch, alone: bool, needless: set[str], use_gpu: bool
) -> None:
    """Each of these is an actor; a coordinator of an autoscaler is started by who asks it first."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        DataParallelTrainer, "_initialize_and_run_controller", lambda self, **parts: given.update(parts)
    )
    monkeypatch.setattr(trainer, "run_controller_here", lambda **parts: given.update(parts, here=True))
    scaling = ScalingConfig(num_workers=2, use_gpu=use_gpu)
    plain, ours = DataParallelTrainer(work, scaling_config=scaling), Trainer(work, scaling_config=scaling, alone=alone)
    assert callbacks(plain) - callbacks(ours) == needless and callbacks(ours) < callbacks(plain)

    asked: list[str] = []
    monkeypatch.setattr(
        scaling_policy.TrainAutoscalingCoordinatorClient, "send_resource_request", lambda *_: asked.append("for more")
    )
    policy = FixedScalingPolicy(scaling)
    ours._initialize_and_run_controller(scaling_policy=policy, failure_policy="theirs")
    assert given["failure_policy"] == "theirs" and (given["scaling_policy"] is policy) == (not alone)
    given["scaling_policy"].after_controller_start(plain.train_run_context)
    decision = given["scaling_policy"].make_decision_for_non_running_worker_group()
    assert decision.num_workers == 2 and decision.resources_per_worker == {"GPU" if use_gpu else "CPU": 1}
    assert bool(asked) == (not alone)

    # On CPUs of a machine of our own the controller is no process of its own.
    assert given.get("here", False) == (alone and not use_gpu)


def test_a_controller_that_was_killed_leaves_the_machine_to_the_next(ray_session: None, tmp_path: Path) -> None:
    """It controls in the process of its task, which Ray does not clean up after as after an actor."""

    def kill_once(pid: int, mark: Path) -> int:
        if not mark.exists():
            mark.touch()
            os.kill(pid, signal.SIGKILL)
            time.sleep(60)
        return os.getpid()

    @ray.remote(num_cpus=0, max_retries=0)
    def fit(folder: Path) -> tuple[int, int]:
        """Train on every CPU; returns the processes of the controller and of the rank."""
        rank = partial(kill_once, os.getpid(), folder / "mark")
        cpus = {"CPU": ray.cluster_resources()["CPU"]}
        scaling = ScalingConfig(num_workers=1, resources_per_worker=cpus, placement_strategy="STRICT_PACK")
        config = RunConfig(name=f"train-{folder.name}", storage_path=str(folder))
        ours = Trainer(rank, alone=True, backend_config=trainer.Gloo(), scaling_config=scaling, run_config=config)
        return os.getpid(), ours.fit().return_value

    before = set(ray._private.state.actors())
    with pytest.raises(WorkerCrashedError):
        ray.get(fit.remote(tmp_path))
    controller, rank = ray.get(fit.remote(tmp_path), timeout=60)
    assert controller != rank
    started = [actor["ActorClassName"] for key, actor in ray._private.state.actors().items() if key not in before]
    assert started == ["RayTrainWorker"] * 2


def test_a_worker_on_a_machine_of_our_own_has_no_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives them to it that it has in its environment already."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    group, theirs = trainer.TrainControllerHere.worker_group_cls, TrainController.worker_group_cls
    assert theirs._get_worker_runtime_env({})["env_vars"]["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"
    assert group._get_worker_runtime_env({}) == {}


def test_the_controller_of_a_training_on_cpus_has_no_need_of_torch() -> None:
    """It costs two seconds of a core, every seed."""
    asked = "import sys; from pipeline.execution.trainer import Gloo; Gloo(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", asked], check=True, cwd=tiny_record.ROOT)


def test_workers_join_over_gloo_and_one_alone_has_nobody_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    group = MagicMock(**{"execute_single.return_value": "10.0.0.1:29500", "__len__.return_value": 2})
    trainer.GlooBackend().on_start(group, trainer.Gloo())
    assert [call.args for call in group.execute_single_async.call_args_list] == [
        (rank, process_group.join, "10.0.0.1:29500", "gloo", rank, 2) for rank in range(2)
    ]
    alone = MagicMock(**{"__len__.return_value": 1})
    trainer.GlooBackend().on_start(alone, trainer.Gloo())
    assert not alone.execute_single.called and not alone.execute_single_async.called
