"""Two real processes do what one does: the number of ranks changes the speed, not the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hedgemix.data.dataset import Dataset
from hedgemix.model.transformer import Model
from hedgemix.runtime import collectives
from hedgemix.runtime.files import load_tensors, save_tensors
from hedgemix.train import trainer
from pipeline.execution.rank_group import Gang, Rank
from support import rank_processes
from tests.hedgemix.train.test_trainer import CPU, Clock, Killed, lines, recipe, weights, write_data

# Compared with one rank, up to rounding, so without late QAT: a weight between two levels would make that 1e-4.
FIXED = recipe(steps=20, warmup_steps=2, microbatch_sequences=3, calibration_sequences=7, checkpoint_seconds=5)
# Lines of the log are added up over the ranks, here at checkpoints only: a rank that saves alone waits for ever.
TIMED = recipe(
    steps=0, budget_seconds=3, reserve_seconds=1, checkpoint_seconds=0.3, log_every_steps=1000, late_qat=True
)


class OwnClock:
    """Moves on by `pace` seconds each time it is read."""

    def __init__(self, pace: float) -> None:
        self.seconds, self.pace = 0.0, pace

    def __call__(self) -> float:
        self.seconds += self.pace
        return self.seconds


def run(folder: Path, data: Dataset, chosen: Any, clock: OwnClock | None = None) -> dict[str, Any]:
    """Train; returns the result and this rank's own weights at the end."""
    held: list[Tensor] = []
    calibrate = trainer.calibrate

    def watched(model: Model, *rest: Any) -> Any:
        held.extend(parameter.detach().clone() for parameter in model.parameters())
        return calibrate(model, *rest)

    trainer.calibrate = watched
    try:
        result = trainer.train(chosen, data, 7, folder, CPU, now=clock or Clock())
    finally:
        trainer.calibrate = calibrate
    return {"result": asdict(result), "weights": held}


def work(rank: int, folder: Path, data: Dataset) -> None:
    """All that the tests below look at, done by one of two ranks."""
    torch.set_num_threads(1)
    meeting, limit = f"file://{folder}/meeting", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    try:
        found: dict[str, Any] = {"told": collectives.Agreement()(rank + 1 / 3, 1e-300 * (rank + 1))}
        found["fixed"] = run(folder / "fixed", data, FIXED)
        found["resumed"] = run(folder / "resumed", data, FIXED)
        # Rank 1's clock has run out before it is read twice, and shows another time when the run begins.
        found["timed"] = run(folder / "timed", data, TIMED, OwnClock(5.0 if rank else 0.02))
        save_tensors(folder / f"rank{rank}.pt", found)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, threads = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    data = write_data(folder)
    torch.set_num_threads(1)
    run(folder / "one", data, FIXED)
    clock = Clock(kill_after_step=13)
    with pytest.raises(Killed):
        trainer.train(FIXED, data, 7, folder / "resumed", CPU, log=clock.tick, now=clock)
    torch.set_num_threads(threads)
    rank_processes.run(work, (folder, data))
    yield folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return [load_tensors(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("rank", "gpus", "visible", "index"),
    [(0, 1, 1, 0), (5, 1, 1, 0), (5, 1, 8, 5), (5, 0, 8, None), (0, 0.5, 1, 0), (3, 2, 2, 1), (3, 1, 0, None)],
)
def test_each_rank_has_a_gpu_of_those_it_sees(rank: int, gpus: float, visible: int, index: int | None) -> None:
    assert collectives.device_index(rank, gpus, visible) == index


@pytest.mark.parametrize(("gpus", "chosen", "bound"), [(1, [5], torch.device("cuda", 5)), (0, [], None)])
def test_a_gangs_rank_chooses_its_gpu_before_it_joins(
    monkeypatch: pytest.MonkeyPatch, gpus: int, chosen: list[int], bound: torch.device | None
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: told.append(options["device_id"]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: told.append("left"))
    found = Rank().run(5, Gang("g", 8, 1, gpus, collectives.backend(gpus)), "localhost:1", lambda x: x + 1, (1,))
    assert found == 2 and told == [*chosen, bound, "left"]


@pytest.mark.parametrize(("backend", "ids"), [("nccl", [3]), ("gloo", None)])
def test_a_barrier_names_its_gpu(monkeypatch: pytest.MonkeyPatch, backend: str, ids: list[int] | None) -> None:
    told: list[Any] = []
    monkeypatch.setattr(collectives, "active", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "barrier", lambda device_ids: told.append(device_ids))
    collectives.barrier()
    assert told == [ids]


def test_rank_0_decides_numbers(both: list[dict[str, Any]]) -> None:
    assert both[0]["told"] == both[1]["told"] == [1 / 3, 1e-300]


@pytest.mark.parametrize("name", ["fixed", "resumed"])
def test_two_ranks_train_as_one(folder: Path, name: str) -> None:
    """Measured, relative: 2e-7 in a step's loss, 3e-6 in the norm of a weight, 1e-6 in that of a moment."""
    one, two = lines(folder / "one"), lines(folder / name)
    assert [line["step"] for line in two] == list(range(1, 21))
    assert [line["loss_nats"] for line in two] == pytest.approx([line["loss_nats"] for line in one], rel=2e-6)
    moments, expected = (load_tensors(folder / run / "moments.pt") for run in (name, "one"))
    pairs = [(weights(folder / name), weights(folder / "one"))]
    pairs += [(moments[part], expected[part]) for part in ("columns", "rows")]
    for found, wanted in pairs:
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] - value).norm() <= 2e-5 * value.norm(), key


def test_two_ranks_go_on_from_what_one_rank_saved(folder: Path, both: list[dict[str, Any]]) -> None:
    losses = [[line["loss_nats"] for line in lines(folder / name)] for name in ("one", "resumed")]
    assert losses[0][:11] == losses[1][:11]
    assert both[0]["resumed"]["result"]["restarts"] == 1


@pytest.mark.parametrize("name", ["fixed", "resumed", "timed"])
def test_ranks_hold_the_same_bits(folder: Path, both: list[dict[str, Any]], name: str) -> None:
    mine, others = (found[name]["weights"] for found in both)
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    written = weights(folder / name).values()
    assert all(torch.equal(a, b) for a, b in zip(mine, written, strict=True))


def test_rank_0s_clock_ends_the_run_on_every_rank(folder: Path, both: list[dict[str, Any]]) -> None:
    steps = [found["timed"]["result"]["steps"] for found in both]
    assert steps[0] == steps[1] == len(lines(folder / "timed")) > 10
    assert both[0]["timed"]["result"]["qat_steps"] == both[1]["timed"]["result"]["qat_steps"] > 0
    elapsed = [line["elapsed_seconds"] for line in lines(folder / "timed")]
    assert elapsed == sorted(elapsed) and 1.8 < elapsed[-1] < 2
