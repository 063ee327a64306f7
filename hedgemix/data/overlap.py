"""How much of the validation text occurs in the training text; and training text without the paragraphs that repeat it.

Notable: a window's 64-bit hash is a difference of prefix sums, sum of symbol(i) * P**i, divided by P to the power of
where it starts (modulo 2**64, where the odd P has an inverse): every window of a text, of words or of tokens, costs a
few vector operations, wherever the text is cut into pieces. The validation text's hashes are held, sorted; training
text streams past them. Words are compared without case, and with one space between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hedgemix.data.corpus import batches, normalized
from hedgemix.data.shards import TokenStream
from hedgemix.runtime.cpus import available_cpus

WINDOW_WORDS = 8
WINDOW_TOKENS = 13
SAMPLED_WINDOWS = 1 << 20
BATCH_CHARACTERS = 1 << 18  # 64-bit sums of this many fit a core's cache
PIECE_TOKENS = 1 << 18
PARAGRAPHS = re.compile(r"(?<=\n)(?=[^\S\n]*\n)")
LINES = re.compile(r"(?<=\n)")
P = 0x9E3779B97F4A7C15
P_INVERSE = pow(P, -1, 1 << 64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finishing steps: (n,) uint64 to as many that look drawn."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values


SYMBOLS = _mixed(np.arange(1, 65537, dtype=np.uint64) * np.uint64(P))


def window_hashes(symbols: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Hash windows `symbols[start:stop]` of bytes or tokens (n,), uint8 or uint16: (W,) uint64, equal for equal
    windows wherever they stand."""
    size = 1 << len(symbols).bit_length()
    sums = np.zeros(len(symbols) + 1, np.uint64)
    np.cumsum(SYMBOLS[symbols] * _powers(P, size)[: len(symbols)], out=sums[1:])
    return (sums[stops] - sums[starts]) * _powers(P_INVERSE, size)[starts]


@lru_cache(8)
def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


class Windows:
    """Holds a text's distinct windows, by hash, and how often each occurs."""

    def __init__(self, hashes: Iterable[np.ndarray]) -> None:
        self.hashes, self.counts = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True)
        bits = min(max(len(self.hashes).bit_length() + 5, 16), 26)
        self._shift = np.uint64(64 - bits)
        self._likely = np.zeros(1 << bits, bool)  # passes one other window in 32, while the sorted ones stay out of it
        self._likely[self.hashes >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find which hashes (n,) are of these windows: their places in `hashes`, and in `self.hashes`."""
        maybe = np.flatnonzero(self._likely[hashes >> self._shift])
        if not len(maybe):
            return maybe, maybe
        index = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        equal = self.hashes[index] == hashes[maybe]
        return maybe[equal], index[equal]

    def share(self, seen: np.ndarray) -> float:
        """Say what share of the text's windows are `seen` (bool, one a distinct window)."""
        return float(self.counts[seen].sum() / max(1, self.counts.sum()))


@dataclass(frozen=True)
class WordWindows:
    """Holds every window of some documents: hash, number of the document, and its first word's place there (W,)."""

    hashes: np.ndarray
    document: np.ndarray
    word: np.ndarray


def word_windows(documents: Sequence[str], words: int) -> WordWindows:
    """Hash every `words` words in a row of each document; a shorter document, but an empty one, is one window."""
    text = np.frombuffer("\n".join(map(normalized, documents)).encode() + b"\n", np.uint8)
    ends = np.flatnonzero((text == 0x20) | (text == 0x0A))
    starts = np.concatenate([[0], ends[:-1] + 1])
    closing = text[ends] == 0x0A
    document = np.cumsum(closing) - closing
    last = np.flatnonzero(closing)[document]
    first = np.concatenate([[0], np.flatnonzero(closing)[:-1] + 1])[document]
    word = np.arange(len(ends))
    whole = ((word + words - 1 <= last) | (word == first)) & (ends > starts)
    stops = ends[np.minimum(word + words - 1, last)]
    return WordWindows(window_hashes(text, starts[whole], stops[whole]), document[whole], (word - first)[whole])


def of_documents(documents: Iterable[str], words: int) -> Windows:
    """Collect the windows of `words` words of a validation text."""
    return Windows(word_windows(batch, words).hashes for batch in batches(documents, BATCH_CHARACTERS))


def share_in_documents(valid: Windows, documents: Iterable[str], words: int) -> float:
    """Measure the share of the validation text's windows that occur in training documents."""
    seen = np.zeros(len(valid.hashes), bool)
    for batch in batches(documents, BATCH_CHARACTERS):
        seen[valid.find(word_windows(batch, words).hashes)[1]] = True
    return valid.share(seen)


def without_repeats(
    documents: Iterable[str], valid: Windows, words: int, seen: np.ndarray | None = None
) -> Iterator[str]:
    """Leave out each paragraph that has `words` words in a row in common with the validation text, and each document
    of which nothing else is left. Paragraphs lie between blank lines; a document without any is taken line by line.
    Sets in `seen` (bool, one a distinct window) which windows were there before."""
    for batch in batches(documents, BATCH_CHARACTERS):
        looked_at, mark = np.arange(len(batch)), seen
        while len(looked_at):  # what is cut is looked at again: the words around a gap are now in a row
            windows = word_windows([batch[number] for number in looked_at], words)
            found, which = valid.find(windows.hashes)
            if mark is not None:
                mark[which], mark = True, None
            document, word = looked_at[windows.document[found]], windows.word[found]
            looked_at = np.unique(document)
            for number in looked_at:
                batch[number] = _cut(batch[number], word[document == number], words)
        yield from (text for text in batch if text.strip())


def _cut(text: str, first_words: np.ndarray, words: int) -> str:
    """The text without the paragraphs that the windows beginning at these words reach into."""
    parts = PARAGRAPHS.split(text)
    if len(parts) == 1:
        parts = LINES.split(text)
    bounds = np.cumsum([0, *(len(part.split()) for part in parts)])
    before = np.searchsorted(first_words, bounds[:-1] - words, "right")  # windows that end before the paragraph
    reach = np.searchsorted(first_words, bounds[1:]) > before
    blank = bounds[1:] == bounds[:-1]
    return "".join(part for part, kept in zip(parts, blank | ~reach, strict=True) if kept).lstrip("\n")


def share_in_tokens(valid: TokenStream, train: TokenStream, window: int = WINDOW_TOKENS) -> float:
    """Measure the share of the validation text's windows of `window` tokens that occur in the training text.

    Of a validation text of more than a million windows it is the share of about a million, those with the lowest
    hashes; training windows with higher ones need no search.
    """
    below = np.uint64(min((1 << 64) - 1, (1 << 64) * SAMPLED_WINDOWS // max(1, len(valid))))
    windows = Windows(in_pieces(valid, window, lambda hashes: hashes[hashes <= below]))
    return windows.share(seen_in_tokens(windows, train, window, below))


def seen_in_tokens(windows: Windows, train: TokenStream, window: int, below: np.uint64 | None = None) -> np.ndarray:
    """Find which of the windows (of `window` tokens, hashes not above `below`) occur in a stream: bool (W,)."""
    seen = np.zeros(len(windows.hashes), bool)

    def find(hashes: np.ndarray) -> np.ndarray:
        return windows.find(hashes if below is None else hashes[hashes <= below])[1]

    for found in in_pieces(train, window, find):
        seen[found] = True
    return seen


def in_pieces(stream: TokenStream, window: int, each: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """Hash every `window` tokens in a row of a stream and give what `each` makes of a piece's hashes, in order."""

    def piece(begin: int) -> np.ndarray:
        tokens = stream.read(begin, min(PIECE_TOKENS + window - 1, len(stream) - begin))
        starts = np.arange(len(tokens) - window + 1)
        return each(window_hashes(tokens, starts, starts + window))

    with ThreadPoolExecutor(available_cpus()) as threads:  # NumPy lets go of the interpreter
        yield from threads.map(piece, range(0, len(stream) - window + 1, PIECE_TOKENS))
