from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from hedgemix.data import bpb, probes, tokenizer
from hedgemix.data.shards import TokenStream
from support.text_data import TEXTS, documents, escaping_processor, marked_processor, processor


@settings(deadline=None, max_examples=200)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example([""])
@example([" ", "", "\u2581", " x"])
def test_bytes_of_tokens_add_up_to_the_text(texts: list[str]) -> None:
    tables = bpb.byte_tables(processor())
    tokens = np.concatenate(tokenizer.encode_batch(processor(), texts))
    assert tokens[0] == 1
    assert bpb.token_bytes(tables, tokens, 0, len(tokens)).sum() == sum(len(text.encode()) for text in texts)


def test_each_token_counts_what_decoding_it_adds() -> None:
    tokens = np.concatenate(tokenizer.encode_batch(processor(), [documents()[0][:500], " \u20ac\u2581 x", "y"]))
    lengths = [len(tokenizer.decode(processor(), tokens[:stop])) for stop in range(1, len(tokens) + 1)]
    found = bpb.token_bytes(bpb.byte_tables(processor()), tokens, 1, len(tokens))
    assert found.tolist() == np.diff(lengths).tolist()


@st.composite
def token_strings(draw: st.DrawFn) -> tuple[SentencePieceProcessor, np.ndarray]:
    """Tokens in any order, half of them markers, controls, spaces or bytes, which no encoder would write so."""
    p = draw(st.sampled_from([marked_processor(), escaping_processor()]))
    pieces = [*"\ue001\ue002\ue003\u2581", "\u2581the", "<s>", "<pad>", "<unk>", "<0x61>", "<0x41>", "<0x20>", "\ue004"]
    odd = st.sampled_from([p.piece_to_id(piece) for piece in pieces])
    return p, np.array(draw(st.lists(odd | st.integers(0, p.vocab_size() - 1), max_size=40)), np.uint16)


@settings(deadline=None, max_examples=300)
@given(token_strings(), st.integers(1, 9))
def test_any_tokens_count_what_decoding_adds_however_they_are_cut(
    drawn: tuple[SentencePieceProcessor, np.ndarray], step: int
) -> None:
    p, tokens = drawn
    tables = bpb.byte_tables(p)
    lengths = [len(tokenizer.decode(p, tokens[:stop])) for stop in range(len(tokens) + 1)]
    expected = [0, *np.diff(lengths)[1:].tolist()][: len(tokens)]
    stream = TokenStream([tokens[:3], tokens[3:]])
    for given_tokens in (tokens, stream):
        parts = [
            bpb.token_bytes(tables, given_tokens, start, min(start + step, len(tokens)))
            for start in range(0, len(tokens), step)
        ]
        assert [size for part in parts for size in part.tolist()] == expected
        assert bpb.count_bytes(tables, given_tokens) == sum(expected)


def test_a_marker_behind_an_escape_is_text() -> None:
    p = escaping_processor()
    title, escape, the = (p.piece_to_id(piece) for piece in ("\ue001", "\ue004", "\u2581the"))
    tokens = [1, escape, title, escape, escape, escape, title, title, the, escape, the, title]
    assert tokenizer.decode(p, tokens) == "\ue001\ue004\ue001 The the".encode()
    sizes = bpb.token_bytes(bpb.byte_tables(p), np.array(tokens), 0, len(tokens))
    assert sizes.tolist() == [0, 0, 3, 0, 3, 0, 3, 0, 4, 0, 4, 0]


def test_markers_of_any_number_are_looked_past() -> None:
    p = marked_processor()
    title, the = p.piece_to_id("\ue001"), p.piece_to_id("\u2581the")
    tables = bpb.byte_tables(p)
    for before, size in ((p.bos_id(), 3), (the, 4), (p.piece_to_id("<0x20>"), 4)):
        tokens = np.array([the, before, *[title] * 1000, the])
        assert bpb.token_bytes(tables, tokens, 1002, 1003).tolist() == [size]
        assert bpb.token_bytes(tables, tokens, 600, 1003).tolist() == [0] * 402 + [size]


def trained(**changes: object) -> SentencePieceProcessor:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False} | changes  # fmt: skip
    texts = (" ".join(text.split())[:2000] for text in documents()[:60])
    SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, minloglevel=3, **settings)
    return tokenizer.load(model.getvalue())


def test_what_a_tokenizer_does_not_write_is_measured() -> None:
    assert probes.changed_share(processor()) == 0.0 and probes.adds_prefix(processor())
    assert probes.changed_share(marked_processor()) == 0.0 and probes.adds_prefix(marked_processor())
    assert probes.miscounted(marked_processor()) == probes.miscounted(escaping_processor()) == []
    exact = trained()
    assert probes.changed_share(exact) == 0.0 and probes.miscounted(exact) == []
    squeezed = trained(remove_extra_whitespaces=True)
    lost = sum(len(text) - len(re.sub(" +", " ", text)) for text in probes.PROBES)
    assert probes.changed_share(squeezed) == pytest.approx(lost / sum(len(text.encode()) for text in probes.PROBES))
    unknown = trained(byte_fallback=False, add_dummy_prefix=False)
    assert probes.changed_share(unknown) > 0.3 and not probes.adds_prefix(unknown)


def test_counting_in_pieces_is_counting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = bpb.byte_tables(processor())
    tokens = np.concatenate(tokenizer.encode_batch(processor(), documents()[:20]))
    monkeypatch.setattr(bpb, "PIECE_TOKENS", 7)
    assert bpb.count_bytes(tables, tokens) == sum(len(text.encode()) for text in documents()[:20])
    assert bpb.count_bytes(tables, tokens[:1]) == bpb.count_bytes(tables, tokens[:0]) == 0


def test_tables_of_pieces_that_our_own_tokenizer_does_not_have() -> None:
    pieces = ["<pad>", "<unk>", "<unused>", "<0x20>", "\u2581", "\u2581\u00e9", "a\u2581b", "\u2581\u2581"]
    kinds = {"is_control": {0}, "is_unknown": {1}, "is_unused": {2}, "is_byte": {3}}
    fake = SimpleNamespace(vocab_size=lambda: len(pieces), id_to_piece=pieces.__getitem__)
    for name, members in kinds.items():
        setattr(fake, name, members.__contains__)
    fake.unk_id, fake.piece_to_id = lambda: 1, lambda piece: pieces.index(piece) if piece in pieces else 1
    tables = bpb.byte_tables(fake)  # type: ignore[arg-type]
    assert tables.bytes_without_space.tolist() == [0, 0, 0, 1, 0, 2, 3, 1]
    assert tables.has_leading_space.tolist() == [False, False, False, False, True, True, False, True]
    pairs = ([0, 5], [1, 5], [2, 5], [3, 5], [6, 5], [5, 0])
    assert [bpb.count_bytes(tables, np.array(pair)) for pair in pairs] == [2, 2, 2, 3, 3, 0]


def test_bits_per_byte() -> None:
    assert bpb.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="0 bytes"):
        bpb.bits_per_byte(1.0, 0)
