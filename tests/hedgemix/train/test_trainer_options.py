"""What is off by default in a training: repeatable and resumable too, by the log of a clock's run as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hedgemix.data import dataset as datasets
from hedgemix.data.dataloader import Batches
from hedgemix.data.dataset import Dataset
from hedgemix.model.transformer import Model
from hedgemix.train.trainer import Run, train
from tests.hedgemix.train.test_trainer import (
    CPU,
    MODEL,
    VOCAB,
    Clock,
    Killed,
    lines,
    recipe,
    same,
    write_data,
)

OPTIONS = {"growth_fractions": (0.3, 0.6), "muon_equal_rows": True, "rate_floor": 0.2}
OPTIONS |= {"newton_schulz": "polar_express", "embedding_decay": 0.5, "late_qat": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_run_that_was_stopped_ends_in_the_same_bits(data: Dataset, tmp_path: Path) -> None:
    def run(folder: Path, clock: Clock) -> None:
        train(recipe(**OPTIONS), data, 7, folder, CPU, log=clock.tick, now=clock)

    run(tmp_path / "straight", Clock())
    with pytest.raises(Killed):
        run(tmp_path / "stopped", Clock(1000, kill_after_step=8))
    clock = Clock()
    run(tmp_path / "stopped", clock)
    assert clock.seconds == 12 - 6 and same(tmp_path / "straight", tmp_path / "stopped")


def test_a_clocks_run_with_options_is_repeated_by_its_fractions(data: Dataset, tmp_path: Path) -> None:
    """As a replay does: the lengths of sequences are in them too."""
    clock, again = Clock(), Clock()
    timed = recipe(**OPTIONS, steps=0, budget_seconds=15, reserve_seconds=3)
    train(timed, data, 7, tmp_path / "clock", CPU, log=clock.tick, now=clock)
    fractions = [line["fraction"] for line in lines(tmp_path / "clock")]
    train(timed, data, 7, tmp_path / "replay", CPU, now=again, fractions=fractions)
    assert len(fractions) == 12 and same(tmp_path / "clock", tmp_path / "replay")


def test_every_length_is_run_before_the_clock_starts(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compile(model: Model, **options: Any) -> Model:
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    config = recipe(**OPTIONS, compile=True, warmup_steps=6).train
    batches = Batches(datasets.train_stream(data), 32, 8, 0)
    run = Run(Model(MODEL, VOCAB, 32), config, batches, CPU)
    met, loss = set(), run.loss

    def recorded(tokens: Tensor, targets: Tensor, qat: bool, looped: bool) -> Tensor:
        met.add((tuple(tokens.shape), qat))
        return loss(tokens, targets, qat, looped)

    run.loss = recorded
    run.warm_up()
    warmed = set(met)
    assert warmed == {(shape, qat) for shape in ((8, 32), (16, 16), (32, 8)) for qat in (False, True)}
    for step in range(12):
        run.train_step(step / 12)
    run.read.close()
    assert met == warmed and asked == [{"fullgraph": True, "dynamic": False}]
