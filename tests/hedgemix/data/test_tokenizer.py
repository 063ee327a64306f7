from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from hedgemix.config import RecipeError
from hedgemix.data import bpb, tokenizer
from support.text_data import ODD, TEXTS, documents, processor


@settings(deadline=None, max_examples=300)
@given(TEXTS)
@example("")
@example(" ")
@example("\u2581")
@example("\u2581\u2581 \u2581 a")
@example("a\u2581b\x00\u2581\x00")
@example("  lead\n\n   and  trail  ")
@example("<s></s><0x41><unk>")
@example(ODD * 3)
def test_every_text_comes_back(text: str) -> None:
    tokens = tokenizer.encode(processor(), text)
    assert tokens[0] == processor().bos_id() == 1
    assert 1 not in tokens[1:] and 3 not in tokens
    assert tokenizer.decode(processor(), tokens) == text.encode()


def test_real_documents_come_back_and_are_shorter() -> None:
    encoded = tokenizer.encode_batch(processor(), documents(), threads=2)
    for text, tokens in zip(documents(), encoded, strict=True):
        assert tokens.dtype == np.uint16
        assert tokenizer.decode(processor(), tokens) == text.encode()
        assert tokens.tolist() == [1, *processor().encode(text)]
    assert sum(map(len, encoded)) < 0.6 * sum(map(len, documents()))


def test_a_batch_is_its_texts_one_by_one() -> None:
    texts = ["", "plain", "with \u2581 inside", ODD]
    batch = tokenizer.encode_batch(processor(), texts)
    assert [tokens.tolist() for tokens in batch] == [tokenizer.encode(processor(), text) for text in texts]


def test_a_literal_underline_costs_three_bytes_and_nothing_around_it_changes() -> None:
    p = processor()
    tokens = tokenizer.encode(p, "the array\u2581 of")
    literal = [p.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    assert tokens == [1, *p.encode("the array"), *literal, *p.encode(" of")[1:]]


def test_several_documents_decode_as_their_texts_joined() -> None:
    tokens = tokenizer.encode(processor(), " one") + tokenizer.encode(processor(), "two ")
    assert tokenizer.decode(processor(), tokens) == b" onetwo "
    assert tokenizer.decode(processor(), processor().encode(" x")[1:]) == b" x"  # no BOS: the space is text
    assert tokenizer.decode(processor(), tokenizer.encode(processor(), "\u20ac")[:-1]).endswith(b"\xe2\x82")


def test_the_vocabulary_has_what_was_asked_for() -> None:
    p = processor()
    pieces = [p.id_to_piece(token) for token in range(p.vocab_size())]
    assert len(pieces) == 512
    assert [p.pad_id(), p.bos_id(), p.eos_id(), p.unk_id()] == [0, 1, 2, 3]
    assert sum(p.is_byte(token) for token in range(512)) == 256
    assert not any(tokenizer.SPACE in piece[1:] for piece in pieces)
    assert not any(any(c.isdigit() for c in piece) and len(piece) > 1 for piece in pieces[260:])


def test_the_same_documents_give_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        tokenizer.train(documents(), 400, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert tokenizer.load(tmp_path / "a").vocab_size() == 400


def test_text_that_training_would_skip_or_die_of(tmp_path: Path) -> None:
    texts = [text + "\u2585\x00\u2581 \u2581" for text in documents()] + [
        "x" * 200_000,
        "".join(map(chr, range(0x4E00, 0x9000))),
    ]
    p = tokenizer.train(texts, 300, tmp_path / "model")
    assert p.vocab_size() == 300
    assert "e" in [p.id_to_piece(token) for token in range(300)]
    assert tokenizer.decode(p, tokenizer.encode(p, texts[0])) == texts[0].encode()


def test_only_the_first_documents_up_to_the_limit_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "SAMPLE_BYTES", 100_000)
    tokenizer.train(documents(), 400, tmp_path / "a")
    tokenizer.train([*documents(), "zq" * 50_000], 400, tmp_path / "b")
    tokenizer.train(documents()[::-1], 400, tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    ("texts", "size"), [(["text " * 100], 1024), ([], 1024), (["text"], 299), (["text"], 65537), (["\x00"], 300)]
)
def test_vocabularies_that_cannot_be(tmp_path: Path, texts: list[str], size: int) -> None:
    with pytest.raises(RecipeError, match="data.vocab_size"):
        tokenizer.train(texts, size, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("texts", [["text " * 20, *(f"word{n} and some" for n in range(30))], documents()[:1]])
def test_the_size_that_is_named_works(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"lower data.vocab_size to \d+ or read more text") as refused:
        tokenizer.train(texts, 4000, tmp_path / "model")
    size = int(str(refused.value).partition("data.vocab_size to ")[2].split()[0])
    assert tokenizer.train(texts, size, tmp_path / "model").vocab_size() == size


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "other.model").write_bytes(b"something else")
    for name, reason in (
        ("none.model", "cannot be read"),
        ("empty.model", "not a Sent"),
        ("other.model", "not a Sent"),
    ):
        with pytest.raises(RecipeError, match=f"data.tokenizer: .*{name}.*{reason}"):
            tokenizer.load(tmp_path / name)
    with pytest.raises(RecipeError, match="not a SentencePiece model"):
        tokenizer.load(b"something else")


@pytest.fixture(scope="module")
def normalising() -> SentencePieceProcessor:
    """Like the official one: nmt_nfkc, spaces stripped, no prefix."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(text.split())[:2000] for text in documents()[:60]),
        model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, split_digits=True, minloglevel=3,
    )  # fmt: skip
    return tokenizer.load(model.getvalue())


@settings(deadline=None, max_examples=300)
@given(TEXTS)
@example("")
@example(" the")
@example("  a  \n\n the  ")
@example("\ufb01 \u2581e\u0301 \u00a0\u2460")
def test_a_tokenizer_that_normalises_can_still_say_any_text(normalising: SentencePieceProcessor, text: str) -> None:
    tokens = tokenizer.encode_exact(normalising, text)
    assert tokens[0] == 1 and 1 not in tokens[1:] and 3 not in tokens
    assert tokenizer.decode(normalising, tokens) == text.encode()
    assert bpb.count_bytes(bpb.byte_tables(normalising), np.array(tokens)) == len(text.encode())


def test_what_a_tokenizer_keeps_is_encoded_as_ever(normalising: SentencePieceProcessor) -> None:
    text = "the shape of the array"
    assert tokenizer.encode_exact(normalising, text) == [1, *normalising.encode(text)]
    odd = tokenizer.encode_exact(normalising, text + "\n" + text)
    assert odd == [1, *normalising.encode(text), normalising.piece_to_id("<0x0A>"), *normalising.encode(text)]
