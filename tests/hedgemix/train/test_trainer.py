"""Training: repeatable to the bit, resumable to the bit, and never over its budget."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hedgemix.config import ComputeConfig, ModelConfig, Recipe, RecipeError, TrainConfig
from hedgemix.data import dataset as datasets
from hedgemix.data import shards
from hedgemix.data.dataset import Dataset
from hedgemix.model.transformer import Model, rms_norm
from hedgemix.runtime import files
from hedgemix.runtime.checkpoint import Checkpoints
from hedgemix.runtime.files import load_tensors, read_json
from hedgemix.train.schedule import StepKind, rate_factor
from hedgemix.train.step_log import DivergedError
from hedgemix.train.trainer import Run, TrainResult, train

VOCAB, SEQUENCES, CPU = 64, 500, torch.device("cpu")
MODEL = ModelConfig(layers=2, width=64, heads=2, kv_heads=2, mlp_hidden=96, rope_dims=8, value_embedding_layers=1)
MODEL = replace(MODEL, bigram_buckets=101, bigram_width=32, value_embedding_width=32)
PLAIN = replace(MODEL, rope_dims=0, bigram_buckets=0, smear_gate=False, input_mix=False, skips=False)
PLAIN = replace(PLAIN, xsa=False, residual_scale=False, value_embedding_layers=0)
LOOPS = replace(MODEL, layers=4, looped_layers=(1, 2), lane_layers=1, smear_by="input")
LOOPS = replace(LOOPS, head_gates=True, skip_gates=True, zero_outputs=True)
BATCH = {"batch_tokens": 256, "sequence_tokens": 32, "microbatch_sequences": 8, "calibration_sequences": 6}
PACE = {"steps": 12, "warmup_steps": 0, "log_every_steps": 1, "ema_decay": 0.8}


def recipe(model: ModelConfig = MODEL, checkpoint_seconds: float = 3, **overrides: Any) -> Recipe:
    config = TrainConfig(**BATCH, **PACE, dtype="float32", compile=False)
    compute = ComputeConfig(checkpoint_seconds=checkpoint_seconds)
    return Recipe("test", model=model, train=replace(config, **overrides), compute=compute)


def checkpoint(folder: Path) -> dict[str, Any]:
    """The state that a restart would take up."""
    return Checkpoints(folder).load()


def write_data(folder: Path) -> Dataset:
    """Text in which a token leaves three choices for the next, in two shards of training tokens."""
    rng, tokens = np.random.default_rng(0), [1]
    for choice in rng.integers(0, 3, 32 * SEQUENCES):
        tokens.append((5 * tokens[-1] + int(choice)) % VOCAB)
    paths = (str(folder / "train_0.bin"), str(folder / "train_1.bin"))
    for path, part in zip(paths, (tokens[:777], tokens[777:]), strict=True):
        shards.write_shard(path, np.array(part))
    values: dict[str, Any] = {field.name: 0 for field in fields(Dataset)}
    return Dataset(**values | {"train_shards": paths, "vocab_size": VOCAB, "train_tokens": len(tokens)})


class Killed(Exception):
    """Stands for a lost worker."""


@dataclass
class Clock:
    """A clock on which a step takes one second, if the run logs each step to `tick`."""

    seconds: float = 0.0
    kill_after_step: int = 0

    def __call__(self) -> float:
        return self.seconds

    def tick(self, record: dict[str, Any]) -> None:
        self.seconds += 1
        if record["step"] == self.kill_after_step:
            raise Killed


Start = Callable[..., TrainResult]
Ended = tuple[Path, TrainResult]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(data: Dataset) -> Start:
    def run(folder: Path, chosen: Recipe, clock: Clock | None = None, seed: int = 7) -> TrainResult:
        clock = clock or Clock()
        return train(chosen, data, seed, folder, CPU, log=clock.tick, now=clock)

    return run


@pytest.fixture(scope="module")
def straight(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run with every part, late quantization too, and nothing in its way."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, start(folder, recipe(late_qat=True))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / "weights.pt")


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended in the same bits."""
    moments = [load_tensors(folder / "moments.pt") for folder in (a, b)]
    pairs = [(weights(a), weights(b)), *((moments[0][part], moments[1][part]) for part in ("columns", "rows"))]
    assert all(x.keys() == y.keys() for x, y in pairs)
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


def test_fixed_steps_give_the_same_bits_again(start: Start, straight: Ended, tmp_path: Path) -> None:
    for _ in range(2):  # the second finds all of it done
        result = start(tmp_path / "again", recipe(late_qat=True))
        assert same(straight[0], tmp_path / "again") and lines(straight[0]) == lines(tmp_path / "again")
    assert (result.steps, result.restarts) == (12, 1)
    start(tmp_path / "other", recipe(late_qat=True), seed=8)
    assert not same(straight[0], tmp_path / "other")


def test_a_profile_is_a_trace_that_changes_nothing(data: Dataset, straight: Ended, tmp_path: Path) -> None:
    clock = Clock()
    train(recipe(late_qat=True), data, 7, tmp_path, CPU, log=clock.tick, now=clock, profile=tmp_path / "profile")
    assert same(straight[0], tmp_path) and lines(straight[0]) == lines(tmp_path)
    events = json.loads(gzip.decompress((tmp_path / "profile" / "profile.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("optimizers") == names.count("gradient") == 5
    assert {"aten::mm", "RMSNorm", "CappedCrossEntropy", "CappedCrossEntropyBackward"} <= set(names)
    assert "aten::mm" in (tmp_path / "profile" / "profile.txt").read_text()


def test_warm_up_steps_leave_no_trace(start: Start, straight: Ended, tmp_path: Path) -> None:
    start(tmp_path, recipe(late_qat=True, warmup_steps=3))
    assert same(straight[0], tmp_path)
    assert lines(straight[0]) == lines(tmp_path)


@pytest.mark.parametrize("step", [1, 6, 11, 12])
def test_a_run_that_was_stopped_ends_in_the_same_bits(start: Start, straight: Ended, tmp_path: Path, step: int) -> None:
    with pytest.raises(Killed):
        start(tmp_path, recipe(late_qat=True), Clock(1000, kill_after_step=step))
    kept = {1: 0, 6: 3, 11: 9, 12: 9}[step]
    assert (checkpoint(tmp_path) or {"step": 0})["step"] == kept and not (tmp_path / "weights.pt").exists()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "tok')  # a line that the kill cut short
    clock = Clock()
    result = start(tmp_path, recipe(late_qat=True), clock)
    assert clock.seconds == 12 - kept  # steps since the last checkpoint are run again
    assert same(straight[0], tmp_path)
    assert result.restarts == 1 and result.qat_steps == straight[1].qat_steps
    timeless = {"elapsed_seconds": 0, "tokens_per_second": 0}
    assert [line | timeless for line in lines(tmp_path)] == [line | timeless for line in lines(straight[0])]


def test_the_log_has_one_line_a_step(start: Start, straight: Ended, tmp_path: Path) -> None:
    records = lines(straight[0])
    assert [record["step"] for record in records] == list(range(1, 13))
    for i, record in enumerate(records):
        assert record["tokens"] == 256 * (i + 1) and record["elapsed_seconds"] == i
        assert record["matrix_rate"] == pytest.approx(0.025 * rate_factor(i / 12, 0.58))
        assert record["tokens_per_second"] == 256 or i == 0  # the first step took no time on this clock
    start(tmp_path, recipe(late_qat=True, log_every_steps=5))
    assert [line["loss_nats"] for line in lines(tmp_path)] == [line["loss_nats"] for line in records]


def test_the_result_says_what_was_trained(straight: Ended) -> None:
    folder, result = straight
    assert (result.steps, result.tokens, result.restarts) == (12, 12 * 256, 0)
    assert result.parameters == sum(value.numel() for value in weights(folder).values())
    assert result.train_loss_nats == lines(folder)[-1]["loss_nats"]
    assert result.qat_steps == 3  # of fractions 9/12, 10/12, 11/12: rate factors below 0.5
    assert result.loop_seconds == result.train_seconds == 12 and result.ms_per_step == 1000


def test_the_loss_goes_down(start: Start, tmp_path: Path) -> None:
    result = start(tmp_path, recipe(steps=60))
    assert lines(tmp_path)[0]["loss_nats"] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert math.log(3) - 0.1 < result.train_loss_nats < 2.0


LOOPED = recipe(LOOPS, loop_from_fraction=0.4, late_qat=True)


@pytest.fixture(scope="module")
def looped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run with every part of recipe frontier, whose loop begins with step 6 of 12."""
    folder = tmp_path_factory.mktemp("looped")
    return folder, start(folder, LOOPED)


def test_a_loop_begins_where_its_fraction_says(start: Start, looped: Ended, tmp_path: Path) -> None:
    start(tmp_path, replace(LOOPED, train=replace(LOOPED.train, loop_from_fraction=0.99)))
    mine, others = ([line["loss_nats"] for line in lines(folder)] for folder in (looped[0], tmp_path))
    # Step i is at fraction (i - 1) / 12.
    assert [a == b for a, b in zip(mine, others, strict=True)] == [True] * 5 + [False] * 7


@pytest.mark.parametrize("step", [4, 7])
def test_a_run_stopped_before_or_behind_the_loops_begin_ends_in_the_same_bits(
    start: Start, looped: Ended, tmp_path: Path, step: int
) -> None:
    with pytest.raises(Killed):
        start(tmp_path, LOOPED, Clock(1000, kill_after_step=step))
    start(tmp_path, LOOPED)
    assert same(looped[0], tmp_path)


def test_every_kind_of_step_is_warmed_up(
    start: Start, looped: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[StepKind] = []
    backward = Run.backward

    def watched(run: Run, step: int, kind: StepKind) -> Tensor:
        kinds.append(kind)
        return backward(run, step, kind)

    monkeypatch.setattr(Run, "backward", watched)
    start(tmp_path, replace(LOOPED, train=replace(LOOPED.train, warmup_steps=4)))
    warm, trained = kinds[:4], kinds[4:]
    assert list(dict.fromkeys(trained)) == [(False, False, 1), (False, True, 1), (True, True, 1)]
    assert set(warm) == {*trained, (True, False, 1)}
    assert same(looped[0], tmp_path)


def test_quantized_training_ends_elsewhere(start: Start, straight: Ended, tmp_path: Path) -> None:
    result = start(tmp_path, recipe(late_qat=False))
    assert result.qat_steps == 0
    found, expected = lines(tmp_path), lines(straight[0])
    assert [a["loss_nats"] == b["loss_nats"] for a, b in zip(found, expected, strict=True)] == [True] * 9 + [False] * 3


def test_the_budget_ends_the_run_before_the_reserve(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(Run, "warm_up", lambda run: setattr(clock, "seconds", 500.0))  # does not count
    result = start(tmp_path, recipe(steps=0, budget_seconds=10, reserve_seconds=3), clock)
    assert result.steps == 7 and result.loop_seconds == 7
    rates = [line["matrix_rate"] for line in lines(tmp_path)]
    assert rates == pytest.approx([0.025 * rate_factor(second / 7, 0.58) for second in range(7)])


@pytest.mark.parametrize(
    ("checkpoint_seconds", "used_seconds", "steps", "lost_seconds"),
    [(2, 4, 6, 1), (100, 7, 7, 3)],  # without a checkpoint nothing of the first try is used: the second begins anew
)
def test_a_restart_gets_no_extra_time(
    start: Start, tmp_path: Path, checkpoint_seconds: float, used_seconds: float, steps: int, lost_seconds: float
) -> None:
    chosen = recipe(steps=0, budget_seconds=10, reserve_seconds=3, checkpoint_seconds=checkpoint_seconds)
    with pytest.raises(Killed):
        start(tmp_path, chosen, Clock(1000, kill_after_step=4))
    assert read_json(tmp_path / "clock.json")["elapsed_seconds"] == 3  # killed at 4 s; a note a second
    clock = Clock()
    result = start(tmp_path, chosen, clock)
    assert clock.seconds == used_seconds and result.loop_seconds == 7
    assert result.steps == steps and result.restarts == 1
    assert read_json(tmp_path / "clock.json")["lost_seconds"] == lost_seconds
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, steps + 1))


def test_a_notice_is_answered_with_one_checkpoint(data: Dataset, tmp_path: Path) -> None:
    clock, told = Clock(), []

    def kept(path: Path) -> None:
        told.append(path.name)

    chosen = recipe(checkpoint_seconds=1000)
    with pytest.raises(Killed):
        killed = Clock(kill_after_step=8)
        train(chosen, data, 7, tmp_path, CPU, log=killed.tick, now=killed, kept=kept, notice=lambda: killed() >= 5)
    assert checkpoint(tmp_path)["step"] == 5
    assert [name for name in told if name != "clock.json"] == ["checkpoint-5.pt", "checkpoint.json"]
    train(chosen, data, 7, tmp_path, CPU, log=clock.tick, now=clock)
    assert clock.seconds == 12 - 5


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_costs_one_more_and_ends_in_the_same_bits(
    start: Start, straight: Ended, tmp_path: Path, damage: str
) -> None:
    with pytest.raises(Killed):
        start(tmp_path, recipe(late_qat=True), Clock(1000, kill_after_step=11))
    path = tmp_path / "checkpoint-9.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-100] if damage == "cut" else content)
    clock = Clock()
    start(tmp_path, recipe(late_qat=True), clock)
    assert clock.seconds == 12 - 6 and same(straight[0], tmp_path)


def test_a_disk_that_is_full_for_a_while_ends_nothing(
    start: Start, straight: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, write = Clock(), files.replacing

    def replacing(path: Path) -> Any:
        if 2 <= clock() < 11:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path)

    monkeypatch.setattr(files, "replacing", replacing)
    result = start(tmp_path, recipe(late_qat=True), clock)
    assert result.checkpoint_failures == 3 and same(straight[0], tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_kept(data: Dataset, tmp_path: Path) -> None:
    chosen = recipe(matrix_rate=1e30, log_every_steps=1000, checkpoint_seconds=1)
    with pytest.raises(DivergedError, match=r"seed 7: the loss is nan at step 2; lower train.matrix_rate"):
        train(chosen, data, 7, tmp_path, CPU, now=itertools.count().__next__)
    assert checkpoint(tmp_path)["step"] == 1 and not (tmp_path / "weights.pt").exists()


def test_a_recipe_that_cannot_train_is_named(start: Start, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="train.batch_tokens 250 .* use 224"):
        start(tmp_path, recipe(batch_tokens=250))
    assert not list(tmp_path.iterdir())


def test_a_text_shorter_than_a_sequence_is_refused(data: Dataset, tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "short.bin", np.arange(32))
    with pytest.raises(RecipeError, match="train.sequence_tokens 32 is longer than the training text"):
        train(recipe(), replace(data, train_shards=(str(tmp_path / "short.bin"),)), 7, tmp_path, CPU)


def test_a_checkpoint_of_another_batch_is_refused(start: Start, tmp_path: Path) -> None:
    start(tmp_path, recipe(steps=2))
    with pytest.raises(RecipeError, match=r"train.batch_tokens; remove its folder"):
        start(tmp_path, recipe(steps=2, batch_tokens=128))


def test_the_averaged_weights_are_the_result(start: Start, tmp_path: Path) -> None:
    for decay in (0.8, 0.0):
        folder = tmp_path / str(decay)
        start(folder, recipe(ema_decay=decay))
        state = checkpoint(folder)
        averaged = dict(zip(state["model"], state["ema"], strict=True))
        assert all(torch.equal(value, averaged[name]) for name, value in weights(folder).items())
        last = [torch.equal(value, state["model"][name]) for name, value in weights(folder).items()]
        assert all(last) if decay == 0 else not any(last)


def test_accumulating_the_gradient_changes_nothing(start: Start, tmp_path: Path) -> None:
    """Measured: 2e-7 in the loss, 5e-6 in a tensor's norm, where Adam divides by gradients that nearly cancel."""
    for size in (1, 3, 8):
        start(tmp_path / str(size), recipe(microbatch_sequences=size))
    whole, losses = weights(tmp_path / "8"), [line["loss_nats"] for line in lines(tmp_path / "8")]
    for size in (1, 3):
        assert [line["loss_nats"] for line in lines(tmp_path / str(size))] == pytest.approx(losses, rel=2e-6)
        for name, value in weights(tmp_path / str(size)).items():
            assert (value - whole[name]).norm() <= 3e-5 * whole[name].norm(), name


def test_hessians_are_means_over_inputs_of_training_tokens(start: Start, data: Dataset, tmp_path: Path) -> None:
    start(tmp_path, recipe(PLAIN, steps=4, microbatch_sequences=4))
    model = Model(PLAIN, VOCAB, 32)
    model.load_state_dict(weights(tmp_path))
    stream = datasets.train_stream(data)
    expected = {name: torch.zeros((), dtype=torch.float64) for name in model.inputs()}
    with torch.no_grad():
        for i in np.random.default_rng([0, 0]).permutation(SEQUENCES)[:6]:  # the calibration's own shuffle
            x = rms_norm(model.embedding(torch.from_numpy(stream.read(int(i) * 32, 32).astype(np.int64))))
            for layer, block in enumerate(model.blocks):
                a, depth = block.attention, (layer + 1) ** -0.5
                inputs = {"attention.q": depth * rms_norm(x)}
                q, k, v = (linear(inputs["attention.q"]).view(32, 2, 32).transpose(0, 1) for linear in (a.q, a.k, a.v))
                y = F.scaled_dot_product_attention(rms_norm(q) * a.q_gain.view(2, 1, 1), rms_norm(k), v, is_causal=True)
                inputs["attention.out"] = y.transpose(0, 1).reshape(32, 64)
                x = x + a.out(inputs["attention.out"])
                inputs["mlp.up"] = depth * rms_norm(x)
                inputs["mlp.down"] = F.leaky_relu(block.mlp.up(inputs["mlp.up"]), 0.5).square()
                x = x + block.mlp.down(inputs["mlp.down"])
                for name, rows in inputs.items():
                    key, rows = f"blocks.{layer}.{name}.weight", rows.double()
                    expected[key] = expected[key] + (rows[:, :, None] * rows[:, None]).sum(0)
    found = load_tensors(tmp_path / "moments.pt")["columns"]
    assert found.keys() == expected.keys() | {"embedding.weight"}
    for name, value in expected.items():
        assert (6 * 32 * found[name] - value).norm() <= 1e-5 * value.norm(), name
