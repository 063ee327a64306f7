"""Bits per byte: how many bytes of text each token stands for.

The rule is the challenge's: a piece counts its UTF-8 bytes, its leading space only when the token before it is not a
control, unknown or unused one; byte tokens count 1; control, unknown and unused tokens 0. Markers for capitals count 0
too, and the token before is the last that is none. Over the tokens of a document behind its BOS that adds up to the
bytes of its text, to the byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sentencepiece import SentencePieceProcessor

from hedgemix.data import case_markers
from hedgemix.data.shards import TokenStream, tokens_between
from hedgemix.data.tokenizer import SPACE

PIECE_TOKENS = 1 << 22  # tokens looked at in one go
MARKER_BYTES = len(case_markers.ESCAPE.encode())


@dataclass(frozen=True)
class ByteTables:
    """Holds what the bytes of a token depend on; arrays (V,) over the vocabulary."""

    bytes_without_space: np.ndarray
    """int16: UTF-8 bytes of the piece without its leading space."""
    has_leading_space: np.ndarray
    """bool: the piece begins with U+2581."""
    is_control: np.ndarray
    """bool: the token is a control, unknown or unused one, which stands for no text."""
    is_marker: np.ndarray
    """bool: the token is a marker for capitals, which stands for no text either, and does not begin one."""
    is_escape: np.ndarray
    """bool: the token is a marker that makes a literal one, of 3 bytes, of a marker right behind it."""


def byte_tables(processor: SentencePieceProcessor) -> ByteTables:
    """Make the tables of a tokenizer."""
    size = processor.vocab_size()
    tables = ByteTables(np.zeros(size, np.int16), *np.zeros((4, size), bool))
    markers = case_markers.of(processor)
    for token in range(size):
        if token in markers:
            tables.is_marker[token] = True
            tables.is_escape[token] = markers[token] == case_markers.ESCAPE
        elif processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            tables.is_control[token] = True
        elif processor.is_byte(token):
            tables.bytes_without_space[token] = 1
        else:
            piece = processor.id_to_piece(token)
            tables.has_leading_space[token] = piece.startswith(SPACE)
            # U+2581 further in is a space too: one byte, not its own three.
            tables.bytes_without_space[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
    return tables


def token_bytes(tables: ByteTables, tokens: np.ndarray | TokenStream, start: int, stop: int) -> np.ndarray:
    """Count the bytes of each of tokens[start:stop] of a text, integers (N,) or a stream of them: int16
    (stop - start,). The text's first token counts none: it is given.

    int16 keeps 62 M tokens small; NumPy's sum of it is 64-bit, torch's too.
    """
    first = min(max(start, 1), stop)
    before = max(first - 1, 0)
    while before and tables.is_marker[tokens_between(tokens, before, first)].all():
        before = max(2 * before - first, 0)
    known, begin = tokens_between(tokens, before, stop), max(first - before - 1, 0)
    sizes, previous = tables.bytes_without_space[known], known[begin:-1]
    if tables.is_marker.any():
        places, is_marker = np.arange(len(known)), tables.is_marker[known]
        last = np.maximum.accumulate(np.where(tables.is_escape[known], -1, places))  # that is no escape
        literal = is_marker & ((places - 1 - np.roll(last, 1)) % 2 == 1) & (places > 0)  # behind an odd run of them
        sizes[literal] = MARKER_BYTES
        previous = known[np.maximum.accumulate(np.where(is_marker & ~literal, 0, places))[begin:-1]]
    current = known[first - before :]
    space = tables.has_leading_space[current] & ~tables.is_control[previous]
    sizes = sizes[first - before :] + space.astype(np.int16)
    return np.concatenate([np.zeros(first - start, np.int16), sizes]) if first > start else sizes


def count_bytes(tables: ByteTables, tokens: np.ndarray | TokenStream) -> int:
    """Count the bytes of text that tokens[1:] (N,) stand for: what is scored when the first token is only context."""
    total = 0
    for start in range(0, len(tokens), PIECE_TOKENS):
        sizes = token_bytes(tables, tokens, start, min(start + PIECE_TOKENS, len(tokens)))
        total += int(sizes.sum(dtype=np.int64))
    return total


def bits_per_byte(nll_nats_sum: float, n_bytes: int) -> float:
    """Turn the summed negative log likelihood in nats into bits per byte of text; raises ValueError without bytes."""
    if n_bytes <= 0:
        raise ValueError(f"bits per byte of {n_bytes} bytes of text is not defined")
    return nll_nats_sum / math.log(2.0) / n_bytes
