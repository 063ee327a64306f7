"""Which of Ray Train's processes a training starts: those that Ray would start by itself but for the needless."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, scaling_policy

from pipeline.execution.trainer import Trainer


def work() -> None:
    """Never called here."""


def callbacks(trainer: TorchTrainer) -> set[str]:
    return {type(callback).__name__ for callback in trainer._create_default_callbacks()}


@pytest.mark.parametrize(
    ("alone", "needless"),
    [(True, {"DatasetsCallback", "PlacementGroupCleanerCallback"}), (False, {"DatasetsCallback"})],
)
def test_no_process_is_started_that_nobody_asks(
    monkeypatch: pytest.MonkeyPatch, alone: bool, needless: set[str]
) -> None:
    """Each of these is an actor; a coordinator of an autoscaler is started by who asks it first."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda self, **parts: given.update(parts))
    scaling = ScalingConfig(num_workers=2)
    plain, ours = TorchTrainer(work, scaling_config=scaling), Trainer(work, scaling_config=scaling, alone=alone)
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
    assert decision.num_workers == 2 and decision.resources_per_worker == {"CPU": 1}
    assert bool(asked) == (not alone)
