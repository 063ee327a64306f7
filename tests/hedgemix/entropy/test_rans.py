"""The entropy coder gives symbols back, is as long as its tables say, and notices what does not belong."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.entropy import rans
from hedgemix.entropy.rans import SLOTS, CoderError, Decoder, Run

GOLDEN = """
00000100598f470000004000ebe6fc8a01000300040037b5ec6a0bc04cf50f005ab510401780767586b51e8025809d35b23535003800c875
"""


def table(*shares: int) -> np.ndarray:
    """(256,) frequencies in proportion to the shares; a share of 0 gets none."""
    wanted = np.zeros(256, np.int64)
    wanted[: len(shares)] = shares
    found = np.where(wanted > 0, 1 + wanted * (SLOTS - 256) // wanted.sum(), 0)
    found[found.argmax()] += SLOTS - found.sum()
    return found


TABLES = np.stack([table(1), table(3, 1, 0, 1), table(*range(1, 257)), table(1000, *[1] * 200)])


def random_run(n: int, seed: int) -> Run:
    generator = np.random.default_rng(seed)
    contexts = generator.integers(0, len(TABLES), n).astype(np.uint8)
    slots = generator.integers(0, SLOTS, n)
    symbols = (slots[:, None] >= TABLES.cumsum(1)[contexts]).sum(1) if n else np.empty(0)
    return Run(symbols.astype(np.uint8), contexts, TABLES)


def taken(data: bytes, lanes: int, runs: list[Run]) -> None:
    decoder = Decoder(data, lanes)
    for run in runs:
        assert np.array_equal(decoder.take(run.contexts, run.frequencies), run.symbols)
    decoder.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=4), st.sampled_from([1, 2, 16, 1024]), st.integers(0, 1000))
def test_runs_come_back(lengths: list[int], lanes: int, seed: int) -> None:
    runs = [random_run(n, seed + k) for k, n in enumerate(lengths)]
    taken(rans.encode(runs, lanes), lanes, runs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=3), st.integers(0, 1000), st.integers(0, 1 << 30))
def test_few_lanes_and_many_are_decoded_alike(lengths: list[int], seed: int, flip: int) -> None:
    """A symbol at a time, or one of every lane at once: sound and altered bytes."""
    runs = [random_run(n, seed + k) for k, n in enumerate(lengths)]
    altered = bytearray(rans.encode(runs, 8))
    altered[flip // 8 % len(altered)] ^= flip % 2 << flip % 8

    def decoded() -> list[list[int]] | str:
        decoder = Decoder(bytes(altered), 8)
        try:
            found = [decoder.take(run.contexts, run.frequencies).tolist() for run in runs]
            decoder.close()
        except CoderError as error:
            return str(error)
        return found

    assert rans.FEW_LANES >= 8
    singly = decoded()
    with patch.object(rans, "FEW_LANES", 0):
        assert decoded() == singly


def test_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [random_run(5000, 0), random_run(777, 1)]
    whole = rans.encode(runs, 16)
    monkeypatch.setattr(rans, "BLOCK", 100)
    assert rans.encode(runs, 16) == whole
    taken(whole, 16, runs)


def test_as_long_as_the_tables_say() -> None:
    run = random_run(100_000, 0)
    bits = float(np.log2(SLOTS / run.frequencies[run.contexts, run.symbols]).sum())
    lanes = rans.lanes_for(100_000)
    assert bits < 8 * len(rans.encode([run], lanes)) < 1.0005 * bits + 32 * lanes


def test_the_bytes_never_change() -> None:
    contexts = np.arange(60, dtype=np.uint8) % 4
    run = Run(np.array([[0, k % 2, k, k % 201] for k in range(15)], np.uint8).ravel(), contexts, TABLES)
    assert rans.encode([run], 4).hex() == "".join(GOLDEN.split())
    taken(bytes.fromhex(GOLDEN), 4, [run])


def test_lanes_cost_little() -> None:
    for n in (0, 1, 8191, 8192, 100_000, 10**7, 10**9):
        lanes = rans.lanes_for(n)
        assert lanes & lanes - 1 == 0 and 1 <= lanes <= 1024
        assert lanes == 1 or 32 * lanes <= 0.004 * n


def test_damage_is_refused_or_gives_symbols_of_the_tables() -> None:
    generator = np.random.default_rng(0)
    run = random_run(100, 0)
    data, refused = rans.encode([run], 4), 0
    for _ in range(1000):
        altered = bytearray(data)
        altered[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        decoder = Decoder(bytes(altered), 4)
        try:
            symbols = decoder.take(run.contexts, TABLES)
            assert TABLES[run.contexts, symbols].min() > 0
            decoder.close()
        except CoderError:
            refused += 1
    assert refused > 950
    for length in range(len(data)):
        with pytest.raises(CoderError):
            taken(data[:length], 4, [run])
    with pytest.raises(CoderError, match="altered or is of other shapes"):
        taken(data + b"\0\0", 4, [run])
