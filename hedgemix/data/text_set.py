"""Docs and text made into a data set's files: what repeats validation text left out, a tokenizer trained, every
document encoded. Documents stream from disk to disk, so that memory grows with the validation text alone. A making that
was stopped goes on behind its last whole shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import SentencePieceProcessor

from hedgemix.config import DataConfig, RecipeError, config_hash
from hedgemix.data import bpb, corpus, memory, overlap, shards, tokenizer
from hedgemix.data.own_files import MadeFiles, OwnFiles, shard_name
from hedgemix.data.reading import Reading
from hedgemix.data.spool import Spool
from hedgemix.runtime.cpus import available_cpus
from hedgemix.runtime.interrupts import interruptible

SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 2_000_000
MODEL = "tokenizer.model"
EncodeParts = Callable[[bytes, Iterator[list[str]]], Iterator[np.ndarray]]
"""Makes tokens of batches of documents, uint16 (n,) each, in their order: given a SentencePiece model, and what
`encode_part` gives for each."""


def encode_here(model: bytes, batches: Iterator[list[str]]) -> Iterator[np.ndarray]:
    """Encode batches by all cores of this machine; raises as `encode_part` does."""
    processor = tokenizer.load(model)
    tables = bpb.byte_tables(processor)
    for batch in batches:
        yield interruptible(partial(encode_part, processor, tables, batch, cores()))


def encode_part(
    processor: SentencePieceProcessor, tables: bpb.ByteTables, documents: list[str], threads: int = 1
) -> np.ndarray:
    """Encode documents into one row of tokens, uint16 (n,), the same for any number of threads. Raises RuntimeError
    should the tokens stand for other bytes (a bug)."""
    tokens = np.concatenate(tokenizer.encode_batch(processor, documents, threads))
    counted, expected = bpb.count_bytes(tables, tokens), sum(len(text.encode()) for text in documents)
    if counted != expected:
        raise RuntimeError(f"the tokens stand for {counted} bytes and the text has {expected}: tokenizer bug")
    return tokens


def make(
    config: DataConfig, folder: Path, log: Callable[[str], None], encode_parts: EncodeParts = encode_here
) -> MadeFiles:
    """Read the source and write tokenizer and shards into the folder, in place of an earlier data set's. encode_parts
    is called once for each side.

    Raises RecipeError when the source cannot be used or the folder holds others' files by these names, OSError when it
    cannot be written to or is full, RuntimeError should tokens and text disagree (a bug).
    """
    own = OwnFiles(folder)
    reading = Reading()
    everything, valid = corpus.split(corpus.collect(config, reading, folder), config.valid_fraction, folder)
    log(str(reading))
    documents, size = len(everything) + len(valid), (everything.n_bytes + valid.n_bytes) / 1e6
    log(f"{config.source}: {documents:,} documents, {size:.1f} MB, {len(valid):,} of them for validation")
    text_sha256 = documents_sha256(chain(everything.read(), valid.read()))
    train, known = _held_out(config, everything, valid, folder, log)
    sizes = BATCH_CHARACTERS, SHARD_TOKENS
    own.begin(key=config_hash(config, text_sha256, train.n_bytes, sizes, sentencepiece.__version__))
    model = own.path(MODEL)
    processor = interruptible(partial(tokenizer.train, train, config.vocab_size, model, config.case_markers))
    log(f"tokenizer: {config.vocab_size} pieces trained{', with markers for capitals' if config.case_markers else ''}")
    train_paths, valid_paths = (
        _write_shards(own, name, partial(encode_parts, model.read_bytes()), side, log)
        for name, side in (("train", train), ("val", valid))
    )
    if config.memory_bytes:
        own.path(memory.FILE_NAME)
    known |= interruptible(partial(memory.write, train, config.memory_bytes, processor, folder, log))
    known |= {"train_documents": len(train), "text_sha256": text_sha256}
    return MadeFiles(model, processor, train_paths, valid_paths, known)


def documents_sha256(documents: Iterable[bytes]) -> str:
    """Hash documents in UTF-8, whatever their order: SHA-256 of the sorted SHA-256 of each, in hex."""
    digests = b"".join(hashlib.sha256(document).digest() for document in documents)
    return hashlib.sha256(np.sort(np.frombuffer(digests, "S32")).tobytes()).hexdigest()


def _held_out(
    config: DataConfig, documents: Spool, valid: Spool, folder: Path, log: Callable[[str], None]
) -> tuple[Spool, dict[str, Any]]:
    """The training documents without what repeats validation text, and what the data set tells of it."""
    words = config.overlap_words or overlap.WINDOW_WORDS
    windows = overlap.of_documents(valid, words)
    kept = documents
    if config.overlap_words:
        kept, seen = Spool(folder), np.zeros(len(windows.hashes), bool)
        for document in overlap.without_repeats(documents, windows, words, seen):
            kept.add(document.encode())
        before = windows.share(seen)
    share = overlap.share_in_documents(windows, kept, words)  # measured, though it has to be 0 where any are left out
    if not len(kept):
        raise RecipeError(
            f"data.overlap_words {words}: every training document repeats validation text; read other text, or set "
            "it to 0"
        )
    size, removed = documents.n_bytes, documents.n_bytes - kept.n_bytes
    log(
        f"held out: {before:.2%} of the validation text's windows of {words} words were in the training text; "
        f"paragraphs with them were {removed / size:.2%} of it, {removed:,} bytes, and are left out: "
        f"{share:.2%} are in it now"
        if config.overlap_words
        else f"not held out: {share:.2%} of the validation text's windows of {words} words are in the training text, "
        "and data.overlap_words is 0"
    )
    return kept, {
        "valid_overlap_share": share,
        "overlap_window": f"{words} words",
        "train_bytes": size - removed,
        "train_bytes_removed": removed,
    }


def cores() -> int:
    """Count the cores that this process may use."""
    return available_cpus()


def _write_shards(
    own: OwnFiles,
    name: str,
    encode: Callable[[Iterator[list[str]]], Iterator[np.ndarray]],
    documents: Iterable[str],
    log: Callable[[str], None],
) -> list[Path]:
    """Encode the documents into shards, behind those that a making which was stopped left whole."""
    whole = own.shards.get(name, [])
    paths: list[Path] = []
    for number in range(len(whole)):
        path = own.folder / shard_name(name, number)
        try:
            shards.map_shard(path)
        except RecipeError:  # lost or cut since
            del whole[number:]
            break
        paths.append(path)
    if whole:
        log(f"{name}: {len(whole)} shards are there from a making that was stopped")
    first, begin = whole[-1] if whole else (0, 0)

    def write(tokens: np.ndarray) -> None:
        paths.append(own.path(shard_name(name, len(paths))))
        shards.write_shard(paths[-1], tokens)

    pending: list[np.ndarray] = []
    batches = islice(corpus.batches(documents, BATCH_CHARACTERS), first, None)
    for batch, tokens in enumerate(encode(batches), first):
        pending.append(tokens[begin:] if batch == first else tokens)
        while sum(map(len, pending)) >= SHARD_TOKENS:
            held = np.concatenate(pending)
            write(held[:SHARD_TOKENS])
            pending = [held[SHARD_TOKENS:]]
            own.shard_is_whole(name, batch, len(tokens) - len(pending[0]))
    rest = np.concatenate([np.zeros(0, np.uint16), *pending])
    if len(rest):
        write(rest)
    return paths
