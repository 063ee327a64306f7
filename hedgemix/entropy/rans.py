"""Entropy coder: interleaved rANS over static frequency tables, many lanes at a time in numpy. Integers only.

rANS (Duda 2013, arXiv:1311.2540) keeps a state x; a symbol that takes f of the 2^14 slots of its table, the first of
them s, turns it into (x // f) * 2^14 + s + x % f, which costs log2(2^14 / f) bits, and decoding undoes that. States
stay below 2^32 by moving 16-bit words to the stream. Lanes are independent states that share one stream of words
(Giesen 2014, arXiv:1402.3392): symbol n of a run belongs to lane n % lanes, so one numpy operation serves all lanes.
Encoding goes backwards through the symbols, decoding forwards, so what comes later may depend on what was decoded.

    bytes        content
    4 * lanes    u32 state of each lane before the first symbol
    2 * ...      u16 words, in the order in which the decoder takes them; after the last symbol all states are 2^16

All integers are little-endian. A lane costs about 3 bytes more than its symbols do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
BITS = 14
"""A table's frequencies sum to 2^BITS."""
SLOTS = 1 << BITS
LOW = 1 << 16
"""States are in [LOW, LOW << 16) between symbols."""
MOST_LANES = 1024
SYMBOLS_A_LANE = 8192
BLOCK = 1 << 20
"""Symbols whose table entries are held at once."""
FEW_LANES = 16
"""Up to so many lanes are faster a symbol at a time than by numpy's calls, whose cost is their number's."""


class CoderError(ValueError):
    """Tells that coded bytes were cut or altered, or belong to other shapes."""


@dataclass(frozen=True)
class Run:
    """Holds symbols that are coded with one set of tables: symbol n under table contexts[n]."""

    symbols: Ints
    """(N,), below the alphabet A."""
    contexts: Ints
    """(N,), below the number of tables T."""
    frequencies: Ints
    """(T, A), A at most 256; each row that is used sums to 2^14, and what is coded has a frequency above 0."""


def lanes_for(n_symbols: int) -> int:
    """Choose lanes that cost about 0.003 bits a symbol or less: a power of two, from 1 to 1024."""
    return 1 << (min(n_symbols // SYMBOLS_A_LANE, MOST_LANES).bit_length() - 1) if n_symbols >= SYMBOLS_A_LANE else 1


def encode(runs: Sequence[Run], lanes: int) -> bytes:
    """Code the runs, to be decoded in this order, each by one `Decoder.take`."""
    states = np.full(lanes, LOW, np.int64)
    words: list[Ints] = []
    for run in reversed(runs):
        starts = np.cumsum(run.frequencies, axis=1, dtype=np.int64) - run.frequencies
        packed = (run.frequencies.astype(np.int64) | (starts << 16)).ravel()
        alphabet, n = run.frequencies.shape[1], len(run.symbols)
        block = max(BLOCK // lanes, 1) * lanes
        for first in reversed(range(0, n, block)):
            entries = run.contexts[first : first + block] * np.int64(alphabet) + run.symbols[first : first + block]
            push = _push_singly if lanes <= FEW_LANES else _push
            push(states, words, packed.take(entries), lanes)
    words.reverse()
    stream = np.concatenate(words) if words else np.empty(0, np.int64)
    return states.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def _push(states: Ints, words: list[Ints], entries: Ints, lanes: int) -> None:
    """Codes the block of (frequency | start << 16) entries, last first, into the states, in place, and the words."""
    frequencies, starts = entries & 0xFFFF, entries >> 16
    limits = frequencies << (32 - BITS)
    for first in reversed(range(0, len(entries), lanes)):
        frequency = frequencies[first : first + lanes]
        state = states[: len(frequency)]
        full = (state >= limits[first : first + lanes]).nonzero()[0]
        over = state[full]
        words.append((over & 0xFFFF).astype(np.uint16))
        state[full] = over >> 16
        quotient = state // frequency
        quotient *= SLOTS - frequency  # x // f * 2^14 + x % f = x + x // f * (2^14 - f)
        state += quotient
        state += starts[first : first + lanes]


def _push_singly(states: Ints, words: list[Ints], entries: Ints, lanes: int) -> None:
    kept, moved, lane = states.tolist(), list[int](), (len(entries) - 1) % lanes
    for entry in reversed(entries.tolist()):
        frequency, state = entry & 0xFFFF, kept[lane]
        if state >= frequency << (32 - BITS):
            moved.append(state & 0xFFFF)
            state >>= 16
        kept[lane] = state + state // frequency * (SLOTS - frequency) + (entry >> 16)
        lane = (lane or lanes) - 1
    states[:] = kept
    words.append(np.array(moved[::-1], np.uint16))


class Decoder:
    """Takes from coded bytes what `encode` put there, run by run.

    Whatever the bytes are, `take` returns symbols of frequency above 0 or raises CoderError.
    """

    def __init__(self, data: bytes, lanes: int) -> None:
        if len(data) < 4 * lanes or len(data) % 2:
            raise CoderError(f"{len(data):,} bytes cannot hold {lanes} states and 16-bit words; the data was cut")
        self._states = np.frombuffer(data, "<u4", lanes).astype(np.int64)
        self._words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.int64)
        self._lanes, self._position = lanes, 0

    def take(self, contexts: Ints, frequencies: Ints) -> NDArray[np.uint8]:
        """Decode the next symbols uint8 (N,), coded under these contexts (N,) and tables (T, A); raises CoderError
        where the data ends."""
        tables, alphabet = frequencies.shape
        used = np.flatnonzero(np.bincount(contexts, minlength=tables))
        place = np.zeros(tables, np.int64)
        place[used] = np.arange(len(used)) * SLOTS
        wanted = frequencies[used].astype(np.int64)
        assert (wanted.sum(axis=1) == SLOTS).all(), "frequencies do not sum to 2^14"
        slots = np.repeat(np.tile(np.arange(alphabet, dtype=np.uint8), len(used)), wanted.ravel())
        starts = np.cumsum(frequencies, axis=1, dtype=np.int64) - frequencies
        packed = (frequencies.astype(np.int64) | (starts << 16)).ravel()
        symbols = np.empty(len(contexts), np.uint8)
        block = max(BLOCK // self._lanes, 1) * self._lanes
        for first in range(0, len(contexts), block):
            part = contexts[first : first + block]
            rows = part * np.int64(alphabet)
            pop = self._pop_singly if self._lanes <= FEW_LANES else self._pop
            pop(place.take(part), rows, slots, packed, symbols[first : first + block])
        return symbols

    def _pop(self, places: Ints, rows: Ints, slots: Ints, packed: Ints, symbols: Ints) -> None:
        states, words, lanes = self._states, self._words, self._lanes
        for first in range(0, len(symbols), lanes):
            taken = symbols[first : first + lanes]
            state = states[: len(taken)]
            slot = state & (SLOTS - 1)
            np.take(slots, slot + places[first : first + lanes], out=taken, mode="clip")  # raise would buffer
            entry = packed.take(rows[first : first + lanes] + taken)
            state >>= BITS
            state *= entry & 0xFFFF
            slot -= entry >> 16
            state += slot
            empty = (state < LOW).nonzero()[0]
            end = self._position + len(empty)
            if end > len(words):
                raise CoderError("the coded data ends too early; it was cut or altered")
            state[empty] = (state[empty] << 16) | words[self._position : end]
            self._position = end

    def _pop_singly(self, places: Ints, rows: Ints, slots: Ints, packed: Ints, symbols: Ints) -> None:
        states, pieces, entries = self._states.tolist(), slots.data, packed.tolist()
        words = iter(self._words[self._position : self._position + len(symbols)].tolist())  # one a symbol at most
        taken, lane = bytearray(), 0
        try:
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                state = states[lane]
                slot = state & (SLOTS - 1)
                symbol = pieces[place + slot]
                entry = entries[row + symbol]
                state = (state >> BITS) * (entry & 0xFFFF) + slot - (entry >> 16)
                if state < LOW:
                    state = state << 16 | next(words)
                    self._position += 1
                states[lane] = state
                lane = lane + 1 if lane + 1 < self._lanes else 0
                taken.append(symbol)
        except StopIteration:
            raise CoderError("the coded data ends too early; it was cut or altered") from None
        self._states[:] = states
        symbols[:] = np.frombuffer(taken, np.uint8)

    def close(self) -> None:
        """Raise CoderError unless everything was taken and the states are what the encoder began with."""
        if self._position != len(self._words) or (self._states != LOW).any():
            raise CoderError("the coded data does not end where its symbols do; it was altered or is of other shapes")
