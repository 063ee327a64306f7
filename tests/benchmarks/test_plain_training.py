"""A training step against the same step in plain torch: losses, weights and averages; and each kernel's gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain.training import PlainRun, plain_loss
from hedgemix.config import TrainConfig
from hedgemix.data.dataloader import Batches
from hedgemix.data.shards import TokenStream
from hedgemix.model import cpu_kernels, layers
from hedgemix.model.layers import rotate
from hedgemix.model.transformer import Model
from hedgemix.train.trainer import Run
from tests.hedgemix.model.test_transformer import PARTS, build, double, tokens_of  # noqa: F401 (a fixture)
from tests.hedgemix.train.test_trainer import BATCH, CPU, MODEL, PACE, VOCAB

CONFIG = TrainConfig(**{**BATCH, **PACE, "microbatch_sequences": 3}, dtype="float32", compile=False, late_qat=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def equal_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    along = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, along), torch.autograd.grad(expected, inputs, along), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


SETTINGS: dict[str, dict[str, Any]] = {
    "decays": {"weight_decay": 0.5, "embedding_decay": 2.0, "vector_decay": 0.0},
    "equal rows": {"muon_equal_rows": True},
    "Polar Express": {"newton_schulz": "polar_express"},
    "Polar Express, 3 steps": {"newton_schulz": "polar_express", "newton_schulz_steps": 3},
    "rate floor": {"rate_floor": 0.4},
    "growth": {"growth_fractions": (0.2, 0.5)},
}


def train_beside_plain(config: TrainConfig, loss: float, weights: float) -> None:
    """Ten steps of both. loss, weights: most relative difference of a step's loss, and of the norm of a weight."""
    torch.manual_seed(0)
    model = Model(replace(MODEL, bigram_buckets=1009), VOCAB, 32)  # far more rows than a batch reads
    choices = torch.randint(3, (32 * 100,), generator=torch.Generator().manual_seed(1)).tolist()
    text = [1]
    for choice in choices:
        text.append((5 * text[-1] + choice) % VOCAB)
    batches = Batches(TokenStream([torch.tensor(text).numpy().astype("uint16")]), 32, 8, seed=0)
    plain, run = PlainRun(copy.deepcopy(model), config, batches, CPU), Run(model, config, batches, CPU)
    losses = [(plain.train_step(step / 10), run.train_step(step / 10).item()) for step in range(10)]
    assert run.qat_steps == 2 and losses[-1][0] < losses[0][0] - 0.2
    assert [mine for _, mine in losses] == pytest.approx([theirs for theirs, _ in losses], rel=loss)
    averages = dict(zip(model.state_dict(), run.ema.averages, strict=True))
    for found, expected in ((model.state_dict(), plain.model.state_dict()), (averages, plain.averages)):
        for name, value in expected.items():
            assert (found[name] - value).norm() <= weights * value.norm(), name


@pytest.mark.parametrize("clip", [0.3, 0.0])
def test_a_run_trains_as_plain_torch_does(clip: float) -> None:
    """Measured, relative: 3e-7 in a loss, 1e-5 in the norm of a weight, after ten steps."""
    train_beside_plain(replace(CONFIG, gradient_clip=clip), 2e-6, 3e-5)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_trains_as_plain_torch_does(settings: dict[str, Any]) -> None:
    """In float64, where rounding that training enlarges stays far below what a setting moves."""
    train_beside_plain(replace(CONFIG, **settings), 1e-9, 1e-8)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("overrides", PARTS.values(), ids=PARTS)
def test_every_part_has_the_gradient_of_the_plain_model(overrides: dict[str, Any]) -> None:
    model, tokens = build(**overrides), tokens_of(2, 70)  # longer than a block of attention
    targets = tokens.roll(-1, 1)
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(tokens, targets), parameters)
    expected = torch.autograd.grad(plain_loss(model, tokens, targets, False), parameters)
    for (name, _), mine, theirs in zip(model.named_parameters(), found, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-10 * theirs.norm(), name


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_attention(length: int) -> None:
    q, k, v = (draw(2, 3, length, 8, seed=seed) for seed in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    equal_gradients(cpu_kernels.CausalAttention.apply(q, k, v), expected, [q, k, v])


@pytest.mark.parametrize("rotated", [0, 4, 8])
def test_normalised_rotary(rotated: int) -> None:
    x, angle = draw(2, 5, 3, 8), torch.rand(5, rotated // 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    expected = rotate(F.rms_norm(x.transpose(1, 2), (8,)), cos, sin)
    equal_gradients(cpu_kernels.NormalisedRotary.apply(x, cos, sin), expected, [x])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_rms_norm(scale: float) -> None:
    x = draw(4, 7)
    x.data[1] *= 1e-8  # where epsilon rules
    equal_gradients(cpu_kernels.RMSNorm.apply(x, scale), F.rms_norm(x, (7,)) * scale, [x])


def test_projection_and_leaky_square() -> None:
    y, v = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    direction = F.normalize(v, dim=-1)
    expected = y - (y * direction).sum(-1, keepdim=True) * direction
    equal_gradients(cpu_kernels.WithoutProjection.apply(y, v), expected, [y, v])
    equal_gradients(cpu_kernels.LeakySquare.apply(y, 0.5), F.leaky_relu(y, 0.5).square(), [y])
    assert cpu_kernels.WithoutProjection.apply(y, torch.zeros_like(v)).equal(y)


@pytest.mark.parametrize("cap", [0.5, 30.0, 2000.0])
def test_capped_cross_entropy(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "CHUNK_NUMBERS", 300)  # 7 rows a piece, 2 in the last
    x, weight, targets = draw(23, 16), draw(41, 16, seed=1), torch.arange(23)
    with torch.no_grad():
        weight *= 20  # logits far apart
    expected = F.cross_entropy(cap * torch.tanh(x @ weight.T / cap), targets, reduction="sum")
    equal_gradients(cpu_kernels.CappedCrossEntropy.apply(x, weight, targets, cap), expected, [x, weight])


def test_a_large_table_gets_the_rows_that_were_read() -> None:
    table, rows = layers.Table(1000, 4), torch.tensor([[3, 5], [3, 999]])
    table(rows).sum().backward()  # no buffer: a dense gradient
    assert table.weight.grad is not None and not table.weight.grad.is_sparse
    before, buffer = table.weight.grad.clone(), table.weight.grad
    table(rows).sum().backward()
    assert table.weight.grad is buffer and torch.equal(buffer, 2 * before)
    assert buffer[3].tolist() == [4.0] * 4 and buffer.count_nonzero() == 12
