"""Texts of known length: does a tokenizer count them right, and does it write them at all?"""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np
from sentencepiece import SentencePieceProcessor

from hedgemix.data import bpb
from hedgemix.data.tokenizer import SPACE, decode, encode

PROBES = (
    "Plain words, and a Name.", "two  spaces,   three", "a line\nand another\n\n  indented", "tab\tand tab",
    "NASA's XMLParser", "0123456789", "naïve façade Ångström", "Привет, мир", "你好，世界", "नमस्ते दुनिया", "🙂 👩‍👩‍👧",
)  # fmt: skip


def miscounted(processor: SentencePieceProcessor) -> list[str]:
    """Find probes whose tokens are counted as more or fewer bytes than the text that SentencePiece makes of them before
    it looks for pieces: every space is, as three for one, where no piece begins with U+2581."""
    tables, wrong = bpb.byte_tables(processor), []
    for text in PROBES:
        counted = bpb.count_bytes(tables, np.array(encode(processor, text)))
        normalised = processor.normalize(text).replace(SPACE, " ").removeprefix(" ")
        if counted != len(normalised.encode()):
            wrong.append(f"{text!r} is counted as {counted} bytes, and has {len(normalised.encode())}")
    return wrong


def changed_share(processor: SentencePieceProcessor) -> float:
    """Measure the share of the probes' bytes that do not come back from encoding: 0 of a tokenizer that writes every
    text."""
    kept = total = 0
    for text in (probe.encode() for probe in PROBES):
        back = decode(processor, encode(processor, text.decode()))
        kept += sum(block.size for block in SequenceMatcher(None, text, back, autojunk=False).get_matching_blocks())
        total += len(text)
    return 1 - kept / total


def adds_prefix(processor: SentencePieceProcessor) -> bool:
    """Tell whether the tokenizer puts a space before each text."""
    return bool(processor.id_to_piece(encode(processor, "a")[1]).startswith(SPACE))
