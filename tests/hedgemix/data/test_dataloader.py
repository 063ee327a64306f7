"""Which tokens a step reads: everything once an epoch, and the same for any number of ranks."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hedgemix.data.dataloader import Ahead, Batches
from hedgemix.data.shards import TokenStream

CPU = torch.device("cpu")


def counting(*lengths: int) -> TokenStream:
    """Shards of these lengths holding 0, 1, 2, … in a row."""
    edges = np.cumsum((0, *lengths))
    return TokenStream([np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(edges)])


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_every_sequence_comes_once_an_epoch(total: int, per_step: int, seed: int) -> None:
    batches = Batches(counting(total * 4 + 1), 4, per_step, seed)
    read = np.concatenate([batches.indices(step) for step in range(3 * total)])
    epochs = read[: per_step * 3 * total // total * total].reshape(-1, total)
    assert len(epochs) == 3 * per_step
    assert (np.sort(epochs, axis=1) == np.arange(total)).all()


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_any_ranks_and_microbatches_read_what_one_rank_reads(world: int, largest: int, step: int, seed: int) -> None:
    batches = Batches(counting(23 * 4 + 1), 4, 10, seed)
    shares = [batches.microbatches(step, rank, world, largest) for rank in range(world)]
    pieces = [piece for share in shares for piece in share]
    assert np.array_equal(np.concatenate(pieces), batches.indices(step))
    assert all(0 < len(piece) <= largest for piece in pieces)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    forth, back = (Batches(counting(50), 4, 5, seed=3) for _ in range(2))
    steps = [forth.indices(step) for step in range(12)]
    for step in (11, 0, 7, 2, 11):
        assert np.array_equal(back.indices(step), steps[step])


def test_tokens_are_right_across_shards() -> None:
    batches = Batches(counting(3, 10, 1, 21, 5), 6, 4, seed=0)
    assert batches.total == 6  # 39 inputs have a target
    inputs, targets = batches.read(np.array([5, 0, 2, 0]), CPU)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [list(range(i * 6, i * 6 + 6)) for i in (5, 0, 2, 0)]
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(("tokens", "total"), [(13, 3), (12, 2), (16, 3), (17, 4)])
def test_the_last_target_needs_a_token_of_its_own(tokens: int, total: int) -> None:
    batches = Batches(counting(tokens), 4, 1, seed=0)
    assert batches.total == total
    assert batches.read(np.array([total - 1]), CPU)[1][0, -1] == total * 4


def test_seeds_and_epochs_shuffle_differently() -> None:
    orders = [Batches(counting(401), 4, 100, seed).indices(epoch) for seed in range(3) for epoch in range(3)]
    assert len({order.tobytes() for order in orders}) == 9
    assert not any(np.array_equal(order, np.arange(100)) for order in orders)


def test_reading_ahead_gives_what_reading_gives_in_any_order() -> None:
    batches, plain = (Batches(counting(23 * 4 + 1), 4, 10, seed=5) for _ in range(2))
    ahead = Ahead(batches, 1, 2, 3, CPU)
    for step in (0, 1, 2, 7, 8, 0, 1, 1):  # a run's warm-up and restarts go back and forth
        expected = [plain.read(piece, CPU) for piece in plain.microbatches(step, 1, 2, 3)]
        for found, wanted in zip(ahead(step), expected, strict=True):
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    ahead.close()


def test_the_next_step_is_read_while_this_one_is_computed() -> None:
    batches, read = Batches(counting(41), 4, 2, seed=0), threading.Event()
    rows = batches.rows

    def watched(indices: np.ndarray, device: torch.device) -> Tensor:
        if np.array_equal(indices, wanted):
            read.set()
        return rows(indices, device)

    wanted, batches.rows = batches.indices(1), watched  # type: ignore[method-assign]
    ahead = Ahead(batches, 0, 1, 2, CPU)
    ahead(0)
    assert read.wait(10)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_of_the_thread_comes_with_the_step_that_needs_its_tokens() -> None:
    batches = Batches(counting(41), 4, 2, seed=0)
    fails, rows = batches.indices(2), batches.rows

    def broken(indices: np.ndarray, device: torch.device) -> Tensor:
        if np.array_equal(indices, fails):
            raise OSError("the disk is gone")
        return rows(indices, device)

    batches.rows = broken  # type: ignore[method-assign]
    ahead = Ahead(batches, 0, 1, 2, CPU)
    for step in (0, 1):
        ahead(step)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(2)
    ahead.close()
