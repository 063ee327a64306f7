"""Windows of one text found in another, against sets of tuples."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.data import overlap
from hedgemix.data.shards import TokenStream
from support.text_data import documents

SPACES = st.sampled_from([" ", "  ", "\n", "\n\n", " \n \n", "\t", "\r\n\r\n", "\xa0", "\u2028"])
WORDS = st.sampled_from(["a", "A", "b", "\xdf", "\u0130", "\x00", "ab"])
TEXTS = st.lists(
    st.lists(st.tuples(WORDS, SPACES), max_size=30).map(lambda text: "".join(map("".join, text))), max_size=5
)


def plain(text: str, words: int) -> list[tuple[str, ...]]:
    found = text.lower().split()
    return [tuple(found[at : at + words]) for at in range(max(1, len(found) - words + 1))] if found else []


def plain_share(valid: list[str], train: list[str], words: int) -> float:
    known = {window for text in train for window in plain(text, words)}
    seen = [window in known for text in valid for window in plain(text, words)]
    return sum(seen) / max(1, len(seen))


def planted(words: int) -> tuple[list[str], list[str]]:
    """Real text, of which some training documents repeat validation text with other case and white space."""
    train, valid = list(documents()[:150]), list(documents()[150:200])
    train[3] += "\n\n" + " \n ".join(valid[0].upper().split()[: words + 3])
    train[7] = "\t".join(valid[1].split())
    train[9] = valid[2].replace("\n", "\n\n") + "\n\nand a last paragraph that stands nowhere else\n"
    return train, valid


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS, st.integers(1, 5))
def test_shares_and_cuts_are_those_of_sets_of_tuples(valid: list[str], train: list[str], words: int) -> None:
    windows = overlap.of_documents(valid, words)
    assert overlap.share_in_documents(windows, train, words) == plain_share(valid, train, words)
    kept = list(overlap.without_repeats(train, windows, words))
    known = {window for text in valid for window in plain(text, words)}
    assert not any(window in known for text in kept for window in plain(text, words))
    untouched = [text for text in train if text.strip() and known.isdisjoint(plain(text, words))]
    assert [text for text in kept if text in untouched] == untouched


@pytest.mark.parametrize("words", [5, 8, 13])
def test_planted_repeats_go_and_other_text_stays(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid = planted(words)
    windows = overlap.of_documents(valid, words)
    assert overlap.share_in_documents(windows, train, words) == plain_share(valid, train, words) > 0.05
    kept = list(overlap.without_repeats(train, windows, words))
    assert plain_share(valid, kept, words) == 0
    assert "and a last paragraph that stands nowhere else" in kept[-1] + "".join(kept)
    monkeypatch.setattr(overlap, "BATCH_CHARACTERS", 1)
    assert list(overlap.without_repeats(iter(train), windows, words)) == kept  # a document at a time
    assert overlap.share_in_documents(windows, iter(train), words) == plain_share(valid, train, words)


def test_a_paragraph_goes_and_its_neighbours_stay() -> None:
    shared = "one two three four five six seven eight"
    windows = overlap.of_documents([f"before {shared} after"], 8)
    text = f"First paragraph.\n\nHere {shared.upper()}\n  \nThe  last,\nof two lines.\n"
    assert list(overlap.without_repeats([text], windows, 8)) == ["First paragraph.\n  \nThe  last,\nof two lines.\n"]
    lines = f"a line\nx {shared}\nanother line"
    assert list(overlap.without_repeats([lines], windows, 8)) == ["a line\nanother line"]
    across = "Zero one two three\n\nfour five six seven eight nine\n\nten"
    assert list(overlap.without_repeats([across], windows, 8)) == ["ten"]
    gap = f"one two three four\n\n{shared} x\n\nfive six seven eight"  # what is left would be the window again
    assert list(overlap.without_repeats([gap, shared, "none"], windows, 8)) == ["none"]


def test_paragraphs_are_cut_out_like_the_obvious_version() -> None:
    train, valid = planted(8)
    known = {window for text in valid for window in plain(text, 8)}

    def obvious(text: str) -> str:
        while hit := [at for at, window in enumerate(plain(text, 8)) if window in known]:
            covered = {word for at in hit for word in range(at, at + 8)}
            parts = re.split(r"(?<=\n)(?=[^\S\n]*\n)", text)
            parts = re.split(r"(?<=\n)", text) if len(parts) == 1 else parts
            kept, word = "", 0
            for part in parts:
                size = len(part.split())
                kept += "" if covered.intersection(range(word, word + size)) else part
                word += size
            text = kept.lstrip("\n")
        return text

    expected = [text for text in map(obvious, train) if text.strip()]
    assert list(overlap.without_repeats(train, overlap.of_documents(valid, 8), 8)) == expected


@pytest.mark.parametrize(("piece", "window"), [(7, 13), (64, 13), (1 << 18, 13), (100, 1)])
def test_tokens_in_pieces_and_shards_are_the_whole(piece: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "PIECE_TOKENS", piece)
    generator = np.random.default_rng(0)
    train, valid = (generator.integers(0, 1024, size).astype(np.uint16) for size in (3000, 700))
    valid[100:160], valid[300:313] = train[970:1030], train[2987:]
    known = {tuple(train[at : at + window]) for at in range(len(train) - window + 1)}
    seen = [tuple(valid[at : at + window]) in known for at in range(len(valid) - window + 1)]
    streams = TokenStream([valid[:305], valid[305:]]), TokenStream([train[:1000], train[1000:]])
    assert overlap.share_in_tokens(*streams, window) == sum(seen) / len(seen) > 0.05
    assert overlap.share_in_tokens(TokenStream([valid[: window - 1]]), streams[1], window) == 0


def test_a_long_text_is_sampled_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    train, valid = (generator.integers(0, 1024, 200_000).astype(np.uint16) for _ in range(2))
    valid[:50_000] = train[:50_000]
    whole = overlap.share_in_tokens(TokenStream([valid]), TokenStream([train]))
    assert whole == (50_000 - 12) / (200_000 - 12)
    monkeypatch.setattr(overlap, "SAMPLED_WINDOWS", 20_000)
    sampled = overlap.share_in_tokens(TokenStream([valid]), TokenStream([train]))
    assert sampled != whole and abs(sampled - whole) < 0.01
