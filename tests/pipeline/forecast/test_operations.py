"""Operations counted from shapes, against what torch counts of the same work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hedgemix.config import ModelConfig
from hedgemix.model.transformer import Linear, Model
from pipeline.forecast import operations


@pytest.mark.parametrize(
    ("parts", "looped", "passes"),
    [
        ({}, True, 3),
        ({"looped_layers": (0, 1), "head_gates": True, "lane_layers": 1}, True, 7),
        ({"looped_layers": (0, 1)}, False, 3),
    ],
)
def test_operations_are_those_that_torch_counts(parts: dict[str, Any], looped: bool, passes: int) -> None:
    """Matrix products of a forward pass; attention is left out by giving it no keys, and counted apart."""
    from torch.utils.flop_counter import FlopCounterMode

    config, vocab_size, T = ModelConfig(layers=3, width=64, heads=4, kv_heads=2, mlp_hidden=96, **parts), 300, 32
    model = Model(config, vocab_size, T)
    assert sorted(operations.matrix_shapes(config)) == sorted(
        tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, Linear) and n.startswith("blocks")
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long), torch.zeros(1, T, dtype=torch.long), looped=looped)
    matrix_products = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in matrix_products.items() if "mm" in str(op))
    assert products == T * operations.token_operations(config, 0, vocab_size, looped)
    attended = operations.token_operations(config, 10, 0, looped) - operations.token_operations(config, 0, 0, looped)
    assert attended == passes * 10 * 2 * 2 * 64  # keys, products with keys and values, two each, width
