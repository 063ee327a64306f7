"""One token more, in NumPy, against the model run over the whole text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hedgemix.codec.model_step import ModelStep
from hedgemix.model.transformer import Model
from support.tiny_artifact import MODEL


@pytest.mark.parametrize("band", [None, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2, "layers": 3, "skips": True, "xsa": True, "input_mix": True},
        {"bigram_buckets": 0, "value_embedding_layers": 0, "smear_gate": False, "residual_scale": False},
        {
            "smear_by": "input",
            "head_gates": True,
            "layers": 3,
            "skip_gates": True,
            "lane_layers": 2,
        },
        {"layers": 4, "looped_layers": (1, 2), "lane_layers": 1, "value_embedding_layers": 3, "residual_scale": False},
        {"layers": 3, "looped_layers": (1, 2), "lane_layers": 2, "skip_gates": True, "input_mix": False},
        {"within_documents": True, "kv_heads": 2},
        {"within_documents": True, "layers": 3, "looped_layers": (1, 2), "smear_by": "input", "head_gates": True},
    ],
)
def test_rows_and_features_are_the_models(changes: dict[str, Any], band: int | None) -> None:
    torch.manual_seed(0)
    model = Model(replace(MODEL, **changes), 100, 64, bos_id=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        tokens = torch.randint(2, 100, (40,))
        tokens[[4, 17, 18, 30]] = 1  # before the cache's first step, and behind it
        features = model.features(tokens[None], band=band)[0]
        expected = torch.log_softmax(model.logits(features), -1)
        cache, step = model.start_cache(40), ModelStep(model)
        model.features(tokens[None, :10], band=band, cache=cache)
    for t in range(10, 40):
        row_V, feature_D = step(cache, int(tokens[t - 1]), int(tokens[t]), band)
        torch.testing.assert_close(row_V, expected[t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(feature_D, features[t], rtol=1e-5, atol=1e-5)
    assert cache.length == 40
