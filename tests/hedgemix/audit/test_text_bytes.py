"""Bytes that are no text's: tokenizers that spell or count longer, and pieces for the validation text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from hedgemix.audit import text_bytes
from hedgemix.config import DataConfig
from hedgemix.data import case_markers, corpus, probes, text_set, tokenizer
from hedgemix.data.shards import TokenStream
from support.text_data import documents, marked_processor, processor, without_spaces
from support.tiny_run import Record

BYTE, NORMAL = 6, 1


def changed(change: Callable[[Any], None]) -> SentencePieceProcessor:
    model = sentencepiece_model_pb2.ModelProto.FromString(processor().serialized_model_proto())
    change(model)
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def spelled(model: Any) -> None:
    """Whole words are said to be longer than they are."""
    for piece in model.pieces:
        if piece.type == NORMAL and len(piece.piece) > 3:
            piece.piece += "-which-is-to-say"


def defined(model: Any) -> None:
    next(piece for piece in model.pieces if piece.piece == "▁the").type = text_bytes.USER_DEFINED


def stream(own: SentencePieceProcessor, texts: list[str]) -> TokenStream:
    return TokenStream([np.concatenate(tokenizer.encode_batch(own, texts))])


def test_a_sound_run_s_bytes_are_its_text_s(made: Record) -> None:
    found = text_bytes.check_bytes(made.claim())
    assert found.passed, found.headline
    assert found.figures["tokens_encoded_again"] == found.figures["tokens_alike"] > 300
    assert (
        found.figures["raw_text"] == "not at hand (shards that others made), believed"
        and found.figures["official_tokenizer"] is None
    )
    assert "not an official one" in found.statement


def test_a_tokenizer_that_spells_its_pieces_longer_is_caught() -> None:
    texts = documents()[:20]
    tokens = stream(processor(), texts)
    alike, again = text_bytes.encoded_alike(processor(), tokens)
    assert alike == again > 1000
    assert text_bytes.encoded_alike(changed(spelled), tokens)[0] < 0.5 * again


def test_a_space_of_three_bytes_is_caught() -> None:
    wrong = probes.miscounted(SentencePieceProcessor(model_proto=without_spaces()))
    assert "'Plain words, and a Name.' is counted as 32 bytes, and has 24" in wrong


def test_user_defined_pieces_are_found() -> None:
    assert text_bytes.user_defined(processor().serialized_model_proto()) == []
    assert text_bytes.user_defined(changed(defined).serialized_model_proto()) == ["▁the"]
    marked = marked_processor()
    assert text_bytes.user_defined(marked.serialized_model_proto()) == [*case_markers.MARKERS]
    alike, again = text_bytes.encoded_alike(marked, stream(marked, documents()[:20]))
    assert alike == again > 1000


def test_pieces_for_the_validation_text_alone_are_found() -> None:
    own, texts = processor(), documents()[:40]
    tokens = stream(own, texts)
    assert text_bytes.untrained(own, tokens, tokens) == (own.id_to_piece(0), 0.0)
    the = own.piece_to_id("▁the")
    without = tokens.read(0, len(tokens))
    piece, share = text_bytes.untrained(own, tokens, TokenStream([without[without != the]]))
    count = int((without == the).sum())
    assert piece == "▁the" and share == pytest.approx(4 * count / sum(len(text.encode()) for text in texts), rel=0.02)


def test_the_raw_text_is_read_again_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number, text in enumerate(documents()[:60]):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    config = DataConfig(source="text", paths=(str(tmp_path / "text"),), valid_fraction=0.2)
    texts = list(corpus.collect(config))
    sha256, valid = text_set.documents_sha256(text.encode() for text in texts), list(corpus.split(texts, 0.2)[1])
    tokens, n_bytes = stream(processor(), valid), sum(len(text.encode()) for text in valid)
    said, wrong = text_bytes.raw_text(config, sha256, processor(), tokens)
    assert said == f"read again, its {n_bytes:,} bytes are those of the tokens" and not wrong
    cut = TokenStream([tokens.read(0, 100)])
    assert text_bytes.raw_text(config, sha256, processor(), cut)[0].startswith("read again")

    edited = tokens.read(0, len(tokens)).copy()
    edited[50] = (edited[50] + 1) % processor().vocab_size()
    said, wrong = text_bytes.raw_text(config, sha256, processor(), TokenStream([edited]))
    assert said == "differs" and "is not what the tokens from" in wrong[0]
    more = TokenStream([np.concatenate([tokens.read(0, len(tokens)), edited])])
    assert "the source has" in text_bytes.raw_text(config, sha256, processor(), more)[1][0]
    assert "another one in the sources" in text_bytes.raw_text(config, "0" * 64, processor(), tokens)[0]
    longer = tmp_path / "longer.tsv"
    longer.write_text("65\t41 41 41\n")  # every e becomes three letters, which no further pass changes
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "longer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, normalization_rule_tsv=str(longer), remove_extra_whitespaces=False, minloglevel=3,
    )  # fmt: skip
    lengthening = tokenizer.load(tmp_path / "longer.model")
    said, wrong = text_bytes.raw_text(config, sha256, lengthening, stream(lengthening, valid))
    assert said == "differs" and "is counted as other bytes than the source has of it" in wrong[0]
    away = replace(config, paths=(str(tmp_path / "away"),))
    assert text_bytes.raw_text(away, sha256, processor(), tokens) == ("not readable here, believed", [])
