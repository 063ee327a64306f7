"""The reference export: what each tensor becomes, and that nothing is lost after it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.config import QuantizeConfig
from hedgemix.model.transformer import Model
from hedgemix.quantize import published_export, quantizer
from hedgemix.quantize.published_export import Quantized
from support.tiny_model import LENGTH, SEQUENCES, VOCAB, Trained, make, restored

TABLES = ("bigram.table.weight",)
LARGE = (*TABLES, *(f"blocks.{block}.mlp.{part}.weight" for block in (0, 1) for part in ("up", "down")))
CONFIG = QuantizeConfig()


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make()


def quantized(trained: Trained, **changes: Any) -> dict[str, Any]:
    config = QuantizeConfig(method="reference", **changes)
    return quantizer.quantize_model(trained.model, trained.moments, config, 0, len)[0]


def with_columns(trained: Trained, columns: dict[str, Tensor]) -> Trained:
    """Other Hessians for some inputs."""
    return trained._replace(moments=replace(trained.moments, columns=trained.moments.columns | columns))


@torch.no_grad()
def loss(trained: Trained, model: Model) -> float:
    return float(model(trained.inputs, trained.targets)) / trained.targets.numel()


def test_every_parameter_becomes_what_its_kind_asks_for(trained: Trained) -> None:
    tensors = quantized(trained)
    assert list(tensors) == [name for name, _ in trained.model.named_parameters()]
    for name, parameter in trained.model.named_parameters():
        tensor = tensors[name]
        if name in trained.model.matrices() or name in TABLES:
            assert isinstance(tensor, Quantized) and tensor.codes.shape == parameter.shape, name
            assert tensor.codes.abs().max() == (127 if name in TABLES else 15), name
        elif parameter.dim() == 2 and min(parameter.shape) >= 16:
            assert tensor.dtype == torch.float16 and torch.equal(tensor, parameter.half()), name
        else:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, parameter), name


def test_bits_are_those_of_the_recipe(trained: Trained) -> None:
    tensors = quantized(trained, matrix_bits=3, table_bits=4)
    largest = {name: int(t.codes.abs().max()) for name, t in tensors.items() if isinstance(t, Quantized)}
    assert largest == dict.fromkeys(trained.model.matrices(), 3) | dict.fromkeys(TABLES, 7)


def test_calibration_averages_the_inputs_of_every_matrix(trained: Trained) -> None:
    model, seen = trained.model, {}
    columns = trained.moments.columns
    assert set(columns) - set(model.inputs()) == {
        "embedding.weight", "bigram.table.weight", "bigram.project.weight",
        "value_embedding.table.weight", "value_embedding.project.weight",
    }  # fmt: skip

    def watch(name: str) -> Any:
        return lambda module, arguments: seen.update({name: arguments[0].flatten(0, 1).double()})

    hooks = [matrix.register_forward_pre_hook(watch(name)) for name, matrix in model.matrices().items()]
    with torch.no_grad():
        model.features(trained.inputs)
    for hook in hooks:
        hook.remove()
    for owner, names in model.inputs().items():
        for name in names:
            mean = seen[name].mT @ seen[name] / (SEQUENCES * LENGTH)
            torch.testing.assert_close(columns[owner].double(), mean, rtol=1e-4, atol=1e-6)


def test_q_k_and_v_share_one_hessian_and_nothing_else_reads_it(trained: Trained) -> None:
    attention = [f"blocks.1.attention.{part}.weight" for part in ("q", "k", "v")]
    assert trained.model.inputs()[attention[0]] == attention
    generator = torch.manual_seed(3)
    other = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    changed = with_columns(trained, {attention[0]: other.mT @ other})
    before, after = quantized(trained), quantized(changed)
    for name in trained.model.matrices():
        assert torch.equal(before[name].codes, after[name].codes) == (name not in attention), name


def test_matrices_of_a_batch_equal_matrices_alone(trained: Trained) -> None:
    tensors, model = quantized(trained), trained.model
    for owner, names in model.inputs().items():
        for name in names:
            alone = published_export.quantize_matrices(
                model.get_parameter(name), trained.moments.columns[owner], 1, bits=5, damping=CONFIG.damping,
                block_columns=CONFIG.block_columns, clip_quantiles=CONFIG.clip_quantiles, scale_floor=0.0,
            )  # fmt: skip
            assert torch.equal(tensors[name].scale, alone.scale), name
            assert (tensors[name].codes != alone.codes).float().mean() < 1e-3, name


@pytest.mark.parametrize("bits", [5, 3])
def test_gptq_costs_less_than_rounding_to_nearest(trained: Trained, bits: int) -> None:
    tensors = quantized(trained, matrix_bits=bits)
    rounded = tensors | {
        name: published_export.round_rows(trained.model.get_parameter(name), bits, CONFIG.clip_quantiles)
        for name in trained.model.matrices()
    }
    exact = loss(trained, trained.model)
    best, plain = (abs(loss(trained, restored(trained.model, each)) - exact) for each in (tensors, rounded))
    assert exact < 4 and best < 0.75 * plain  # measured: 0.46 of it at 5 bits, 0.49 at 3


def test_the_artifact_gives_back_the_same_model_bitwise(trained: Trained, tmp_path: Path) -> None:
    model, tensors = trained.model, quantized(trained)
    header = {"model": asdict(model.config), "vocab_size": VOCAB, "context_tokens": LENGTH}
    size = artifact.write(tmp_path / "model.hmx", header, b"tokenizer", tensors, CONFIG.zstd_level)
    assert size == (tmp_path / "model.hmx").stat().st_size < 2 * sum(p.numel() for p in model.parameters())
    loaded, expected = load_model(artifact.read(tmp_path / "model.hmx")), restored(model, tensors)
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    with torch.no_grad():
        assert torch.equal(
            loaded.logits(loaded.features(trained.inputs)), expected.logits(expected.features(trained.inputs))
        )


def test_the_scale_floor_holds_every_row_of_the_matrices(trained: Trained) -> None:
    floor = 1 / 15
    free, floored = quantized(trained), quantized(trained, scale_floor=floor)
    for name in trained.model.matrices():
        assert free[name].scale.min() < floor - 0.01 and floored[name].scale.min() >= floor - 1e-4, name
    for name in TABLES:
        assert torch.equal(free[name].codes, floored[name].codes), name


@pytest.mark.parametrize("fraction", [0.03, 0.4])
def test_the_smallest_weights_of_large_tensors_are_pruned(trained: Trained, fraction: float) -> None:
    """With identity Hessians no error moves to another column, so what was pruned stays zero."""
    ready = with_columns(trained, {name: torch.eye(len(each)) for name, each in trained.moments.columns.items()})
    kept, pruned = (quantized(ready, clip_quantiles=(1.0,), prune_fraction=each) for each in (0.0, fraction))
    for name, parameter in trained.model.named_parameters():
        before, after = (getattr(each[name], "codes", each[name]).flatten() for each in (kept, pruned))
        if name in LARGE:
            smallest = parameter.abs().flatten().argsort()[: int(fraction * parameter.numel())]
            before = before.index_fill(0, smallest, 0)
        assert torch.equal(after, before), name
        assert (name in LARGE) == (parameter.dim() == 2 and parameter.numel() > published_export.TABLE_ELEMENTS), name


def test_the_model_itself_is_left_alone(trained: Trained) -> None:
    before = {name: parameter.detach().clone() for name, parameter in trained.model.named_parameters()}
    quantized(trained, prune_fraction=0.5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.model.named_parameters())


def test_the_report_names_the_largest_damping(trained: Trained) -> None:
    flat = {name: torch.eye(len(each)) for name, each in trained.moments.columns.items()}
    one_input = {"blocks.1.mlp.up.weight": torch.outer(*[torch.arange(1.0, 65)] * 2)}  # cannot be factored as it is
    config = QuantizeConfig(method="reference", damping=0.0)
    for given, least, most in ((flat, 0.0, 0.0), (flat | one_input, 1e-6, 1e-2)):
        moments = with_columns(trained, given).moments
        _, report = quantizer.quantize_model(trained.model, moments, config, 0, len)
        assert least <= report["largest_damping"] <= most and report["gptq_seconds"] > 0
