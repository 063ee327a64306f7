"""Capitals as markers: against a loop over letters, and there and back through a tokenizer."""

from __future__ import annotations

from itertools import groupby, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hedgemix.data import bpb, case_markers, tokenizer
from support.text_data import ODD, documents, escaping_processor, marked_processor, processor

LETTERS = "aabzABZ  \ue001\ue002\ue003\ue004\u2581\u0130\u0131\u00e9\u00c9\u212a1'\n"
TEXTS = st.text(st.sampled_from(LETTERS) | st.sampled_from(ODD) | st.characters(codec="utf-8"), max_size=40)


def is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def marked_by_the_letter(text: str, escape: bool = False) -> str:
    """As `case_markers.mark`, run by run."""
    found: list[str] = []
    for letters, run in groupby(text, is_letter):
        word = "".join(run)
        if not letters:
            for character in word:
                found += ["\ue004"] * (escape and "\ue001" <= character <= "\ue004") + [character]
            continue
        start = len(found) - (not escape and found[-1:] == [" "])
        if len(word) > 1 and all(c.isupper() for c in word):
            found.insert(start, "\ue002")
            found += word.lower()
            continue
        if word[0].isupper():
            found.insert(start, "\ue001")
        found += word[0].lower()
        for letter in word[1:]:
            found += ["\ue003", letter.lower()] if letter.isupper() else [letter]
    return "".join(found)


@settings(deadline=None, max_examples=150)
@given(TEXTS)
@example("The cat, NASA's camelCase: XMLParser, A, aB, Ab, AB, ABc  The")
def test_text_is_marked_run_by_run(text: str) -> None:
    assert case_markers.mark(text, ()) == text
    assert case_markers.mark(text) == marked_by_the_letter(text)
    assert case_markers.mark(text, [*case_markers.MARKERS, case_markers.ESCAPE]) == marked_by_the_letter(text, True)


@settings(deadline=None, max_examples=150)
@given(TEXTS)
@example("")
@example(" ")
@example(" The")
@example("  NASA  ")
@example("\ue001The\ue002 \ue003Of \u2581\u2581 A")
@example("\ue002\ue001 the")
@example("\u00c9A\u212aB QqQ qQ")
@example("<s></s><0x41>THE<unk>")
def test_every_text_comes_back(text: str) -> None:
    p = marked_processor()
    tokens = tokenizer.encode(p, text)
    assert tokens[0] == 1 and 1 not in tokens[1:] and 3 not in tokens
    assert tokenizer.decode(p, tokens) == text.encode()
    assert tokens == tokenizer.encode_exact(p, text) == tokenizer.encode_batch(p, [text, "x"])[0].tolist()
    for stop in range(len(tokens)):
        assert len(tokenizer.decode(p, tokens[:stop])) <= len(text.encode())


@settings(deadline=None, max_examples=150)
@given(TEXTS)
@example("")
@example(" The  \n\n NASA\ue001 \ue004")
@example("THe\u0301X \ufb01 \u2581E\u0301 \u00a0\u2460")
def test_others_markers_with_an_escape_can_say_any_text(text: str) -> None:
    p = escaping_processor()
    tokens = tokenizer.encode_exact(p, text)
    assert tokens[0] == 1 and 1 not in tokens[1:] and 3 not in tokens
    assert tokenizer.decode(p, tokens) == text.encode()
    assert bpb.count_bytes(bpb.byte_tables(p), np.array(tokens)) == len(text.encode())


def test_what_others_markers_keep_is_encoded_as_they_do() -> None:
    p, text = escaping_processor(), "The shape of NASA's XmlParser"
    assert case_markers.of(p) == {4: "\ue001", 5: "\ue002", 6: "\ue003", 7: "\ue004"}
    marked = "\ue001the shape of \ue002nasa's \ue001xml\ue003parser"
    assert tokenizer.encode(p, text) == tokenizer.encode_exact(p, text) == [1, *p.encode(marked)]
    assert tokenizer.decode(p, tokenizer.encode(p, text)) == text.encode()


def test_a_letter_without_a_piece_has_its_capital() -> None:
    """It is written in a byte token, as a small one."""
    p = marked_processor()
    q = p.piece_to_id("<0x71>")
    assert tokenizer.decode(p, [1, p.piece_to_id("\ue001"), q, q]) == b"Qq"
    assert tokenizer.decode(p, [1, p.piece_to_id("\ue002"), p.piece_to_id("\u2581"), q, q]) == b"QQ"


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ("\ue001 \u2581the", b" The"),
        ("\ue001 \u2581 \u2581the", b"  the"),  # of one space only
        ("\ue001 \ue001 the", b"The"),
        ("\ue002 \ue001 the", b"The"),
        ("\ue002 the \ue003 the \u2581the", b"THEThe the"),
        ("\ue002 \u2581the . the", b" THE.the"),
        ("\ue003 \u2581the", b" the"),
        ("\ue001 . the", b".the"),
        ("\ue001 <0x41> the", b"Athe"),
        ("\ue002 the <0xC3> the", b"THE\xc3the"),
        ("\ue001 <s> \u2581the", b"the"),
        ("<s> \ue001 \u2581the", b"The"),
        ("\ue002 the <s> \u2581the", b"THEthe"),
        ("the \ue001", b"the"),
    ],
)
def test_markers_that_no_encoder_writes(pieces: str, text: bytes) -> None:
    p = marked_processor()
    spelled = [p.encode(piece) if piece == "the" else [p.piece_to_id(piece)] for piece in pieces.split()]
    tokens = [token for part in spelled for token in part]
    assert 3 not in tokens
    assert tokenizer.decode(p, tokens) == text


def test_capitalised_words_share_their_pieces() -> None:
    p = marked_processor()
    assert case_markers.of(p) == {4: "\ue001", 5: "\ue002", 6: "\ue003"}
    the = p.piece_to_id("\u2581the")
    assert tokenizer.encode(p, "The the THE The") == [1, 4, the, the, 5, the, 4, the]
    assert not any(c.isascii() and c.isupper() for token in range(263, 512) for c in p.id_to_piece(token))
    encoded = tokenizer.encode_batch(p, documents(), threads=2)
    for text, tokens in zip(documents(), encoded, strict=True):
        assert tokenizer.decode(p, tokens) == text.encode()
        assert bpb.count_bytes(bpb.byte_tables(p), tokens) == len(text.encode())


def test_a_private_character_found_in_text_is_no_marker(tmp_path: Path) -> None:
    texts = [f"{text[:300]} \ue001 \ue002 \ue003" for text in documents()]
    p = tokenizer.train(texts, 512, tmp_path / "model")
    assert all(p.piece_to_id(marker) > 259 for marker in case_markers.MARKERS)
    assert case_markers.of(p) == case_markers.of(processor()) == {}
    text = "\ue001the The\ue003"
    assert tokenizer.decode(p, tokenizer.encode(p, text)) == text.encode()
    assert bpb.count_bytes(bpb.byte_tables(p), np.array(tokenizer.encode(p, text))) == len(text.encode())


@pytest.mark.parametrize(
    "text", ["THE" * 400, "".join(map(chr, range(0x4E00, 0x4E28))) * 40, "\ue001\ue002 \u2581X" * 30]
)
def test_texts_of_few_spaces_train_and_come_back(tmp_path: Path, text: str) -> None:
    texts = [documents()[0][:3000], *(text + ".".join(word) for word in permutations("ABCDE"))]
    p = tokenizer.train(texts, 300, tmp_path / "a", markers=True)
    tokenizer.train(texts, 300, tmp_path / "b", markers=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for each in (*texts, " A b", ""):
        assert tokenizer.decode(p, tokenizer.encode(p, each)) == each.encode()
