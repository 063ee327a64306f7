"""Calibration: its moments are those of gradients that a slow reading of their definition gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hedgemix.data.dataloader import Batches
from hedgemix.quantize import calibration
from support.tiny_model import CPU, LENGTH, SEQUENCES, SETTINGS, Trained, make


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make()


def logits(trained: Trained) -> Tensor:
    """By the kernels and in the batches of calibration: others round otherwise, and a drawn label may turn on that."""
    batches = trained.inputs.split(calibration.MICROBATCH_SEQUENCES)
    return torch.cat([trained.model.logits(trained.model.features(tokens)).detach() for tokens in batches])


def labels(trained: Trained) -> Tensor:
    """What calibration draws for the calibration's sequences."""
    chosen = Batches(trained.batches.stream, LENGTH, SEQUENCES, seed=0).indices(0)
    return calibration.drawn(logits(trained), chosen, trained.model.config.logit_cap, torch.zeros(300))


def gradients(trained: Trained, name: str, sequence: int, drawn: Tensor) -> Tensor:
    """Of a sequence's loss at the outputs (T, R) of a matrix or table, by a difference quotient's exact limit: the
    derivative by something added there."""
    module = trained.model.get_submodule(name)
    added: list[Tensor] = []

    def add(module: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        added.append(torch.zeros_like(output, requires_grad=True))
        return output + added[-1]

    hook = module.register_forward_hook(add)
    rows = trained.model.logits(trained.model.features(trained.inputs[sequence : sequence + 1]))
    hook.remove()
    loss = F.cross_entropy(rows.flatten(0, 1), drawn[sequence], reduction="sum")
    return torch.autograd.grad(loss, added[0])[0][0]


@pytest.mark.parametrize(
    "name", ["blocks.0.attention.q", "blocks.1.attention.v", "blocks.1.mlp.up", "blocks.0.mlp.down", "bigram.project"]
)
def test_rows_are_mean_squared_gradients_at_outputs(trained: Trained, name: str) -> None:
    drawn = labels(trained)
    total = sum(gradients(trained, name, n, drawn).double().square().sum(0) for n in range(SEQUENCES))
    found = trained.moments.rows[f"{name}.weight"]
    torch.testing.assert_close(found.double(), total / (SEQUENCES * LENGTH), rtol=1e-3, atol=1e-9)


def test_passes_through_a_layer_add_inputs_and_average_gradients() -> None:
    looped = make(looped_layers=(0,), mlp_hidden=64, bigram_buckets=300)
    drawn, inputs, gradients = labels(looped), list[Tensor](), list[Tensor]()

    def watch(module: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        inputs.append(arguments[0].detach().double().flatten(0, -2))
        output.register_hook(lambda gradient: gradients.append(gradient.double().flatten(0, -2)))

    for name, passes in (("blocks.0.mlp.up", 3), ("blocks.1.mlp.up", 1), ("bigram.project", 1)):
        hook = looped.model.get_submodule(name).register_forward_hook(watch)
        for tokens, targets in zip(looped.inputs.split(16), drawn.split(16), strict=True):
            rows = looped.model.logits(looped.model.features(tokens))
            F.cross_entropy(rows.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        hook.remove()
        x, g = torch.cat(inputs), torch.cat(gradients)
        count = SEQUENCES * LENGTH
        assert len(x) == len(g) == passes * count
        columns, rows = (getattr(looped.moments, part)[f"{name}.weight"].double() for part in ("columns", "rows"))
        torch.testing.assert_close(columns, x.mT @ x / count, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(rows, g.square().sum(0) / (count * passes), rtol=1e-3, atol=1e-9)
        inputs.clear()
        gradients.clear()


@pytest.mark.parametrize("name", ["bigram.table", "value_embedding.table"])
def test_columns_of_tables_are_second_moments_of_their_gradients(trained: Trained, name: str) -> None:
    drawn, total = labels(trained), torch.zeros((), dtype=torch.float64)
    for n in range(SEQUENCES):
        each = gradients(trained, name, n, drawn).double()
        total = total + each.mT @ each
    found = trained.moments.columns[f"{name}.weight"].double()
    assert (found - total / (SEQUENCES * LENGTH)).norm() <= 1e-4 * found.norm()


def test_rows_of_tables_are_how_often_they_are_read(trained: Trained) -> None:
    model, stream = trained.model, trained.batches.stream
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype("int64"))
    assert model.bigram is not None
    for name, read, size in (
        ("value_embedding.table.weight", tokens, 300),
        ("bigram.table.weight", model.bigram.rows(tokens[None])[0], 1100),
    ):
        expected = torch.stack([(read == row).float().mean() for row in range(size)])
        torch.testing.assert_close(trained.moments.rows[name], expected)


def test_the_output_layers_closed_form_is_the_mean_over_labels(trained: Trained) -> None:
    """The gradient at the logits before the cap, with labels drawn a hundred times at each position."""
    cap, rows = trained.model.config.logit_cap, logits(trained).flatten(0, 1)
    p = rows.softmax(-1)
    slope = 1 - (rows / cap).square()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(p, 100, replacement=True, generator=generator)
    total = torch.zeros(300, dtype=torch.float64)
    for label in drawn.T:
        total += ((p - F.one_hot(label, 300)) * slope).double().square().sum(0)
    found = trained.moments.rows["embedding.weight"].double()
    expected = total / drawn.numel()
    often = expected > expected.mean()  # the others are drawn too seldom to be compared one by one
    torch.testing.assert_close(found[often], expected[often], rtol=0.1, atol=0)
    assert float(found.sum() / expected.sum()) == pytest.approx(1, rel=0.01)


def test_labels_are_drawn_by_sequence_from_the_model(trained: Trained) -> None:
    """The same whatever sequences come with them; as likely as the model says."""
    drawn, rows = labels(trained), logits(trained)
    indices = Batches(trained.batches.stream, LENGTH, SEQUENCES, seed=0).indices(0)
    cap = trained.model.config.logit_cap
    for part in (slice(0, 1), slice(5, 9)):
        assert torch.equal(calibration.drawn(rows[part], indices[part], cap, torch.zeros(300)), drawn[part])
    log_p = rows.log_softmax(-1)
    entropy, said = -(log_p.exp() * log_p).sum(-1).mean(), -log_p.gather(-1, drawn[..., None]).mean()
    assert float(said) == pytest.approx(float(entropy), rel=0.05)


def test_gradients_are_left_as_they_were(trained: Trained) -> None:
    assert all(parameter.grad is None for parameter in trained.model.parameters())
    before = [parameter.detach().clone() for parameter in trained.model.parameters()]
    again = calibration.calibrate(trained.model, trained.batches, SETTINGS, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
    for part in ("columns", "rows"):
        first, second = getattr(trained.moments, part), getattr(again, part)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_moments_do_not_depend_on_how_many_sequences_run_at_once(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in them on training's microbatch, which is a compiled step's; on the calibration's own, rounding."""
    for size in (1, 1000):
        same = calibration.calibrate(trained.model, trained.batches, replace(SETTINGS, microbatch_sequences=size), CPU)
        for part in ("columns", "rows"):
            mine, theirs = getattr(trained.moments, part), getattr(same, part)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    monkeypatch.setattr(calibration, "MICROBATCH_SEQUENCES", 5)
    smaller = calibration.calibrate(trained.model, trained.batches, SETTINGS, CPU)
    for part in ("columns", "rows"):
        for name, mine in getattr(trained.moments, part).items():
            assert (getattr(smaller, part)[name] - mine).norm() <= 1e-5 * mine.norm(), name
