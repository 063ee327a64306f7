"""The retry policy: which errors are worth another try, how often one is granted and after how long."""

from __future__ import annotations

import errno
from types import MappingProxyType
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from hedgemix.config import ComputeConfig, RecipeError
from hedgemix.train.step_log import DivergedError
from pipeline.execution import failures
from pipeline.execution.failures import Fail, Repair, Restarts, Retry, classify
from pipeline.steps.step import DamagedStepError

DAMAGED = DamagedStepError("quantize-0a", "artifact.hmx is gone")


class WorkerGroupError(RuntimeError):
    """As Ray Train's when it gave up: it has started the workers again as often as it may."""

    worker_failures = MappingProxyType({0: OSError(errno.ENOSPC, "disk full")})


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (WorkerCrashedError(), Retry),  # quantization or scoring killed
        (ActorDiedError(), Retry),  # an evaluating rank, or Ray Train's controller, killed
        (NodeDiedError("a machine was removed"), Retry),
        (LocalRayletDiedError(), Retry),
        (OutOfMemoryError("Ray killed the process to save its node"), Retry),
        (ObjectLostError("ffff", None, ""), Retry),
        (GetTimeoutError(), Retry),
        (ConnectionError("a rank was lost: rank 1"), Retry),
        (OSError(errno.ENOSPC, "disk full"), Retry),
        (OSError(errno.EIO, "disk error"), Retry),
        (FileNotFoundError("weights.pt"), Retry),
        (TimeoutError("the store is silent"), Retry),
        (DAMAGED, Repair),
        (RecipeError("train.steps"), Fail),
        (DivergedError("loss is nan"), Fail),
        (ValueError("a link in a step's folder"), Fail),
        (RuntimeError("what a training worker returned"), Fail),
        (WorkerGroupError("3 failures"), Fail),
        (MemoryError(), Fail),
        (TaskCancelledError(), Fail),
        (RayTaskError("f", "its cause could not be pickled", RuntimeError("?")), Fail),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.__name__,
)
def test_every_error_has_one_verdict_however_deep_it_lies_in_tasks(error: Any, verdict: type) -> None:
    below = RayTaskError("inner", "frames", error)
    for shown in (error, below, RayTaskError("outer", "frames", below)):
        assert type(classify(shown)) is verdict


def test_a_repair_names_the_damaged_step() -> None:
    verdict = classify(RayTaskError("evaluate", "frames", DAMAGED))
    assert isinstance(verdict, Repair) and verdict.damaged.step == "quantize-0a"


def test_a_step_is_granted_its_restarts_after_rests_that_double(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(failures.time, "monotonic", lambda: now)
    restarts, place, rests = Restarts(3), "evaluate-7", []
    assert restarts.rested(place)
    while restarts.grant(place):
        began = now
        while not restarts.rested(place):
            now += 0.5
        rests.append(now - began)
    assert rests == [1.0, 2.0, 4.0]
    assert restarts.rested("score-7") and restarts.grant("score-7")  # each step has its own
    assert not Restarts(0).grant(place)


def test_what_training_returns_instead_of_raising_is_no_loss() -> None:
    """Ray Train starts again whatever a worker raises."""
    for mistake in (DivergedError("nan"), ValueError("a link"), RecipeError("train.steps")):
        assert isinstance(mistake, failures.MISTAKES) and isinstance(classify(mistake), Fail)
    for loss in (OSError(errno.EIO, "disk error"), ConnectionError("the other rank"), DAMAGED):
        assert not isinstance(loss, failures.MISTAKES)


def test_ray_train_restarts_as_often_as_the_recipe_says() -> None:
    from ray.train import FailureConfig

    config = FailureConfig(**failures.ray_train_restarts(ComputeConfig(max_restarts=5)))
    assert (config.max_failures, config.max_preemption_failures) == (5, 5)
