"""The check `bytes`: what the bits are divided by is the length of a text that is there, and not of one that a
tokenizer spells longer.

Shapes: V vocabulary, N tokens of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_tokenizer
from hedgemix.audit.claim import Claim
from hedgemix.audit.findings import Finding
from hedgemix.config import DataConfig, RecipeError
from hedgemix.data import bpb, case_markers, corpus, probes, text_set, tokenizer
from hedgemix.data import dataset as datasets
from hedgemix.data.shards import PIECE_TOKENS, TokenStream

OFFICIAL = {"4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a": "fineweb_1024_bpe.model"}
"""SHA-256 of the challenge's tokenizers."""
ENCODED_AGAIN = 1 << 20
"""Most tokens of the text that are decoded and encoded again."""
ENCODED_ALIKE = 0.99
"""Least share of them in documents of which the same tokens come."""
UNTRAINED_BYTES = 0.001
"""Largest share of the text's bytes in pieces that the training text has nowhere."""
USER_DEFINED = 4


def check_bytes(claim: Claim) -> Finding:
    """Check that the validation tokens stand for as many bytes as are counted: by texts of known length, by encoding
    again what they decode to, by the pieces in them, and by the raw text where it can be had."""
    found = artifact.read(claim.artifact)
    model, processor, stream = found.tokenizer, load_tokenizer(found), datasets.valid_stream(claim.dataset)
    markers = case_markers.of(processor).values()
    others = [piece for piece in user_defined(model) if piece not in markers]
    wrong = probes.miscounted(processor) + [f"piece {piece!r} is user-defined" for piece in others[:3]]
    alike, again = encoded_alike(processor, stream)
    if alike < ENCODED_ALIKE * again:
        wrong.append(f"of {again:,} tokens in whole documents {alike:,} come back from encoding their text")
    piece, share = untrained(processor, stream, TokenStream(claim.dataset.train_shards))
    if share > UNTRAINED_BYTES:
        wrong.append(f"{share:.2%} of the bytes are in pieces that training text has nowhere, such as {piece!r}")
    raw, differs = raw_text(claim.recipe.data, claim.dataset.text_sha256, processor, stream)
    wrong += differs
    digest = hashlib.sha256(model).hexdigest()
    official = OFFICIAL.get(digest, "")
    statement = (
        f"The tokenizer ({f'the official {official}' if official else f'SHA-256 {digest[:16]}…, not an official one'}) "
        f"counts {len(probes.PROBES)} probes as long as they are and has no user-defined piece"
        f"{' but markers for capitals' if markers else ''}; of {again:,} tokens in whole documents "
        f"{alike:,} come back from encoding their text; {share:.3%} of the bytes are in pieces that the training text "
        f"has nowhere. The raw text: {raw}."
    )
    figures = {
        "tokenizer_sha256": digest,
        "official_tokenizer": official or None,
        "tokens_encoded_again": again,
        "tokens_alike": alike,
        "share_of_bytes_in_untrained_pieces": share,
        "raw_text": raw,
        "violations": wrong[:8],
    }
    sound = f"{alike:,} of {again:,} tokens encoded alike; raw text {raw.partition(',')[0]}"
    headline = wrong[0] if wrong else sound
    return Finding("bytes", not wrong, headline, f"Violated: {wrong[0]}." if wrong else statement, figures)


def encoded_alike(processor: SentencePieceProcessor, stream: TokenStream) -> tuple[int, int]:
    """Decode the whole documents at the start of the text and encode them again: how many of their tokens are in
    documents that come back equal, and how many there are."""
    tokens_N = stream.read(0, min(len(stream), ENCODED_AGAIN))
    begins = np.flatnonzero(tokens_N == processor.bos_id())
    whole = [part for part in np.split(tokens_N, begins)[1:] if len(part)]
    if len(whole) > 1:
        whole.pop()  # the last may be cut
    texts = [tokenizer.decode(processor, part.tolist()).decode(errors="replace") for part in whole]
    again = tokenizer.encode_batch(processor, texts)
    alike = sum(len(part) for part, other in zip(whole, again, strict=True) if np.array_equal(part, other))
    return alike, sum(map(len, whole))


def untrained(processor: SentencePieceProcessor, stream: TokenStream, train: TokenStream) -> tuple[str, float]:
    """Measure the share of the text's bytes in pieces, not of one byte, that no training token is; with the one of most
    bytes."""
    size, tables = processor.vocab_size(), bpb.byte_tables(processor)
    bytes_V = np.zeros(size)
    for start in range(0, len(stream), PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, len(stream))
        counted_B = bpb.token_bytes(tables, stream, start, stop)
        bytes_V += np.bincount(stream.read(start, stop - start), counted_B, minlength=size)
    total = bytes_V.sum()
    bytes_V[[token for token in range(size) if processor.is_byte(token) or tables.is_control[token]]] = 0
    for start in range(0, len(train), PIECE_TOKENS):
        if not bytes_V.any():
            break
        bytes_V[np.unique(train.read(start, min(PIECE_TOKENS, len(train) - start)))] = 0
    return processor.id_to_piece(int(bytes_V.argmax())), float(bytes_V.sum() / total)


def raw_text(
    config: DataConfig, text_sha256: str, processor: SentencePieceProcessor, stream: TokenStream
) -> tuple[str, list[str]]:
    """Read the source again and hold its validation documents against the tokens: what can be said, what differs."""
    if config.source == "shards":
        return "not at hand (shards that others made), believed", []
    try:
        train, valid = corpus.split(corpus.collect(config), config.valid_fraction)
    except RecipeError:
        return "not readable here, believed", []
    if text_set.documents_sha256(chain(train.read(), valid.read())) != text_sha256:
        return "another one in the sources here, believed", []
    read, counted, tables = 0, 0, bpb.byte_tables(processor)
    for document in valid:
        whole = np.array(tokenizer.encode(processor, document))
        own = whole[: len(stream) - read]
        if bpb.count_bytes(tables, whole) != len(document.encode()):  # a tokenizer may make the text longer first
            return "differs", [f"the document at token {read:,} is counted as other bytes than the source has of it"]
        if not np.array_equal(own, stream.read(read, len(own)) if len(own) else own):
            return "differs", [f"the source's validation text is not what the tokens from {read:,} on say"]
        counted += bpb.count_bytes(tables, own) if len(own) > 1 else 0
        read += len(own)
    if read < len(stream):
        return "differs", [f"the source has {read:,} validation tokens, the shards {len(stream):,}"]
    return f"read again, its {counted:,} bytes are those of the tokens", []


def user_defined(model: bytes) -> list[str]:
    """List the pieces that a SentencePiece model takes whole wherever they occur, which it could be made to spell in
    any way (protobuf: ModelProto's field 1 is a piece, whose field 3 is its type)."""
    found = []
    for number, piece in _fields(model):
        if number == 1 and isinstance(piece, bytes):
            parts: dict[int, Any] = dict(_fields(piece))
            if parts.get(3) == USER_DEFINED:
                found.append(parts.get(1, b"").decode(errors="replace"))
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        yield key >> 3, data[at : at + size]
        at += size
