"""A little real text and a tokenizer trained on it, made once a test run."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from hedgemix.data import case_markers, docstrings, tokenizer

ODD = "\u2581\u2585\x00\t\n\r \ue000\ufeff\u200b\xa0\u2047e\u0301\u0130\U0001f600ab1.<s>"
TEXTS = st.text(st.sampled_from(ODD) | st.characters(codec="utf-8"), max_size=60)


@cache
def documents() -> tuple[str, ...]:
    """300 docstrings of numpy, about 300 KB."""
    return tuple(dict.fromkeys(islice(docstrings.of_packages(["numpy"]), 300)))


@cache
def processor() -> SentencePieceProcessor:
    """512 pieces trained on `documents`."""
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer.train(documents(), 512, Path(folder) / "tokenizer.model")


@cache
def marked_processor() -> SentencePieceProcessor:
    """512 pieces with markers for capitals, trained on `documents`."""
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer.train(documents(), 512, Path(folder) / "tokenizer.model", markers=True)


@cache
def escaping_processor() -> SentencePieceProcessor:
    """400 pieces as others make them: markers behind the space and ESCAPE, text normalised (nmt_nfkc), no prefix."""
    model, marks = io.BytesIO(), [*case_markers.MARKERS, case_markers.ESCAPE]
    SentencePieceTrainer.train(
        sentence_iterator=iter(case_markers.mark(" ".join(text.split())[:2000], marks) for text in documents()[:60]),
        model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, user_defined_symbols=marks, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False,
        split_digits=True, minloglevel=3,
    )  # fmt: skip
    return tokenizer.load(model.getvalue())


def repetitive_tokens() -> dict[str, np.ndarray]:
    """Texts in which strings of tokens come again, int64 or uint16 (N,), by name."""
    rng = np.random.default_rng(0)
    real = np.concatenate(tokenizer.encode_batch(processor(), documents()))
    return {
        "small alphabet": rng.integers(0, 3, 3000),
        "skewed": rng.zipf(1.3, 3000) % 50,
        "real": np.concatenate([real[:3000], real[500:1500], real[200:900]]),
    }


@cache
def without_spaces() -> bytes:
    """A tokenizer's model of which no piece begins with U+2581, so that each space is spelled in three byte tokens."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd abe abc"] * 50), model_writer=model, model_type="bpe", vocab_size=266,
        byte_fallback=True, add_dummy_prefix=False, character_coverage=1.0, minloglevel=3,
    )  # fmt: skip
    found = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in found.pieces:
        piece.piece = piece.piece.replace(tokenizer.SPACE, "q")
    return bytes(found.SerializeToString())
