"""The rounding that training passes through: its levels, and where a row is clipped."""

from __future__ import annotations

import math

import pytest
import torch

from hedgemix.model.linear import fake_quantize


def test_quantized_weights_have_31_levels_a_row() -> None:
    weight = torch.rand(40, 3000, generator=torch.Generator().manual_seed(0)) - 0.5
    weight[:, 7] *= 100  # one outlier a row
    weight *= torch.logspace(-4, 2, 40)[:, None]
    rounded = fake_quantize(weight)
    for row, original in zip(rounded, weight, strict=True):
        clip = original.abs().sort().values[2998]  # ceil(0.9995 * 3000) values are not clipped
        levels = row / clip * 15
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert set(levels.round().int().tolist()) == set(range(-15, 16))
        kept = original.abs() <= clip
        assert (row - original).abs()[kept].max() <= clip / 30 * 1.001 and kept.sum() == 2999


@pytest.mark.parametrize("columns", [1, 7, 512, 1792, 1999, 2000, 2001, 4000, 4001])
def test_the_quantized_weights_scale_is_a_sorted_rows_quantile(columns: int) -> None:
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns))
    weight[3] = 0
    ranked = weight.abs().sort(dim=1).values
    scale = ranked[:, math.ceil(0.9995 * columns) - 1, None].clamp_min(1e-8) / 15
    rounded = (weight / scale).round().clamp(-15, 15) * scale
    assert torch.equal(fake_quantize(weight), weight + (rounded - weight))
