"""Test-time training: what it moves, what it reads, and one step of it against plain torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hedgemix import recipes
from hedgemix.config import ModelConfig, TTTConfig
from hedgemix.evaluate import ttt
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.evaluate.ttt import Adapter
from hedgemix.model.transformer import Model, parameter_count

VOCAB = 61
CONFIG = TTTConfig(rate=2e-3, epochs=2, batch_sequences=3, sequence_tokens=16, polyak=0.0, last_blocks=1)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = ModelConfig(
        layers=3, width=32, heads=2, kv_heads=1, mlp_hidden=64, rope_dims=8, bigram_buckets=128, bigram_width=16,
        value_embedding_layers=2, value_embedding_width=16,
    )  # fmt: skip
    model = Model(config, VOCAB, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(n_tokens: int = 200) -> Tensor:
    """A text with something to learn: 12 tokens over and over, a tenth of them replaced."""
    generator = torch.manual_seed(1)
    text = torch.arange(n_tokens) % 12 * 5
    return torch.where(torch.rand(n_tokens, generator=generator) < 0.1, torch.randint(VOCAB, (n_tokens,)), text)


def weights(n_tokens: int = 200) -> Tensor:
    return torch.randint(0, 9, (n_tokens,), generator=torch.manual_seed(2)).float()


def adapter(model: Model, n_chunks: int = 4, **changes: Any) -> Adapter:
    return Adapter(model, TTTConfig(**{**vars(CONFIG), **changes}), n_chunks, "float32")


def loss(model: Model, text: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean loss of the targets 1 .. N - 1."""
    losses = F.cross_entropy(model.logits(model.features(text[None, :-1]))[0], text[1:], reduction="none")
    return (losses * weights[1:]).sum() / weights[1:].sum()


def snapshot(model: Model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_record_recipe_trains_the_parameters_of_the_reference() -> None:
    recipe = recipes.record()
    with torch.device("meta"):
        model = Model(recipe.model, recipe.data.vocab_size, recipe.train.sequence_tokens)
    chosen = ttt.trained_parameters(model, recipe.evaluate.ttt.last_blocks)
    assert sum(parameter.numel() for parameter in chosen.values()) == 5_780_500
    assert sum(parameter.numel() for parameter in ttt.trained_parameters(model, 0).values()) == parameter_count(model)


@pytest.mark.parametrize("last_blocks", [1, 2, 3, 5])
def test_the_last_blocks_and_every_scale_are_trained(model: Model, last_blocks: int) -> None:
    whole = tuple(f"blocks.{block}." for block in range(3)[-last_blocks:])
    scales = ("attention_scale", "mlp_scale", "bigram.scale", "value_embedding.scale", "layer_scales")
    expected = [name for name, _ in model.named_parameters() if name.startswith(whole) or name.endswith(scales)]
    assert list(ttt.trained_parameters(model, last_blocks)) == expected


def test_the_rate_falls_as_a_cosine_and_rises_by_the_ramp() -> None:
    flat, cosine = TTTConfig(cosine=False, ramp=3.0, ramp_fraction=0.3), TTTConfig(cosine=True, ramp=1.0)
    assert [ttt.rate_factor(flat, chunk, 21) for chunk in (0, 3, 6, 20)] == pytest.approx([1, 2, 3, 3])
    assert [ttt.rate_factor(cosine, chunk, 5) for chunk in range(5)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0], abs=1e-12
    )
    both = TTTConfig(cosine=True, ramp=3.0, ramp_fraction=0.3)
    for chunk in range(474):
        expected = ttt.rate_factor(flat, chunk, 474) * ttt.rate_factor(cosine, chunk, 474)
        assert ttt.rate_factor(both, chunk, 474) == pytest.approx(expected, abs=1e-12)
    assert ttt.rate_factor(TTTConfig(cosine=False, ramp=3.0, ramp_fraction=0.0), 0, 9) == 3
    assert ttt.rate_factor(TTTConfig(), 0, 1) == 1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 20), st.integers(1, 40), st.integers(0, 40))
def test_every_target_of_the_chunk_weighs_once(start: int, size: int, after: int, length: int, context: int) -> None:
    chunk, n_tokens = Piece(start, start + size), start + size + after
    weights_N = torch.arange(1, n_tokens + 1).float()
    inputs, targets, given_weights = ttt.sequences(torch.arange(n_tokens), weights_N, chunk, length, context)
    fresh = min(length, chunk.stop - 1)
    seen = min(context, min(start, chunk.stop - fresh) - 1)
    assert inputs.shape == targets.shape == given_weights.shape == (-(-size // fresh), seen + fresh)
    assert not given_weights[:, :seen].any()
    assert torch.equal(targets, inputs + 1) and inputs.min() >= 0 and targets.max() == chunk.stop - 1
    summed = torch.zeros(n_tokens).index_add(0, targets.flatten(), given_weights.flatten())
    expected = torch.zeros(n_tokens)
    expected[chunk.start : chunk.stop] = weights_N[chunk.start : chunk.stop]
    assert torch.equal(summed, expected)


@pytest.mark.parametrize("clip", [0.1, 0.0])
def test_a_step_is_a_plain_adamw_step_on_the_weighted_loss(model: Model, clip: float) -> None:
    mine, plain = adapter(model, gradient_clip=clip), copy.deepcopy(model)
    trained = ttt.trained_parameters(plain, 1)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3, betas=(0.9, 0.999), weight_decay=0.0, foreach=False)
    for start, scale in ((5, 1), (60, 7)):
        inputs, targets, counts = ttt.sequences(tokens(), scale * weights(), Piece(start, start + 40), 16)
        mine.step(inputs, targets, counts)
        losses = F.cross_entropy(plain.logits(plain.features(inputs)).mT, targets, reduction="none")
        optimizer.zero_grad()
        ((losses * counts).sum() / counts.sum()).backward()
        assert torch.nn.utils.clip_grad_norm_(trained.values(), clip or 1e9) > 0.15
        optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(mine.model.get_parameter(name), parameter, rtol=1e-6, atol=1e-5, msg=name)
        assert torch.equal(parameter, model.get_parameter(name)) == (name not in trained)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_normalised_steps_divide_by_the_root_mean_square_of_the_gradients_so_far(model: Model, decay: float) -> None:
    mine, plain = adapter(model, normalise=True, decay=decay, gradient_clip=0.0), copy.deepcopy(model)
    trained, seen = ttt.trained_parameters(plain, 1), list[dict[str, Tensor]]()
    for start in (5, 60, 110):
        inputs, targets, counts = ttt.sequences(tokens(), weights(), Piece(start, start + 40), 16)
        mine.step(inputs, targets, counts)
        plain.zero_grad()
        losses = F.cross_entropy(plain.logits(plain.features(inputs)).mT, targets, reduction="none")
        ((losses * counts).sum() / counts.sum()).backward()
        seen.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        squares = {name: torch.stack([each[name] ** 2 for each in seen]).mean(0) for name in trained}
        floor = 0.1 * torch.cat([square.flatten() for square in squares.values()]).mean().sqrt()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter -= 2e-3 * seen[-1][name] / (squares[name].sqrt() + floor)
                parameter -= decay * (parameter - model.get_parameter(name))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(mine.model.get_parameter(name), parameter, rtol=1e-3, atol=2e-5, msg=name)
        assert torch.equal(parameter, model.get_parameter(name)) == (name not in trained)


def test_weights_drawn_back_to_the_shipped_ones_stay_near_them(model: Model) -> None:
    def distance(decay: float) -> float:
        learner = adapter(model, decay=decay)
        learner.learn(tokens(), weights(), Piece(1, 200))
        return sum(float((p.detach() - model.get_parameter(n).detach()).norm()) for n, p in learner.parameters.items())

    assert 0 < distance(0.5) < 0.5 * distance(0.0)


def test_learning_lowers_the_loss_and_moves_nothing_else(model: Model) -> None:
    before, text, weights_N = snapshot(model), tokens(), weights()
    learner = adapter(model)
    with torch.no_grad():
        start = loss(model, text, weights_N)
    for _ in range(3):
        learner.learn(text, weights_N, Piece(1, 200))
    with torch.no_grad():
        assert loss(learner.scorer, text, weights_N) < start - 0.1
    after = snapshot(learner.scorer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert torch.equal(after[name], before[name]) == (name not in learner.parameters), name
    assert learner.scorer is learner.model and learner.chunks_learned == 3


def test_all_weights_are_moved_when_last_blocks_is_zero(model: Model) -> None:
    learner = adapter(model, last_blocks=0)
    learner.learn(tokens(), weights(), Piece(1, 200))
    assert not any(torch.equal(parameter, model.get_parameter(name)) for name, parameter in learner.parameters.items())


def test_each_epoch_takes_every_sequence_at_the_rate_of_its_chunk(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, int, int]] = []
    learner = adapter(model, n_chunks=3, epochs=2, batch_sequences=2)
    monkeypatch.setattr(
        learner,
        "step",
        lambda inputs, targets, counts: seen.append(
            (learner.optimizer.param_groups[0]["lr"], len(inputs), int(counts.sum()))
        ),
    )
    weights_N = torch.ones(200)
    learner.learn(tokens(), weights_N, Piece(1, 81))
    learner.learn(tokens(), weights_N, Piece(81, 120))
    first, second = (2e-3 * ttt.rate_factor(learner.config, chunk, 3) for chunk in (0, 1))
    epochs = [(first, 2, 32), (first, 2, 32), (first, 1, 16)] * 2 + [(second, 2, 32), (second, 1, 7)] * 2
    assert seen == [(pytest.approx(rate), sequences, targets) for rate, sequences, targets in epochs]


def test_learning_reads_nothing_behind_the_chunk(model: Model) -> None:
    whole, cut = adapter(model), adapter(model)
    whole.learn(tokens(), weights(), Piece(70, 130))
    cut.learn(tokens()[:130], weights()[:130], Piece(70, 130))
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, cut.parameters[name]), name


def test_targets_without_bytes_teach_nothing(model: Model) -> None:
    learner = adapter(model)
    learner.learn(tokens(), torch.zeros(200), Piece(1, 200))
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in learner.parameters.items())


@pytest.mark.parametrize("polyak", [0.6, 0.998])
def test_the_scorer_is_the_average_of_the_shipped_and_the_trained_weights(model: Model, polyak: float) -> None:
    learner, text, weights_N = adapter(model, polyak=polyak), tokens(), weights()
    assert learner.scorer is not learner.model
    average = snapshot(model)
    for step in range(1, 6):
        learner.step(*ttt.sequences(text, weights_N, Piece(step, step + 60), 16))
        decay = min(polyak, step / (step + 1))
        for name, parameter in learner.model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    for name, parameter in learner.scorer.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-5, atol=1e-7, msg=name)
        if name not in learner.parameters:
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_nothing_is_learned_by_whoever_scores(model: Model) -> None:
    learner = adapter(model, polyak=0.9)
    assert all(torch.equal(parameter, model.get_parameter(n)) for n, parameter in learner.scorer.named_parameters())
    learner.learn(tokens(), weights(), Piece(1, 100))
    assert all(parameter.grad is None for parameter in [*learner.scorer.parameters(), *model.parameters()])
