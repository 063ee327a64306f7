"""The index on the device: rows, classes and counts bitwise those of the mapped one, and no word between the two."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import MixerConfig
from hedgemix.data import tokenizer
from hedgemix.experts import match, ngram_index
from hedgemix.experts.device_index import Resident
from hedgemix.experts.ngram import NgramRows
from hedgemix.experts.ngram_index import NgramIndex
from hedgemix.mixers.batch_mixer import BatchMixer
from support.no_host_sync import unattended
from support.text_data import documents, processor

VOCAB = 7
streams = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60).map(np.array)
repetitive = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(2, 12)).map(
    lambda pair: np.tile(pair[0], pair[1])
)
order_sets = st.sampled_from([(1,), (1, 2, 3), (2, 4), (3,), (1, 2, 3, 4, 5, 6)])
CONFIG = MixerConfig(orders=(1, 2, 3, 4), match_lengths=(3, 5), block_tokens=16)


def mapped_rows(mapped: NgramRows, start: int, stop: int) -> torch.Tensor:
    rows, matches = mapped.rows(start, stop), mapped.index.match
    if matches.lengths:
        rows.append(match.rows(matches, rows[-1], start, stop))
    return torch.stack(rows, 1)


def resident_rows(here: Resident, index: NgramIndex, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    text_3B = here.text(start, stop).long()
    p_BKV = torch.full((stop - start, len(index.orders) + bool(index.match.lengths), index.vocab_size), torch.nan)
    here.fill(p_BKV, text_3B, start, stop, bool(index.match.lengths))
    return p_BKV, text_3B


def slow_sizes(index: NgramIndex, start: int, stop: int) -> tuple[list[int], int]:
    """Pairs and repeats of a span, one position after another."""
    repeats = 0
    for n, table in index.tables.items():
        known = n - 1 - len(index.memory_M)
        contexts = [int(table.first_N[t]) if t >= known else -t - 1 for t in range(start, stop)]
        repeats += sum(contexts[:at].count(context) for at, context in enumerate(contexts))
    return [int(table.distinct_N[start:stop].sum()) for table in index.tables.values()], repeats


@settings(max_examples=60, deadline=None)
@given(
    st.just(np.zeros(0, int)) | streams,
    streams | repetitive,
    order_sets,
    st.sampled_from([(), (1, 3)]),
    st.sampled_from([1, 3, 16, 100]),
    st.data(),
)
def test_rows_are_those_of_the_mapped_index_bitwise(
    memory: np.ndarray,
    tokens: np.ndarray,
    orders: tuple[int, ...],
    lengths: tuple[int, ...],
    span: int,
    data: st.DataObject,
) -> None:
    """Spans of the grid and others; asked again, the same."""
    index = ngram_index.build(tokens, orders, VOCAB, lengths, memory_M=memory)
    mapped, here = NgramRows(index, 0.75), Resident(index, "cpu", span, 0.75)
    cuts = data.draw(st.sets(st.integers(1, len(tokens) - 1), max_size=4)) | {*range(0, len(tokens), span)}
    edges = [*sorted(cuts | {0}), len(tokens)]
    for start, stop in itertools.pairwise(edges):
        for _ in range(2):
            rows, text_3B = resident_rows(here, index, start, stop)
            assert torch.equal(rows, mapped_rows(mapped, start, stop))
            assert text_3B[0].tolist() == tokens[start:stop].tolist()
            assert text_3B[1].tolist() == ngram_index.longest_class(index, start, stop).tolist()
            assert here.sizes(start, stop) == slow_sizes(index, start, stop)
        here.advance(stop)
        mapped.advance(stop)
    assert here.position == mapped.position == len(tokens)
    assert torch.equal(here.count_V, mapped.unigram_V)
    for at, count_P in zip(here.base_O1[:, 0].tolist(), mapped.count_P.values(), strict=True):
        assert torch.equal(here.count_P[at : at + len(count_P)], count_P)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.concatenate(tokenizer.encode_batch(processor(), documents()))[:1500].astype(np.uint16)


def neural(text: np.ndarray, start: int, stop: int) -> dict[str, torch.Tensor]:
    generator = torch.manual_seed(start)
    return {name: torch.randn(stop - start, 512, generator=generator) for name in ("frozen", "adapted")}


def test_real_text_scores_the_same_bitwise(text: np.ndarray) -> None:
    index = ngram_index.build(text, CONFIG.orders, 512, CONFIG.match_lengths)
    names = ("frozen", "adapted")
    mixers = [
        BatchMixer(CONFIG, 512, index, names=names, span_tokens=64, resident=resident) for resident in (False, True)
    ]
    for start, stop in ((1, 128), (128, 700), (700, 1500)):
        given = neural(text, start, stop)
        rows, other = (mixer.rows(given, start, stop) for mixer in mixers)
        mine, theirs = (mixer.score(given, start, stop) for mixer in mixers)
        for name in names:
            for kind in mixers[0].kinds:
                assert torch.equal(mine.nll[name][kind], theirs.nll[name][kind]), (name, kind)
                assert torch.equal(rows[name][kind], other[name][kind]), (name, kind)
            assert all(torch.equal(value, theirs.weights[name][key]) for key, value in mine.weights[name].items())


def test_a_state_goes_on_in_a_resident_index(text: np.ndarray) -> None:
    index = ngram_index.build(text, CONFIG.orders, 512, CONFIG.match_lengths)
    mixers = [
        BatchMixer(CONFIG, 512, index, names=("frozen", "adapted"), span_tokens=64, resident=True) for _ in range(2)
    ]
    given = neural(text, 700, 1500)
    mixers[0].score(neural(text, 1, 700), 1, 700)
    saved = mixers[0].state_dict()
    expected = mixers[0].score(given, 700, 1500).nll["adapted"]
    mixers[1].load_state_dict(saved)
    found = mixers[1].score(given, 700, 1500).nll["adapted"]
    assert all(torch.equal(nll, found[kind]) for kind, nll in expected.items())


def test_host_and_device_leave_each_other_alone_in_a_call(text: np.ndarray) -> None:
    """All spans of one call, mixing and learning included: no read of the device, nothing sent to it, no NumPy."""
    index = ngram_index.build(text, CONFIG.orders, 512, CONFIG.match_lengths)
    mixer = BatchMixer(CONFIG, 512, index, names=("frozen", "adapted"), span_tokens=64, resident=True)
    mixer.score(neural(text, 1, 128), 1, 128)  # what is kept from span to span is made here
    given = neural(text, 128, 1500)
    mixer.index = None  # type: ignore[assignment]
    with unattended() as operations:
        mixer.score(given, 128, 1500)
    assert operations.count > 1000


def test_the_guard_sees_each_way_to_wait() -> None:
    values = torch.arange(4)
    for wait in (
        lambda: values.sum().item(), lambda: int(values[0]), lambda: bool(values[0] > 1), lambda: values[values > 1],
        lambda: values.nonzero(), lambda: values.tolist(), lambda: values.numpy(), lambda: values.cpu(),
        lambda: torch.repeat_interleave(values), lambda: torch.tensor([1]), lambda: torch.from_numpy(np.arange(3)),
        lambda: torch.equal(values, values), lambda: values.unique(), lambda: values.masked_select(values > 1),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=r"host"), unattended():
            wait()


def test_a_span_takes_few_array_operations(text: np.ndarray) -> None:
    """All orders go through the same ones: each order more adds its row's two, and a slice of the pairs."""
    counts = []
    for orders in ((1, 2, 3), (1, 2, 3, 4, 5, 6)):
        index = ngram_index.build(text, orders, 512)
        here = Resident(index, "cpu", 256, 0.75)
        here.advance(256)
        p_BKV, text_3B = torch.empty(256, len(orders), 512), here.text(256, 512).long()
        with unattended() as operations:
            here.fill(p_BKV, text_3B, 256, 512, False)
        counts.append(operations.count)
    assert counts[1] - counts[0] <= 6 and counts[1] < 90, counts


def test_what_cannot_work_says_so(text: np.ndarray) -> None:
    index = ngram_index.build(text, (1, 2), 512)
    with pytest.raises(ValueError, match="stand at 0"):
        resident_rows(Resident(index, "cpu", 16, 0.75), index, 5, 9)
    here = Resident(index, "cpu", 16, 0.75)
    here.advance(9)
    with pytest.raises(ValueError, match="stand at 9"):
        here.advance(8)
    config = MixerConfig(orders=(1, 2), match_lengths=())
    with pytest.raises(ValueError, match="graph=True"):
        BatchMixer(config, 512, index, graph=True)
