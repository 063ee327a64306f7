"""The default export: steps from what weights matter, to a loss or to a size, and that both come out as promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact import tensors as artifact_tensors
from hedgemix.artifact.load_model import load_model
from hedgemix.artifact.tensors import Stepped
from hedgemix.config import QuantizeConfig, RecipeError
from hedgemix.quantize import bit_allocation, quantizer
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.fit_to_size import CLOSE_ENOUGH, MOST_TRIES, fit_to_size
from hedgemix.quantize.quantizer import quantize_model
from support import tiny_artifact
from support.tiny_model import LENGTH, VOCAB, Trained, make, restored

UNBOUND = 10**9
Q = "blocks.1.attention.q.weight"


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make()


def packed(trained: Trained) -> Callable[..., bytes]:
    header = {"model": asdict(trained.model.config), "vocab_size": VOCAB, "context_tokens": LENGTH}
    return partial(artifact.pack, header, b"tokenizer", zstd_level=1)


def export(trained: Trained, target: int = UNBOUND, **changes: Any) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Tensors, report and bytes."""
    pack = packed(trained)
    tensors, report = quantize_model(
        trained.model, trained.moments, QuantizeConfig(**changes), target, lambda tensors: len(pack(tensors=tensors))
    )
    return tensors, report, len(pack(tensors=tensors))


@pytest.fixture(scope="module")
def exported(trained: Trained) -> tuple[dict[str, Any], dict[str, Any], int]:
    """With the default settings; not to be changed."""
    return export(trained)


@torch.no_grad()
def divergence(trained: Trained, tensors: dict[str, Any]) -> float:
    """Mean KL, in nats, of the quantized model from the trained one."""
    exact, found = (
        model.logits(model.features(trained.inputs)).log_softmax(-1)
        for model in (trained.model, restored(trained.model, tensors))
    )
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def changed(trained: Trained, **tensors: tuple[str, Tensor]) -> Trained:
    """Other columns or rows, (name, value), of the moments."""
    parts = {part: getattr(trained.moments, part) | dict([pair]) for part, pair in tensors.items()}
    return trained._replace(moments=replace(trained.moments, **parts))


def test_matrices_and_tables_get_steps_and_the_rest_is_float16(
    trained: Trained, exported: tuple[dict[str, Any], dict[str, Any], int]
) -> None:
    tensors, _, _ = exported
    assert list(tensors) == [name for name, _ in trained.model.named_parameters()]
    for name, parameter in trained.model.named_parameters():
        if parameter.dim() == 2 and min(parameter.shape) >= 16:
            assert isinstance(tensors[name], Stepped) and tensors[name].codes.shape == parameter.shape, name
        else:
            assert torch.equal(tensors[name], parameter.half()), name


@pytest.mark.parametrize("nats", [2e-3, 5e-4])
def test_the_loss_is_the_one_asked_for(trained: Trained, nats: float) -> None:
    tensors, report, _ = export(trained, loss_nats=nats)
    assert report["expected_loss_nats"] == pytest.approx(nats) and report["tries"] == 1
    assert 0.5 < divergence(trained, tensors) / nats < 2


def test_bytes_are_those_asked_for_and_cost_what_was_expected(
    trained: Trained, exported: tuple[dict[str, Any], dict[str, Any], int]
) -> None:
    _, _, most = exported
    losses = []
    for share in (0.9, 0.7, 0.5):
        target = int(share * most)
        tensors, report, size = export(trained, target)
        assert (1 - CLOSE_ENOUGH) * target <= size <= target and report["tries"] <= 5
        losses.append(divergence(trained, tensors))
        assert share < 0.6 or 0.5 < losses[-1] / report["expected_loss_nats"] < 2
    assert losses[0] < losses[1] < losses[2]


def test_better_than_the_reference_in_bytes_and_in_loss(trained: Trained) -> None:
    pack = packed(trained)
    reference, _ = quantize_model(trained.model, trained.moments, QuantizeConfig(method="reference"), 0, len)
    size, loss = len(pack(tensors=reference)), divergence(trained, reference)
    tensors, _, same = export(trained, size, loss_nats=1e-7)
    assert same <= size and divergence(trained, tensors) < 0.1 * loss  # measured: 0.03
    assert export(trained, loss_nats=0.9 * loss)[2] < 0.7 * size  # measured: 0.61


def test_what_is_impossible_names_the_fields() -> None:
    model, moments = tiny_artifact.untrained()
    pack = partial(artifact.pack, {"model": asdict(model.config)}, b"tokenizer", zstd_level=1)
    with pytest.raises(RecipeError, match=r"quantize\.target_bytes or limits\.total_bytes"):
        quantize_model(model, moments, QuantizeConfig(), 1000, lambda tensors: len(pack(tensors=tensors)))


def test_equal_inputs_share_a_factor(trained: Trained) -> None:
    attention = [f"blocks.1.attention.{part}.weight" for part in ("q", "k", "v")]
    known, _ = quantizer.sensitivities(trained.model, trained.moments, [*attention, "embedding.weight"], 0.01)
    assert all(known[name].back_CC is known[Q].back_CC for name in attention)
    assert known["embedding.weight"].back_CC is not known[Q].back_CC
    assert {part.split(".")[-2] for part in trained.model.inputs()[Q]} == {"q", "k", "v"}


def test_inputs_never_active_do_no_harm(trained: Trained) -> None:
    dead = trained.moments.columns[Q].clone()
    dead[:5] = dead[:, :5] = 0
    tensors, _, _ = export(changed(trained, columns=(Q, dead)))
    weight, found = trained.model.get_parameter(Q), artifact_tensors.stepped_weights(tensors[Q])
    assert found.isfinite().all() and (found - weight).norm() < 0.1 * weight.norm()
    tensors, _, _ = export(changed(trained, columns=(Q, torch.zeros_like(dead)), rows=(Q, torch.zeros(64))))
    assert artifact_tensors.stepped_weights(tensors[Q]).isfinite().all()


def test_moments_of_one_input_are_damped_and_indefinite_ones_refused(trained: Trained) -> None:
    one = torch.outer(*[torch.arange(1.0, 65)] * 2)
    _, report, _ = export(changed(trained, columns=(Q, one)), damping=0.0)
    assert 1e-6 <= report["largest_damping"] <= 1e-2
    with pytest.raises(ValueError, match=f"{Q}: no damping"):
        export(changed(trained, columns=(Q, torch.eye(64) - 20 * (1 - torch.eye(64)))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(trained: Trained, bad: float) -> None:
    for moments in (
        changed(trained, columns=(Q, torch.full((64, 64), bad))),
        changed(trained, rows=(Q, torch.full((64,), bad))),
    ):
        with pytest.raises(ValueError, match=f"{Q}: its calibration is not finite"):
            export(moments)
    model = restored(trained.model, dict(trained.model.named_parameters()))
    with torch.no_grad():
        model.get_parameter(Q)[0, 0] = bad
    with pytest.raises(ValueError, match=f"{Q}: its weights are not all finite"):
        export(trained._replace(model=model))


def test_weights_of_too_many_steps_are_refused(trained: Trained) -> None:
    model = restored(trained.model, dict(trained.model.named_parameters()))
    with torch.no_grad():
        model.get_parameter(Q)[0, 0] = 1e6
    with pytest.raises(ValueError, match=rf"{Q}: over 4,194,304 steps to a weight; raise quantize\.loss_nats"):
        export(trained._replace(model=model), loss_nats=1e-12)


def test_the_artifact_gives_back_the_same_model_bitwise(trained: Trained, tmp_path: Path) -> None:
    before = {name: parameter.detach().clone() for name, parameter in trained.model.named_parameters()}
    tensors, _, size = export(trained)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.model.named_parameters())
    (tmp_path / "model.hmx").write_bytes(packed(trained)(tensors=tensors))
    assert size == (tmp_path / "model.hmx").stat().st_size
    loaded, expected = load_model(artifact.read(tmp_path / "model.hmx")), restored(trained.model, tensors)
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_steps_follow_the_rule_and_its_inverse() -> None:
    assert bit_allocation.loss_of(bit_allocation.theta_for(3e-4, 12345), 12345) == pytest.approx(3e-4)
    generator = torch.manual_seed(0)
    rows, pivots = (10 ** torch.randn(n, generator=generator) for n in (30, 50))
    found = bit_allocation.indices(bit_allocation.Sensitivity(rows, pivots, torch.eye(50)), 0.01)
    steps = artifact_tensors.steps(found[0])[:, None] * artifact_tensors.steps(found[1])
    ratio = steps * (rows[:, None] * pivots).sqrt() / 0.01
    assert ratio.log2().abs().max() <= 1 / 8 + 1e-4


def test_steps_out_of_range_are_clamped() -> None:
    known = bit_allocation.Sensitivity(torch.tensor([1e-30, 1e30]), torch.tensor([1e-30, 1e30]), torch.eye(2))
    assert [part.tolist() for part in bit_allocation.indices(known, 1.0)] == [[127, -127], [127, -127]]


def falling(floor: int, weights: int) -> Callable[[float], tuple[dict[str, Any], int]]:
    """Bytes that fall by a bit a weight for each octave of theta at first, and flatten out above a floor."""
    calls: list[float] = []

    def at(theta: float) -> tuple[dict[str, Any], int]:
        calls.append(theta)
        bits = torch.tensor(0.01 / theta).square().add(1).log2().item() / 2
        return {"theta": theta, "calls": calls}, floor + int(weights * bits / 8)

    return at


@pytest.mark.parametrize("floor", [0, 10_000])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.4, 0.2, 0.1])
def test_the_search_for_a_size_is_short_and_stays_below(floor: int, share: float) -> None:
    at = falling(floor, 1_000_000)
    target = floor + int(share * (at(1e-4)[1] - floor))
    theta, tensors, tries = fit_to_size(1e-4, falling(floor, 1_000_000), target, 1_000_000)
    assert tensors["theta"] == theta == tensors["calls"][-1] and len(tensors["calls"]) == tries
    assert (1 - CLOSE_ENOUGH) * target <= at(theta)[1] <= target
    assert tries <= (4 if share >= 0.4 else 6)


def test_the_search_begins_with_what_fits() -> None:
    theta, _, tries = fit_to_size(1e-4, falling(0, 1_000_000), UNBOUND, 1_000_000)
    assert (theta, tries) == (pytest.approx(1e-4), 1)


def test_the_search_takes_what_fits_of_a_size_with_jumps() -> None:
    """Of sizes 90 or 50 none is close to 70."""

    def at(theta: float) -> tuple[dict[str, Any], int]:
        return {"size": 90 if theta < 0.1 else 50}, 90 if theta < 0.1 else 50

    theta, tensors, tries = fit_to_size(0.01, at, 70, 100)
    assert tensors["size"] == 50 and theta >= 0.1 and tries == MOST_TRIES


def test_the_search_gives_up_on_what_never_fits() -> None:
    with pytest.raises(RecipeError, match=r"quantize\.target_bytes or limits\.total_bytes"):
        fit_to_size(1e-4, falling(10_000, 1_000_000), 9_999, 1_000_000)


def test_moments_of_a_model_cover_every_matrix(trained: Trained) -> None:
    quantized = {name for name, each in trained.model.named_parameters() if quantizer.is_quantized(each)}
    assert isinstance(trained.moments, Moments) and trained.moments.rows.keys() == quantized
