"""Memory: training text that an artifact carries, so that its n-gram and match experts begin as if they had read it.

It is paid for: its bytes, compressed by PPMd (variant I of Shkarin 2002, order 16), are part of the artifact. Documents
are joined by a byte that UTF-8 never has, and are tokenized as the data step tokenizes them, each from its BOS on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from hedgemix.config import RecipeError
from hedgemix.data import shards, tokenizer
from hedgemix.runtime.files import replacing

FILE_NAME = "memory.ppmd"
LARGEST_TEXT = 2**26
FREE_TEXT, TEXT_A_BYTE, MOST_DOCUMENTS = 2**20, 64, 2**16
"""Most bytes of text, of text by its compressed bytes, and most documents: a file cannot ask for more, whatever it goes
on to. Real text compresses to a tenth at best."""
SEPARATOR = b"\xff"
MODEL = (16, 2**28, 0)
"""PPMd's order, bytes of its model (of which it touches about 40 a byte of text), and what it does when they are full:
begin anew. Measured on 4.0 MB of documentation: 717,840 bytes; at order 6 821,597, xz -9e 862,198, brotli -11 853,258,
zstd -22 874,325. Similar documents side by side instead of in the order of their hashes: 0.6 to 1 % less."""
FLUSH_BYTES = 8


class MemoryTextError(ValueError):
    """Tells that bytes are no compressed documents; the message says why."""


@dataclass(frozen=True)
class Memory:
    """Holds documents, compressed."""

    text_bytes: int
    """What `data` decompresses to: the documents in UTF-8, and a byte between each two."""
    data: bytes


def write(
    documents: Iterable[str],
    most_bytes: int,
    processor: SentencePieceProcessor,
    folder: Path,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Write the first documents, as many as `most_bytes` hold, into memory.ppmd of the folder, and describe them in
    fields of `dataset.Dataset`; 0 bytes leave neither. Raises RecipeError when they hold not one document."""
    path = folder / FILE_NAME
    if not most_bytes:
        return {}
    chosen, memory = choose(documents, most_bytes)
    if memory is None:
        raise RecipeError(f"data.memory_bytes {most_bytes:,} holds not one training document; raise it, or give 0")
    n_tokens = len(tokens(processor, chosen))
    with replacing(path) as file:
        file.write(memory.data)
    log(f"memory: {len(chosen):,} training documents, {n_tokens:,} tokens, in {len(memory.data):,} bytes")
    return {
        "memory": str(path.resolve()),
        "memory_documents": len(chosen),
        "memory_text_bytes": memory.text_bytes,
        "memory_bytes": len(memory.data),
        "memory_tokens": n_tokens,
        "memory_sha256": hashlib.sha256(memory.data).hexdigest(),
    }


def choose(documents: Iterable[str], most_bytes: int) -> tuple[list[str], Memory | None]:
    """Choose the first documents that compress to at most `most_bytes` and have at most LARGEST_TEXT bytes; returns
    them as they are and compressed, none and None where the first alone takes more."""
    encoder, chosen, text_bytes, found = _encoder(), list[str](), 0, 0
    for document in documents:
        part = document.encode() + SEPARATOR
        text_bytes += len(part)
        found += len(encoder.encode(part))
        if found > most_bytes or text_bytes > most_text(found) or len(chosen) == MOST_DOCUMENTS:
            break
        chosen.append(document)
    encoder.flush()
    # What the end of the stream takes on top is known only now, and is 8 bytes at most.
    while chosen:
        if len((memory := compress(chosen)).data) <= most_bytes:
            return chosen, memory
        chosen.pop()
    return [], None


def compress(documents: Sequence[str]) -> Memory:
    """Compress documents, one at least, each of at least one byte; the same documents give the same bytes."""
    text = SEPARATOR.join(document.encode() for document in documents)
    encoder = _encoder()
    data = encoder.encode(text)
    return Memory(len(text), data + encoder.flush())


def most_text(compressed_bytes: int) -> int:
    """Compute the most bytes of text that so many bytes may stand for."""
    return min(LARGEST_TEXT, FREE_TEXT + TEXT_A_BYTE * compressed_bytes)


def decompress(memory: Memory) -> list[str]:
    """Give the documents back; raises MemoryTextError unless the data is a whole stream of exactly `text_bytes`.

    At most that many bytes are made and one more, and at most `most_text`."""
    most = most_text(len(memory.data))
    if not 0 < memory.text_bytes <= most or not memory.data:
        raise MemoryTextError(f"it declares {memory.text_bytes:,} bytes of text, of at most {most:,}")
    from pyppmd import Ppmd8Decoder  # what has no memory does without

    decoder, most = Ppmd8Decoder(*MODEL), memory.text_bytes + 1  # one more, to see whether it goes on
    try:
        text = decoder.decode(memory.data, most)  # stops there, whatever the stream would go on to
        whole = decoder.eof and not decoder.unused_data
        # A stream that is cut short is fed to its end: the decoder works in a thread, and to take it away while that
        # waits for input can end the process.
        while decoder.needs_input and not decoder.eof and len(text) < most:
            text += decoder.decode(bytes(1 << 16), most - len(text))
    except (ValueError, SystemError, MemoryError) as error:  # what it raises for damaged data
        raise MemoryTextError(f"it cannot be decompressed ({error})") from None
    if len(text) != memory.text_bytes or not whole:
        raise MemoryTextError("it has not its declared length")
    if text.count(SEPARATOR) >= MOST_DOCUMENTS:
        raise MemoryTextError(f"it has more than {MOST_DOCUMENTS:,} documents")
    try:
        documents = [part.decode() for part in text.split(SEPARATOR)]
    except UnicodeDecodeError as error:
        raise MemoryTextError(f"a document is not UTF-8 ({error})") from None
    if not all(documents):
        raise MemoryTextError("a document is empty")
    return documents


def tokens(processor: SentencePieceProcessor, documents: Sequence[str]) -> np.ndarray:
    """Tokenize the documents as training text is: uint16 (M,), each beginning with BOS."""
    return np.concatenate([np.zeros(0, np.uint16), *tokenizer.encode_batch(processor, documents)])


def shard_documents(processor: SentencePieceProcessor, stream: shards.TokenStream) -> Iterator[str]:
    """Decode the documents of a token stream, each from its BOS to the next; what is no text is left out."""
    rest = np.zeros(0, np.uint16)
    for start in range(0, len(stream), shards.PIECE_TOKENS):
        piece = np.concatenate([rest, stream.read(start, min(shards.PIECE_TOKENS, len(stream) - start))])
        *whole, rest = np.split(piece, np.flatnonzero(piece == processor.bos_id()))
        yield from _texts(processor, whole)
    yield from _texts(processor, [rest])


def _texts(processor: SentencePieceProcessor, documents: Iterable[np.ndarray]) -> Iterator[str]:
    for document in documents:
        try:
            text = tokenizer.decode(processor, document).decode()
        except UnicodeDecodeError:  # its beginning was cut off
            continue
        if text:
            yield text


def _encoder() -> Any:
    from pyppmd import Ppmd8Encoder

    return Ppmd8Encoder(*MODEL)
