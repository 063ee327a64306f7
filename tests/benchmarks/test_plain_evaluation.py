"""The plain sliding evaluation against the fast one: the same nats for every target."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plain.evaluation import sliding_nats
from hedgemix.config import EvaluateConfig, ModelConfig
from hedgemix.evaluate.scoring_order import Piece, piece_rows, pieces
from hedgemix.model.transformer import Model


@pytest.mark.parametrize(("n_tokens", "window", "stride"), [(200, 32, 8), (203, 32, 8), (90, 16, 16), (20, 32, 5)])
def test_fast_sliding_windows_score_as_plain_ones_do(n_tokens: int, window: int, stride: int) -> None:
    generator = torch.manual_seed(0)
    config = ModelConfig(layers=3, width=32, heads=2, kv_heads=1, mlp_hidden=64, rope_dims=8, bigram_buckets=64)
    model, tokens = Model(config, 61, 32), torch.randint(61, (n_tokens,), generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    evaluation = EvaluateConfig(
        order="sliding", window_tokens=window, stride_tokens=stride, batch_windows=5, chunk_tokens=n_tokens,
        dtype="float32",
    )  # fmt: skip
    rows = [piece_rows(model, tokens, piece, evaluation) for piece in pieces(Piece(1, n_tokens), evaluation)]
    fast = -torch.cat(rows).gather(1, tokens[1:, None])[:, 0].double()
    torch.testing.assert_close(sliding_nats(model, tokens, window, stride, 5), fast, rtol=1e-5, atol=1e-5)
