"""Scoring order: every target once and in order, each behind the context that it is promised, and blind to the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hedgemix.config import EvaluateConfig, ModelConfig
from hedgemix.evaluate.scoring_order import Piece, chunk_rows, chunks, cut, piece_rows, pieces
from hedgemix.model.transformer import Model

VOCAB, WINDOW, BOS = 61, 16, 1
DOCUMENTS = 21, 1, 3 * WINDOW + 4, 2, WINDOW, 40
"""Tokens of each; of some more than the context, than a segment and than a chunk's rest."""


class Witness(nn.Module):
    """In the place of a model: its rows tell the first and the last token of the context they were made from."""

    vocab_size = 3

    def __init__(self, band: int | None) -> None:
        super().__init__()
        self.band = band

    def features(self, tokens_BT: Tensor, last: int, band: int | None = None) -> Tensor:
        assert band == self.band
        first_BT = tokens_BT[:, :1].expand_as(tokens_BT)
        return torch.stack([first_BT, tokens_BT, torch.zeros_like(tokens_BT)], -1).double()[:, -last:]

    def logits(self, features: Tensor) -> Tensor:
        return features


def contexts(n_tokens: int, config: EvaluateConfig) -> list[list[tuple[int, int]]]:
    """(first, last) position of each target's context, by chunk."""
    witness = Witness(config.window_tokens if config.order == "streaming" else None)
    seen = []
    for chunk in chunks(n_tokens, config.chunk_tokens):
        parts = [rows["w"] for _, rows in chunk_rows({"w": witness}, torch.arange(n_tokens), chunk, config)]
        rows = torch.cat(parts)
        seen.append([(first, last) for first, last in (rows[:, :2] - rows[:, 2:]).round().int().tolist()])
    return seen


@st.composite
def evaluations(draw: st.DrawFn, order: str) -> tuple[int, EvaluateConfig]:
    window = draw(st.integers(1, 40))
    return draw(st.integers(2, 160)), EvaluateConfig(
        order=order,
        window_tokens=window,
        stride_tokens=draw(st.integers(1, window)),
        segment_tokens=draw(st.integers(1, 60)),
        overlap_tokens=draw(st.integers(0, 50)),
        batch_windows=draw(st.integers(1, 5)),
        chunk_tokens=draw(st.integers(1, 200)),
        dtype="float32",
    )


@settings(max_examples=200, deadline=None)
@given(evaluations("streaming") | evaluations("sliding"))
def test_every_target_is_scored_once_and_in_order(case: tuple[int, EvaluateConfig]) -> None:
    n_tokens, config = case
    found = chunks(n_tokens, config.chunk_tokens)
    assert [t for chunk in found for t in range(chunk.start, chunk.stop)] == list(range(1, n_tokens))
    assert all(chunk.stop % config.chunk_tokens == 0 for chunk in found[:-1])
    for chunk in found:
        parts = pieces(chunk, config)
        assert [t for part in parts for t in range(part.start, part.stop)] == list(range(chunk.start, chunk.stop))
        assert all(part.start < part.stop for part in parts)


@pytest.mark.parametrize("start", [1, 7])
def test_nothing_is_cut_into_nothing(start: int) -> None:
    assert cut(start, start, 5) == [] and chunks(1, 5) == [] and chunks(0, 5) == []


@settings(max_examples=100, deadline=None)
@given(evaluations("streaming"))
def test_streaming_runs_the_overlap_again_in_front_of_each_segment(case: tuple[int, EvaluateConfig]) -> None:
    n_tokens, config = case
    for chunk, seen in zip(chunks(n_tokens, config.chunk_tokens), contexts(*case), strict=True):
        for target, context in enumerate(seen, start=chunk.start):
            segment = max(chunk.start, target // config.segment_tokens * config.segment_tokens)
            assert context == (max(0, segment - 1 - config.overlap_tokens), target - 1)


@settings(max_examples=150, deadline=None)
@given(evaluations("sliding"))
def test_sliding_gives_each_target_its_window(case: tuple[int, EvaluateConfig]) -> None:
    n_tokens, config = case
    window, stride = config.window_tokens, config.stride_tokens
    for chunk, seen in zip(chunks(n_tokens, config.chunk_tokens), contexts(*case), strict=True):
        full = max(chunk.start, window + 1)
        for target, (first, last) in enumerate(seen, start=chunk.start):
            assert last == target - 1
            if target <= window:
                assert first == 0
            else:
                stop = min(full + ((target - full) // stride + 1) * stride, chunk.stop)
                assert first == stop - 1 - window
                assert window - stride + 1 <= last + 1 - first <= window


@pytest.mark.parametrize(("n_tokens", "window", "stride"), [(200, 32, 8), (203, 32, 8), (150, 16, 5), (40, 64, 8)])
def test_one_chunk_is_cut_as_the_reference_cuts_the_text(n_tokens: int, window: int, stride: int) -> None:
    """Windows begin at multiples of the stride; all but the first score their last `stride` targets. The tail that
    no full window ends in is scored once, by the window that ends with the text."""
    first: dict[int, int] = {}
    for begin in range(0, n_tokens - window, stride):
        targets = range(1 if begin == 0 else begin + window - stride + 1, begin + window + 1)
        first.update(dict.fromkeys(targets, begin))
    tail = max(0, n_tokens - 1 - window)
    config = EvaluateConfig(
        order="sliding", window_tokens=window, stride_tokens=stride, batch_windows=3, chunk_tokens=n_tokens
    )
    (seen,) = contexts(n_tokens, config)
    assert [begin for begin, _ in seen] == [first.get(target, tail) for target in range(1, n_tokens)]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2, width=32, heads=2, kv_heads=1, mlp_hidden=64, rope_dims=8, bigram_buckets=128, bigram_width=16,
        value_embedding_layers=1, value_embedding_width=16,
    )  # fmt: skip
    model = Model(config, VOCAB, 2 * WINDOW)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # no table or gate is left at zero
    return model


def tokens(n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (n_tokens,), generator=torch.manual_seed(seed))


def evaluation(order: str, **changes: int) -> EvaluateConfig:
    sizes = {"window_tokens": WINDOW, "stride_tokens": 5, "segment_tokens": 37, "overlap_tokens": 20}
    return EvaluateConfig(order=order, dtype="float32", **{**sizes, "batch_windows": 3, "chunk_tokens": 90, **changes})


def all_rows(model: Model, text: Tensor, config: EvaluateConfig) -> Tensor:
    """The rows of the targets 1 .. N - 1."""
    return torch.cat(
        [
            rows["m"]
            for c in chunks(len(text), config.chunk_tokens)
            for _, rows in chunk_rows({"m": model}, text, c, config)
        ]
    )


def last_row(model: Model, context: Tensor, band: int | None = None) -> Tensor:
    with torch.no_grad():
        return model.logits(model.features(context[None], band)[0, -1]).log_softmax(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 90, 1000])
def test_sliding_rows_equal_a_loop_over_targets(model: Model, chunk_tokens: int) -> None:
    text, config = tokens(150), evaluation("sliding", chunk_tokens=chunk_tokens)
    begins = [first for chunk in contexts(len(text), config) for first, _ in chunk]
    expected = torch.stack([last_row(model, text[begin:target]) for target, begin in enumerate(begins, start=1)])
    torch.testing.assert_close(all_rows(model, text, config), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("segment", "chunk"), [(37, 90), (16, 64), (1, 50), (500, 500)])
def test_streaming_rows_equal_one_long_pass(model: Model, segment: int, chunk: int) -> None:
    text = tokens(300)
    config = evaluation("streaming", segment_tokens=segment, chunk_tokens=chunk, overlap_tokens=2 * WINDOW)
    with torch.no_grad():
        expected = model.logits(model.features(text[None, :-1], band=WINDOW)[0]).log_softmax(-1)
    torch.testing.assert_close(all_rows(model, text, config), expected, rtol=1e-5, atol=1e-5)


def test_an_overlap_too_short_for_the_band_shows(model: Model) -> None:
    text = tokens(300)
    enough, short = (
        all_rows(model, text, evaluation("streaming", overlap_tokens=n)) for n in (2 * WINDOW, WINDOW // 2)
    )
    assert (enough - short).abs().max() > 1e-3


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_a_document_longer_than_the_context_goes_on_and_sees_itself_alone(model: Model, order: str) -> None:
    """By a loop over targets: the document so far, run alone by a model that knows of none; by windows what they have
    of it."""
    within = Model(replace(model.config, within_documents=True), VOCAB, 2 * WINDOW, bos_id=BOS)
    within.load_state_dict(model.state_dict())
    text = tokens(sum(DOCUMENTS)).clamp_min(BOS + 1)
    begins = [sum(DOCUMENTS[:number]) for number in range(len(DOCUMENTS))]
    text[begins] = BOS
    config, expected = evaluation(order, overlap_tokens=2 * WINDOW), []
    for target, first in enumerate((first for chunk in contexts(len(text), config) for first, _ in chunk), start=1):
        begin = max(begin for begin in begins if begin < target)
        sliding = order == "sliding"
        context = text[max(begin, first) if sliding else begin : target]
        expected.append(last_row(model, context, None if sliding else WINDOW))
    torch.testing.assert_close(all_rows(within, text, config), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_rows_are_distributions(model: Model, order: str) -> None:
    rows = all_rows(model, tokens(200), evaluation(order))
    assert rows.dtype == torch.float32 and rows.shape == (199, VOCAB)
    assert rows.double().logsumexp(1).abs().max() < 1e-5


@pytest.mark.parametrize("order", ["streaming", "sliding"])
@pytest.mark.parametrize("t", [1, 16, 17, 90, 131, 199])
def test_the_target_and_the_future_change_no_row(model: Model, order: str, t: int) -> None:
    text = tokens(200)
    changed = torch.cat([text[:t], (text[t:] + 1 + tokens(200 - t, seed=1) % (VOCAB - 1)) % VOCAB])
    assert not (text[t:] == changed[t:]).any()
    before, after = (all_rows(model, each, evaluation(order)) for each in (text, changed))
    assert torch.equal(before[:t], after[:t])
    assert t == 199 or not torch.equal(before[t], after[t])


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_a_piece_needs_no_token_from_its_last_target_on(model: Model, order: str) -> None:
    text, config = tokens(200), evaluation(order)
    for chunk in chunks(len(text), config.chunk_tokens):
        for piece in pieces(chunk, config):
            rows = piece_rows(model, text, piece, config)
            assert torch.equal(piece_rows(model, text[: piece.stop - 1], piece, config), rows)


def test_models_are_scored_side_by_side(model: Model) -> None:
    other, text, config = Model(model.config, VOCAB, 2 * WINDOW), tokens(80), evaluation("streaming")
    for piece, rows in chunk_rows({"a": model, "b": other}, text, Piece(1, 80), config):
        assert torch.equal(rows["a"], piece_rows(model, text, piece, config))
        assert torch.equal(rows["b"], piece_rows(other, text, piece, config))


def test_bfloat16_rows_are_close_and_still_normalised_in_float32(model: Model) -> None:
    text = tokens(100)
    exact, rough = (all_rows(model, text, EvaluateConfig(dtype=kind)) for kind in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32 and rough.double().logsumexp(1).abs().max() < 1e-5
    assert 0 < (exact - rough).abs().mean() < 0.05
