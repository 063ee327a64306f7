"""Capitals as markers in front of small letters, so that "the", "The" and "THE" share their pieces.

A run of ASCII letters is written in small ones: behind TITLE when its first letter alone is a capital, behind ALLCAPS
when all are (of two or more), else with CAPNEXT in front of each further one. TITLE and ALLCAPS go in front of the one
space before the run, where there is one: the run keeps the piece that begins with a space.

Notable: no text is lost. Markers are tokens of their own, and a literal one in a text is written in byte tokens, so no
escape is needed. A marker that cannot be applied stands for nothing, so capitals cost no bytes anywhere.
"""

from __future__ import annotations

import re
from functools import lru_cache

from sentencepiece import SentencePieceProcessor

TITLE, ALLCAPS, CAPNEXT = MARKERS = "\ue001", "\ue002", "\ue003"
_CAPITALISED = re.compile(r" ?(?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*+")
_ABOUT = {TITLE: re.compile(rb" ?[a-z]"), ALLCAPS: re.compile(rb" ?[a-z]+"), CAPNEXT: re.compile(rb"[a-z]")}


def of(processor: SentencePieceProcessor) -> dict[int, str]:
    """Find a tokenizer's markers by their tokens; none for one without. They are user-defined, so they stand in front
    of its byte tokens: behind these a private-use character is a piece that was found in text."""
    tokens = [processor.piece_to_id(marker) for marker in MARKERS]
    defined = processor.unk_id() < min(tokens) and max(tokens) < processor.piece_to_id("<0x00>")
    return dict(zip(tokens, MARKERS, strict=True)) if defined else {}


def mark(text: str) -> str:
    """Write capitals as markers and small letters. For a text without literal markers `restore` undoes it."""
    return _CAPITALISED.sub(lambda run: _marked(run[0]), text)


def restore(text: bytearray, start: int, marker: str) -> None:
    """Make capitals, in place, of the letters of text[start:] that a marker at `start` is about; "" is about none."""
    if marker and (found := _ABOUT[marker].match(text, start)):
        text[start : found.end()] = found[0].upper()


@lru_cache(1 << 16)
def _marked(run: str) -> str:
    letters = run.lstrip(" ")
    if letters.isupper() and len(letters) > 1:
        return ALLCAPS + run.lower()
    title = TITLE if letters[0].isupper() else ""
    further = re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), letters[1:])
    return title + run[: -len(letters)] + letters[0].lower() + further
