"""Attention inside documents against the slow way: every document run through the model alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from hedgemix.model import attention, documents
from hedgemix.model.documents import Documents
from hedgemix.model.transformer import Model
from tests.hedgemix.model.test_transformer import SMALL, VOCAB, double  # noqa: F401

BOS = 3
ROWS = (
    "..b....b..bb.......b",  # one begins with the row's second token, one is BOS alone, one only begins
    "b......b............",
    "....................",
)


def build(layers: int = 2, context: int = 64, **overrides: Any) -> Model:
    """A small model in which every weight, gain, gate and scale matters."""
    torch.manual_seed(0)
    model = Model(replace(SMALL, layers=layers, within_documents=True, **overrides), VOCAB, context, bos_id=BOS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def rows(*patterns: str, seed: int = 1) -> Tensor:
    """Tokens at random, BOS where a pattern says so."""
    shape = len(patterns), len(patterns[0])
    tokens = torch.randint(BOS + 1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
    return tokens.masked_fill(torch.tensor([[c == "b" for c in pattern] for pattern in patterns]), BOS)


def spans(row_T: Tensor) -> list[tuple[int, int]]:
    """Where the documents of a row begin and stop."""
    begins = sorted({0, *(row_T == BOS).nonzero()[:, 0].tolist()})
    return list(zip(begins, [*begins[1:], len(row_T)], strict=True))


def alone(model: Model, tokens_BT: Tensor, band: int | None = None) -> Tensor:
    """Features (B, T, D) of each document run alone."""
    return torch.stack(
        [torch.cat([model.features(row[None, a:b], band)[0] for a, b in spans(row)]) for row in tokens_BT]
    )


def varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, *, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    window_size_left: int | None, window_size_right: int | None, is_causal: bool, **rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """In the place of the GPU's kernel, query by query, what its documentation says of sequences of any length: query i
    of Q sees the keys from i + K - Q - left to i + K - Q of its own sequence. Layout (B * T, H, E)."""
    assert rest == {"dropout_p": 0.0, "return_debug_mask": False}
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32 and cum_seq_q.shape == cum_seq_k.shape
    assert is_causal == (window_size_left is None) and window_size_right == (None if is_causal else 0)
    assert cum_seq_q[0] == cum_seq_k[0] == 0 and (cum_seq_q[-1], cum_seq_k[-1]) == (len(query), len(key))
    y, left = torch.full_like(query, math.nan), max_k if window_size_left is None else window_size_left
    for s in range(len(cum_seq_q) - 1):
        (a, Q), (b, K) = ((int(c[s]), int(c[s + 1] - c[s])) for c in (cum_seq_q, cum_seq_k))
        assert 0 <= Q <= min(K, max_q) and max_k >= K
        for i in range(Q):
            seen = slice(b + max(0, i + K - Q - left), b + i + K - Q + 1)
            scores = torch.einsum("he,khe->hk", query[a + i], key[seen]) / math.sqrt(query.shape[-1])
            y[a + i] = torch.einsum("hk,khe->he", scores.softmax(-1), value[seen])
    return y, torch.empty(0)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way, if the test's parameter says so."""
    if request.param:
        monkeypatch.setattr(attention, "windowed", lambda q: True)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen_kernel)


both_ways = pytest.mark.parametrize("kernel", [False, True], indirect=True, ids=["mask", "sequences"])
PARTS = pytest.mark.parametrize(
    "overrides",
    [{}, {"kv_heads": 2, "skips": False}, {"bigram_buckets": 0, "smear_gate": False, "xsa": False}],
    ids=["every part", "two key heads", "few parts"],
)


@pytest.mark.usefixtures("double", "kernel")
@both_ways
@PARTS
@pytest.mark.parametrize("band", [None, 4, 7])
def test_packed_rows_give_what_each_document_gives_alone(overrides: dict[str, Any], band: int | None) -> None:
    model, tokens = build(**overrides), rows(*ROWS)
    expected = alone(model, tokens, band)
    torch.testing.assert_close(model.features(tokens, band), expected, rtol=0, atol=1e-12)
    with torch.no_grad():  # other kernels on a CPU
        torch.testing.assert_close(model.features(tokens, band), expected, rtol=0, atol=1e-12)
    for last in (1, 9):
        part = model.features(tokens, band, last=last)
        torch.testing.assert_close(part, expected[:, -last:], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
@PARTS
@pytest.mark.parametrize("band", [None, 4])
@pytest.mark.parametrize("prefix", [1, 9])
def test_one_token_at_a_time_too(overrides: dict[str, Any], band: int | None, prefix: int) -> None:
    model, tokens = build(**overrides), rows(*ROWS)
    cache = model.start_cache(20, sequences=len(tokens))
    steps = [model.features(tokens[:, :prefix], band, cache=cache)]
    steps += [model.features(tokens[:, t : t + 1], band, cache=cache) for t in range(prefix, 20)]
    torch.testing.assert_close(torch.cat(steps, 1), alone(model, tokens, band), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double", "kernel")
@both_ways
def test_a_steps_gradient_is_the_sum_over_documents_alone() -> None:
    """Over more positions than a block of the hand-written attention has, and than one block's keys."""
    pattern = "." * 50 + "b" + "." * 30 + "b" + "." * 60 + "bb" + "." * 6
    model, tokens = build(context=256), rows(pattern, "b" + "." * 149, seed=2)
    targets = tokens.roll(-1, 1)
    model(tokens, targets).backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    for row, target in zip(tokens, targets, strict=True):
        for a, b in spans(row):
            model(row[None, a:b], target[None, a:b]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_documents_do_matter() -> None:
    model, tokens = build(), rows(*ROWS)
    across = Model(replace(model.config, within_documents=False), VOCAB, 64, bos_id=BOS)
    across.load_state_dict(model.state_dict())
    assert across.bos_id is None
    apart = (model.features(tokens) - across.features(tokens)).abs().amax(-1) > 1e-3
    first = [next((a for a, _ in spans(row)[1:]), 20) for row in tokens]
    assert apart.int().tolist() == [[int(t >= at) for t in range(20)] for at in first]


def test_a_model_within_documents_is_told_what_begins_them() -> None:
    model = Model(replace(SMALL, within_documents=True), VOCAB, 64)
    with pytest.raises(AssertionError, match="needs bos_id"):
        model.features(rows(ROWS[0]))


def test_compiled_it_is_one_graph_wherever_documents_begin() -> None:
    model, tokens = build(), rows(*ROWS)
    counter = CompileCounter()  # runs what torch.compile traced, as it is
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for given in (tokens, tokens.flip(0, 1)):
        torch.testing.assert_close(compiled(given, given), model(given, given), rtol=1e-6, atol=0)
    assert counter.frame_count == 1


def slow_edges(tokens_BT: Tensor, last: int) -> list[tuple[int, int]]:
    """How many of each document's positions are among the row's last ones, and how many there are."""
    T = tokens_BT.shape[1]
    return [(max(0, b - max(a, T - last)), b - a) for row in tokens_BT for a, b in spans(row)]


@pytest.mark.parametrize("last", [1, 5, 20])
def test_the_lengths_given_to_the_kernel(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = rows(*ROWS)
    given, expected = Documents(tokens, BOS).edges(last), slow_edges(tokens, last)
    assert [edges.diff().tolist() for edges in given] == [list(part) for part in zip(*expected, strict=True)]
    # Compiled, as many whatever the documents; those too many are empty.
    monkeypatch.setattr(documents, "TOKENS_A_DOCUMENT", 4)
    compiled = torch.compile(lambda x: Documents(x, BOS).edges(last), fullgraph=True, backend="eager")
    fixed = compiled(tokens)
    spare = documents.room(3, 20) - len(expected)
    assert spare > 0
    for edges, exact in zip(fixed, given, strict=True):
        assert edges.tolist() == exact.tolist() + exact[-1:].tolist() * spare
    with pytest.raises(RuntimeError, match="more documents than"):
        compiled(torch.full_like(tokens, BOS))


def test_the_kernel_is_called_as_torch_has_it() -> None:
    """Traced without data, with its gradient."""
    q, k, v = (
        torch.empty(3, 2, length, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for length in (5, 20, 20)
    )
    held = Documents(rows(*ROWS), BOS)
    held.made[-5, None] = torch.stack(held.edges(5)).to("meta")
    for band in (None, 4):
        y = attention.document_attention(q, k, v, band, held)
        assert y.shape == q.shape
        y.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape and v.grad is not None and v.grad.shape == v.shape


def test_what_a_gpu_has_is_asked_once_by_a_compiler() -> None:
    def choose(x: Tensor) -> Tensor:
        return x + 1 if attention.on_device(torch.bfloat16, 64, torch.device("cuda", 0)) else x - 1

    x = torch.zeros(2)
    expected = choose(x)
    assert torch.equal(torch.compile(choose, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("last", [7, 20])
@pytest.mark.parametrize("band", [None, 4])
def test_the_kernel_does_as_the_mask(band: int | None, last: int) -> None:
    draw, tokens = torch.Generator().manual_seed(0), rows(*ROWS).cuda()
    q, k, v = (torch.randn(3, 2, length, 64, generator=draw).cuda().bfloat16() for length in (last, 20, 20))
    assert attention.windowed(q)
    exact = attention.attention(q.float(), k.float(), v.float(), band, Documents(tokens, BOS))
    given = attention.attention(q, k, v, band, Documents(tokens, BOS))
    torch.testing.assert_close(given.float(), exact, rtol=0, atol=0.02)
