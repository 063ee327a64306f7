"""Capitals as markers in front of small letters, so that "the", "The" and "THE" share their pieces.

A run of ASCII letters is written in small ones: behind TITLE when its first letter alone is a capital, behind ALLCAPS
when all are (of two or more), else with CAPNEXT in front of each further one. TITLE and ALLCAPS go in front of the one
space before the run, where there is one: the run keeps the piece that begins with a space.

Notable: no text is lost. Markers are tokens of their own, and a literal one in a text is written in byte tokens, so no
escape is needed. A marker that cannot be applied stands for nothing, so capitals cost no bytes anywhere. A tokenizer
that others made may have ESCAPE too ("caseops v1"): there markers stand behind the space, and ESCAPE makes a literal
marker of the next one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache

from sentencepiece import SentencePieceProcessor

TITLE, ALLCAPS, CAPNEXT = MARKERS = "\ue001", "\ue002", "\ue003"
ESCAPE = "\ue004"
_CAPITALISED = r"(?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*+"
_WITH_SPACE, _WITHOUT_SPACE = re.compile(f" ?{_CAPITALISED}"), re.compile(_CAPITALISED)
_LITERAL = re.compile("[\ue001-\ue004]")
_ABOUT = {TITLE: re.compile(rb" ?[a-z]"), ALLCAPS: re.compile(rb" ?[a-z]+"), CAPNEXT: re.compile(rb"[a-z]")}


def of(processor: SentencePieceProcessor) -> dict[int, str]:
    """Find a tokenizer's markers, and ESCAPE, by their tokens; none for one without. They are user-defined, so they
    stand in front of its byte tokens: behind these a private-use character is a piece that was found in text."""
    tokens = {processor.piece_to_id(marker): marker for marker in (*MARKERS, ESCAPE)}
    bounds = processor.unk_id(), processor.piece_to_id("<0x00>")
    found = {token: marker for token, marker in tokens.items() if bounds[0] < token < bounds[1]}
    return found if set(MARKERS) <= set(found.values()) else {}


def mark(text: str, markers: Collection[str] = MARKERS, begins: bool = False) -> str:
    """Write capitals as the markers of a tokenizer and small letters; without markers the text stays. begins: it is a
    document's beginning, and has a space put in front where the tokenizer puts none."""
    if not markers:
        return text
    if ESCAPE in markers:
        return _WITHOUT_SPACE.sub(_marked, _LITERAL.sub(ESCAPE + r"\g<0>", text))
    return _WITH_SPACE.sub(_marked, f" {text}" if begins and text else text)


def restore(text: bytearray, start: int, marker: str) -> None:
    """Make capitals, in place, of the letters of text[start:] that a marker at `start` is about; "" is about none."""
    if marker in _ABOUT and (found := _ABOUT[marker].match(text, start)):
        text[start : found.end()] = found[0].upper()


def _marked(run: re.Match[str]) -> str:
    return _marked_run(run[0])


@lru_cache(1 << 16)
def _marked_run(run: str) -> str:
    letters = run.lstrip(" ")
    if letters.isupper() and len(letters) > 1:
        return ALLCAPS + run.lower()
    title = TITLE if letters[0].isupper() else ""
    further = re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), letters[1:])
    return title + run[: -len(letters)] + letters[0].lower() + further
