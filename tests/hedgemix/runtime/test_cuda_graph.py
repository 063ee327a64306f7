"""A span that is replayed on the same memory: the bits of the span itself, or the span itself and a warning."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hedgemix.config import MixerConfig
from hedgemix.experts import ngram_index
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.runtime.cuda_graph import CHECKED, Record
from support.recorded_operations import Recorder

VOCAB, SPAN, NAMES = 40, 32, ("frozen", "adapted")
CONFIG = MixerConfig(orders=(1, 2, 3), match_lengths=(3, 4), block_tokens=8)
TEXT = (np.random.default_rng(0).zipf(1.4, 1800) % VOCAB).astype(np.uint16)
INDEX = ngram_index.build(TEXT, CONFIG.orders, VOCAB, CONFIG.match_lengths)
ROWS = {name: torch.randn(len(TEXT), VOCAB, generator=torch.manual_seed(at)) * 2 for at, name in enumerate(NAMES)}
CUTS = [1, *range(96, 1473, 64), 1480]


def mixer(recorded: Record | None = None, resident: bool = False) -> BatchMixer:
    found = BatchMixer(CONFIG, VOCAB, INDEX, names=NAMES, span_tokens=SPAN, resident=resident)
    found.sets[0].record = recorded  # a CPU has no graphs of its own
    return found


def score(found: BatchMixer, start: int, stop: int) -> dict[str, dict[str, Tensor]]:
    return found.score({name: rows[start:stop] for name, rows in ROWS.items()}, start, stop).nll


def look(found: BatchMixer, start: int, stop: int) -> dict[str, dict[str, Tensor]]:
    return found.rows({name: rows[start:stop] for name, rows in ROWS.items()}, start, stop)


def same(one: Any, other: Any) -> bool:
    """Nests of tensors, bitwise."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("resident", [False, True])
def test_replayed_spans_have_the_bits_of_plain_ones(resident: bool) -> None:
    """Scores, rows and state, checked and no longer checked, and through checkpoints of either."""
    recorder = Recorder()
    plain, replayed = mixer(), mixer(recorder, resident)
    for at, (start, stop) in enumerate(itertools.pairwise(CUTS)):
        assert at % 5 or same(look(plain, start, stop), look(replayed, start, stop))
        assert same(score(plain, start, stop), score(replayed, start, stop))
        assert same(plain.state_dict(), replayed.state_dict())
    calls = (stop - start == 64 for start, stop in itertools.pairwise(CUTS))
    spans, shares = recorder.tapes
    assert spans.played == 1472 // SPAN - 1 and shares.played == sum(calls) > CHECKED
    goes_on, other = mixer(Recorder(), resident), mixer()
    goes_on.load_state_dict(plain.state_dict())
    other.load_state_dict(replayed.state_dict())
    for start, stop in itertools.pairwise([1480, *range(1504, 1761, 64), 1800]):
        expected = score(plain, start, stop)
        assert all(same(expected, score(each, start, stop)) for each in (replayed, goes_on, other))
    assert all(same(plain.state_dict(), each.state_dict()) for each in (replayed, goes_on, other))


def test_a_saved_state_stays_what_it_was() -> None:
    found = mixer(Recorder())
    score(found, 1, 512)
    saved = found.state_dict()
    kept = copy.deepcopy(saved)
    score(found, 512, 1024)
    assert same(kept, saved)
    assert not any(same(value, found.state_dict()[key]) for key, value in saved.items())


def refusing(work: Callable[[], object], _device: torch.device) -> Callable[[], object]:
    work()
    raise RuntimeError("operation not permitted when stream is capturing")


class Differing:
    """A replay that says something else, or leaves another state, from some call on."""

    def __init__(self, found: BatchMixer, sound: int, moves_state: bool) -> None:
        self.found, self.sound, self.moves_state = found, sound, moves_state

    def __call__(self, work: Callable[[], object], _device: torch.device) -> Callable[[], object]:
        def replay() -> None:
            work()
            self.sound -= 1
            if self.sound < 0:
                state = self.found.sets[0].blend.linear.weights
                (state if self.moves_state else self.found.sets[0].memory.log_p.joined_BRC).mul_(1 + 1e-15)

        return replay


def test_what_cannot_be_recorded_is_told_and_done_without() -> None:
    plain, found = mixer(), mixer(refusing)
    with pytest.warns(RuntimeWarning, match="not permitted") as told:
        for start, stop in itertools.pairwise(CUTS):
            assert same(score(plain, start, stop), score(found, start, stop))
    assert len(told) == 2 and same(plain.state_dict(), found.state_dict())


@pytest.mark.parametrize("sound", [0, CHECKED - 1])
@pytest.mark.parametrize("moves_state", [False, True])
def test_a_replay_that_differs_is_told_and_done_without(sound: int, moves_state: bool) -> None:
    plain, found = mixer(), mixer()
    found.sets[0].record = Differing(found, sound, moves_state)
    with pytest.warns(RuntimeWarning, match="differs") as told:
        assert same(score(plain, 1, 1500), score(found, 1, 1500))
    assert len(told) == 1 and same(plain.state_dict(), found.state_dict())


def test_only_whole_spans_are_replayed() -> None:
    recorder = Recorder()
    found = mixer(recorder)
    for start, stop in ((1, 32), (32, 60), (60, 64), (64, 70)):
        score(found, start, stop)
    assert not recorder.tapes
    score(found, 70, 130)
    (tape,) = recorder.tapes
    assert tape.played == 1
