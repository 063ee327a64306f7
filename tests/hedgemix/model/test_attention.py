"""Attention over a band, by a mask and by a kernel's window, against a mask over everything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hedgemix.model import attention
from hedgemix.model.attention import banded_attention
from tests.hedgemix.model.test_transformer import build, tokens_of


def flash_kernel(
    query: Tensor, key: Tensor, value: Tensor, *, window_size_left: int, window_size_right: int, **rest: Any
) -> tuple[Tensor, ...]:
    """In the place of the GPU's kernel, query by query, what its documentation says of a window: query i of Q sees the
    keys from i + K - Q - left to i + K - Q + right, if they are there. Layout (B, T, H, E)."""
    Q, K = query.shape[1], key.shape[1]
    assert rest == {
        "cum_seq_q": None, "cum_seq_k": None, "max_q": Q, "max_k": K,
        "dropout_p": 0.0, "is_causal": False, "return_debug_mask": False,
    }  # fmt: skip
    y = torch.empty_like(query)
    for i in range(Q):
        seen = slice(max(0, i + K - Q - window_size_left), min(K, i + K - Q + window_size_right + 1))
        scores = torch.einsum("bhe,bkhe->bhk", query[:, i], key[:, seen]) / math.sqrt(query.shape[-1])
        y[:, i] = torch.einsum("bhk,bkhe->bhe", scores.softmax(-1), value[:, seen])
    return y, torch.empty(0)


@pytest.fixture
def window_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way through banded attention, if the test's parameter says so."""
    if request.param:
        monkeypatch.setattr(attention, "windowed", lambda q: True)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_kernel)


both_ways = pytest.mark.parametrize("window_kernel", [False, True], indirect=True, ids=["mask", "window"])


@both_ways
@pytest.mark.usefixtures("window_kernel")
@pytest.mark.parametrize(("length", "band"), [(1, 1), (7, 1), (12, 4), (13, 4), (15, 4), (16, 5), (9, 8), (3, 10)])
def test_banded_attention_is_masked_attention(length: int, band: int) -> None:
    q, k, v = torch.randn(3, 2, 3, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position = torch.arange(length)
    mask = (position <= position[:, None]) & (position > position[:, None] - band)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(banded_attention(q, k, v, band), expected, rtol=0, atol=1e-13)
    for last in range(1, length):
        alone = banded_attention(q[:, :, -last:], k, v, band)
        torch.testing.assert_close(alone, expected[:, :, -last:], rtol=0, atol=1e-13)


def test_the_window_kernel_is_called_as_torch_has_it() -> None:
    q, k = (torch.empty(2, 3, length, 8, dtype=torch.bfloat16, device="meta") for length in (5, 12))
    assert attention.windowed_attention(q, k, k, 4).shape == q.shape


def test_where_there_is_a_window_kernel() -> None:
    assert attention.flash_takes(torch.bfloat16, 64, (9, 0)) and attention.flash_takes(torch.float16, 256, (8, 0))
    assert not attention.flash_takes(torch.float32, 64, (9, 0))
    assert not attention.flash_takes(torch.bfloat16, 64, (7, 5))
    assert not any(attention.flash_takes(torch.bfloat16, width, (9, 0)) for width in (4, 60, 264))
    assert not attention.windowed(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("queries", "keys", "band"), [(300, 300, 64), (300, 364, 64), (1, 200, 100), (200, 230, 100)])
def test_the_window_kernel_does_as_the_mask(queries: int, keys: int, band: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 64, generator=draw).cuda() for length in (queries, keys, keys))
    half = [x.bfloat16() for x in (q, k, v)]
    assert attention.windowed(half[0])
    expected = banded_attention(*(x.float() for x in half), band)
    torch.testing.assert_close(banded_attention(*half, band).float(), expected, rtol=0, atol=0.02)


@both_ways
@pytest.mark.usefixtures("window_kernel")
@pytest.mark.parametrize("band", [None, 5, 19, 40])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"kv_heads": 2, "skips": False, "input_mix": False, "xsa": False},
        {"smear_by": "input", "head_gates": True, "skip_gates": True, "looped_layers": (1, 2)},
        {"lane_layers": 2, "looped_layers": (3, 4), "head_gates": True},
    ],
)
def test_the_last_positions_alone_are_those_of_the_whole(overrides: dict[str, Any], band: int | None) -> None:
    model, tokens = build(**overrides).double(), tokens_of(2, 33)
    whole = model.features(tokens, band)
    for last in (1, 4, 5, 6, 32, 33):
        torch.testing.assert_close(model.features(tokens, band, last=last), whole[:, -last:], rtol=0, atol=1e-12)
