"""The optimizers against torch's and against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hedgemix.config import ModelConfig, RecipeError, TrainConfig
from hedgemix.model.transformer import Linear, Model
from hedgemix.runtime.flat_gradient import FlatGradient
from hedgemix.train.optim import EMA, Muon, Optimizers, orthogonalise

SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (32, 32)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = ModelConfig(layers=2, width=64, heads=2, kv_heads=2, mlp_hidden=96, bigram_buckets=101, bigram_width=64)
    return Model(config, 64, 32)


def stack_of(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five matrices U diag(linspace(1, 0.05)) V^T of very different norms, with their U and V."""
    x = torch.randn(5, rows, columns, generator=generator())
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    values = torch.linspace(1, 0.05, s.shape[1]) * torch.logspace(-3, 3, 5)[:, None]
    return u * values[:, None] @ vh, u, vh.mT


@pytest.mark.parametrize(("rows", "columns"), SHAPES.values(), ids=SHAPES)
def test_orthogonalise_pushes_singular_values_to_one(rows: int, columns: int) -> None:
    x, u, v = stack_of(rows, columns)
    result = u.mT @ orthogonalise(x, TrainConfig()) @ v  # diagonal when the singular vectors stay what they were
    values = result.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    torch.testing.assert_close(result, torch.diag_embed(values), rtol=0, atol=2e-5)


POLAR = TrainConfig(newton_schulz="polar_express")
KINDS = {"quintic": TrainConfig(), "polar_express": POLAR, "equal rows": TrainConfig(muon_equal_rows=True)}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES.values(), ids=SHAPES)
def test_a_stack_is_orthogonalised_as_one_by_one(rows: int, columns: int, config: TrainConfig) -> None:
    x, _, _ = stack_of(rows, columns)
    apart = torch.cat([orthogonalise(each[None], config) for each in x])
    torch.testing.assert_close(orthogonalise(x, config), apart, rtol=0, atol=1e-5)
    assert not orthogonalise(torch.zeros(2, rows, columns), config).any()


def spread(config: TrainConfig, smallest: float) -> tuple[float, float]:
    """The least and largest of what singular values from `smallest` to 1 of the norm become: of 1 x 1 matrices beside
    a 1, so that the norm is 1 and a bit more."""
    values = torch.logspace(math.log10(smallest), math.log10(0.7), 2000, dtype=torch.float64)
    rest = (1 - values.square()).sqrt()
    found = orthogonalise(torch.diag_embed(torch.stack([values, rest], 1)), config).diagonal(dim1=1, dim2=2)
    return float(found.min()), float(found.max())


def test_polar_express_is_nearer_to_one_and_takes_smaller_values() -> None:
    """Computed: 0.847 to 1.141, and 0.471 to 1.202 of the quintic, from 0.001 on."""
    assert spread(POLAR, 1e-3) == pytest.approx((0.847, 1.141), abs=2e-3)
    assert spread(TrainConfig(), 1e-3) == pytest.approx((0.471, 1.202), abs=2e-3)
    fewer = [spread(replace(POLAR, newton_schulz_steps=steps), 1e-3)[0] for steps in range(1, 6)]
    assert fewer == sorted(fewer) and fewer[0] < 0.01


def test_equal_rows_make_the_update_blind_to_their_lengths() -> None:
    config, x = TrainConfig(muon_equal_rows=True), torch.randn(2, 24, 16, generator=generator())
    lengths = torch.logspace(-2, 2, 24)[:, None]
    torch.testing.assert_close(orthogonalise(x * lengths, config), orthogonalise(x, config), rtol=0, atol=2e-5)
    assert (orthogonalise(x * lengths, TrainConfig()) - orthogonalise(x, TrainConfig())).abs().max() > 0.1


def test_muon_equals_torchs_at_a_steady_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's orthogonalisation rounds to bfloat16 wherever it runs, ours on a GPU only; here both stay in float32.
    Its momentum is an average, ours a sum: where momentum does not move, one is a multiple of the other."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    shapes = [SHAPES["tall"], SHAPES["square"], SHAPES["wide"], SHAPES["tall"], SHAPES["tall"]]
    start = [torch.randn(*shape, generator=generator(i)) for i, shape in enumerate(shapes)]
    mine, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    muon = Muon(mine, TrainConfig(weight_decay=0.1))
    oracle = torch.optim.Muon(theirs, weight_decay=0.1, nesterov=True, ns_steps=5, adjust_lr_fn="original")
    for step in range(8):
        rate, momentum = 0.1 / (step + 1), 0.9
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator(100 * step + i))
            a.grad, b.grad = gradient.clone(), gradient.clone()
        muon.step(rate, momentum)
        oracle.param_groups[0].update(lr=rate, momentum=momentum)
        oracle.step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert min((a - x).abs().max() for a, x in zip(mine, start, strict=True)) > 0.1


def test_momentum_that_rises_is_a_sum_in_which_gradients_entered_alike() -> None:
    rates, momenta = [0.1, 0.05, 0.02, 0.01], [0.5, 0.8, 0.9, 0.95]
    gradients = [torch.randn(24, 16, generator=generator(step)) for step in range(4)]
    matrix, expected = nn.Parameter(torch.zeros(24, 16)), torch.zeros(1, 24, 16)
    muon = Muon([matrix], TrainConfig(weight_decay=0.0))
    for step, (rate, momentum) in enumerate(zip(rates, momenta, strict=True)):
        matrix.grad = gradients[step].clone()
        muon.step(rate, momentum)
        # The gradient of step s, and of this one once more (Nesterov), through every momentum since.
        total = gradients[step] + momentum * sum(
            math.prod(momenta[s + 1 : step + 1]) * gradients[s] for s in range(step + 1)
        )
        expected = expected - rate * math.sqrt(24 / 16) * orthogonalise(total[None], TrainConfig())
        torch.testing.assert_close(matrix.detach(), expected[0], rtol=0, atol=2e-6)


def test_a_state_with_averaged_momentum_is_refused() -> None:
    muon = Muon([nn.Parameter(torch.zeros(4, 4))], TrainConfig())
    with pytest.raises(RecipeError, match="averaged momentum; remove its folder"):
        muon.load_state_dict({"momenta": [torch.ones(1, 4, 4)]})
    muon.load_state_dict({"sums": [torch.ones(1, 4, 4)]})
    assert torch.equal(muon.state_dict()["sums"][0], torch.ones(1, 4, 4))


def test_gradients_stay_views_of_one_buffer() -> None:
    model, tokens = small_model(), torch.randint(64, (2, 16), generator=generator())
    flat = FlatGradient(model.parameters())
    expected = torch.autograd.grad(model(tokens, tokens), list(model.parameters()))
    for passes in (1, 2):  # accumulates
        model(tokens, tokens).backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, passes * gradient)
            assert parameter.grad.untyped_storage().data_ptr() == flat.buffer.untyped_storage().data_ptr()
            assert parameter.grad.data_ptr() % 16 == 0 and parameter.grad.is_contiguous()
    # Nothing but gradients is summed and clipped: what lies between them is zero.
    squares = sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters())
    assert float(flat.buffer.double().square().sum()) == pytest.approx(squares, rel=1e-12)
    flat.zero()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_gradients_in_one_buffer_train_to_the_bits_of_gradients_apart() -> None:
    config, tokens = TrainConfig(), torch.randint(64, (2, 16), generator=generator())
    mine, theirs = small_model(), small_model()
    assert any(parameter.numel() % 4 for parameter in mine.parameters())
    flat, optimizers, plain = FlatGradient(mine.parameters()), Optimizers(mine, config), Optimizers(theirs, config)
    for _ in range(3):
        flat.zero()
        mine(tokens, tokens).backward()
        flat.reduce(0.0)
        theirs.zero_grad(set_to_none=False)  # a gradient that is there lets the bigram table's rows be added to it
        theirs(tokens, tokens).backward()
        optimizers.step(1.0, 0.9)
        plain.step(1.0, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("clip", [0.3, 0.0, 1e6])
def test_the_gradient_is_clipped_as_torch_does(clip: float) -> None:
    mine, theirs = (nn.ParameterList(torch.ones(n, 3) for n in (2, 5, 7)) for _ in range(2))
    flat = FlatGradient(mine)
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        b.grad = torch.randn(b.shape, generator=generator(i))
        a.grad.copy_(b.grad)
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
    assert flat.reduce(clip).item() == pytest.approx(norm.item(), rel=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    assert flat.buffer.norm() == pytest.approx(min(clip or math.inf, norm.item()), rel=1e-5)


def test_the_average_equals_a_loop_and_swapping_twice_changes_nothing() -> None:
    parameters = [nn.Parameter(torch.randn(n, 4, generator=generator(n))) for n in (1, 3)]
    ema = EMA(parameters, 0.9)
    expected = [parameter.detach().double() for parameter in parameters]
    for step in range(20):
        for i, parameter in enumerate(parameters):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator(step)))
            expected[i] = 0.9 * expected[i] + 0.1 * parameter.detach().double()
        ema.update()
    last = [parameter.detach().clone() for parameter in parameters]
    ema.swap()
    for parameter, average in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), average, rtol=0, atol=1e-6)
    ema.swap()
    assert all(torch.equal(a, b) for a, b in zip(parameters, last, strict=True))


def test_every_kind_of_parameter_may_have_a_decay_of_its_own() -> None:
    for decays, expected in (((None, None), [0.3, 0.3, 0.3]), ((0.2, 0.0), [0.3, 0.2, 0.0])):
        model = small_model()
        config = TrainConfig(weight_decay=0.3, embedding_decay=decays[0], vector_decay=decays[1])
        optimizers = Optimizers(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # nothing moves, but by decay
        rates = [config.matrix_rate, config.embedding_rate, config.vector_rate]
        kinds = [model.blocks[0].mlp.up.weight, model.embedding.weight, model.blocks[0].mlp_scale]
        before = [weight.detach().clone() for weight in kinds]
        optimizers.step(0.5, 0.9)
        for weight, old, rate, decay in zip(kinds, before, rates, expected, strict=True):
            torch.testing.assert_close(weight.detach(), old * (1 - 0.5 * rate * decay), rtol=1e-6, atol=0)


def test_every_parameter_has_exactly_one_optimizer() -> None:
    model, config = small_model(), TrainConfig(embedding_rate=0.3, vector_rate=0.2)
    optimizers = Optimizers(model, config)
    by_muon = [id(parameter) for stack in optimizers.muon.stacks for parameter in stack]
    embeddings, vectors = ([id(p) for p in group["params"]] for group in optimizers.adamw.param_groups)
    assert sorted(by_muon + embeddings + vectors) == sorted(map(id, model.parameters()))
    assert sorted(by_muon) == sorted(id(m.weight) for m in model.modules() if isinstance(m, Linear))
    assert sorted(embeddings) == sorted(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding))
    assert [group["base_rate"] for group in optimizers.adamw.param_groups] == [0.3, 0.2]


def test_the_optimizers_train_every_parameter() -> None:
    model, tokens = small_model(), torch.randint(64, (4, 33), generator=generator())
    flat, optimizers = FlatGradient(model.parameters()), Optimizers(model, TrainConfig())
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(30):
        flat.zero()
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 128
        loss.backward()
        flat.reduce(0.3)
        optimizers.step(1.0, 0.9)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(64), abs=0.05) and losses[-1] < 1.0
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, start[name])]


def test_a_rate_factor_of_zero_moves_nothing() -> None:
    model = small_model()
    optimizers = Optimizers(model, TrainConfig())
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0.0, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True))
    optimizers.step(0.5, 0.9)
    for rate, parameter in ((0.025, model.blocks[0].mlp_scale), (0.035, model.embedding.weight)):
        before = start[[id(p) for p in model.parameters()].index(id(parameter))]
        moved = before * (1 - 0.5 * rate * 0.04) - 0.5 * rate  # Adam's step where all gradients were equal
        torch.testing.assert_close(parameter.detach(), moved, rtol=0, atol=1e-6)
