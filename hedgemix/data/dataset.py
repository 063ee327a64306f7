"""A data set on disk: token shards, their tokenizer, and what identifies them, made from any `DataConfig`.

Notable: validation is hashed whole, since a score is only comparable on the same tokens; training shards, which can be
10 GB, by name, size and their first and last megabyte. The bytes of text are counted twice, from the text and from the
tokens, and have to agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hedgemix.config import DataConfig, RecipeError, from_dict, to_dict
from hedgemix.data import bpb, memory, own_files, shards, tokenizer
from hedgemix.runtime.files import read_json, write_json
from hedgemix.validate import check_data

if TYPE_CHECKING:
    from hedgemix.data import text_set

EDGE_BYTES = 1 << 20
READ_TOKENS = 1 << 22
FILE_NAME = own_files.DATASET


@dataclass(frozen=True)
class Dataset:
    """Says what a run reads: shards, tokenizer, and what they hold."""

    source: str
    """docs, text or shards."""
    train_shards: tuple[str, ...]
    valid_shards: tuple[str, ...]
    tokenizer: str
    """Path of the SentencePiece model."""
    vocab_size: int
    train_tokens: int
    valid_tokens: int
    """Tokens of the validation stream, after max_valid_tokens; one less is scored, the first is only context."""
    max_valid_tokens: int
    """The validation stream is cut to this many tokens (0: whole)."""
    valid_bytes: int
    """Bytes of text the scored validation tokens stand for."""
    train_documents: int
    """Training documents (shards: 0, not counted)."""
    valid_documents: int
    """Documents that begin in the validation stream."""
    tokenizer_sha256: str
    valid_sha256: str
    """Of the scored validation tokens (all but the first) as little-endian uint16."""
    train_sha256: str
    """Of each training shard's name, size, first and last megabyte."""
    text_sha256: str
    """docs, text: of the sorted SHA-256 of all documents; shards: ''."""
    valid_overlap_share: float | None = None
    """Share of the validation text's windows that occur in the training text. (Here and below None: a data set of an
    older version, which did not look.)"""
    overlap_window: str = ""
    """What these windows are: 8 words (or data.overlap_words) of text without case and white space; shards: 13
    tokens."""
    train_bytes: int | None = None
    """Bytes of training text (shards: None)."""
    train_bytes_removed: int | None = None
    """Bytes left out of the training text, since they repeat validation text."""
    memory: str = ""
    """Path of the training text that every artifact carries, compressed; '' without."""
    memory_documents: int = 0
    memory_text_bytes: int = 0
    """Bytes it decompresses to."""
    memory_bytes: int = 0
    """Bytes it takes in an artifact."""
    memory_tokens: int = 0
    memory_sha256: str = ""
    """Of the compressed bytes."""
    folder: str = field(default="", compare=False)
    """Where dataset.json was loaded from."""


def prepare(
    config: DataConfig,
    folder: Path,
    log: Callable[[str], None] = print,
    encode_parts: text_set.EncodeParts | None = None,
) -> Dataset:
    """Make or check what a run reads. docs and text are tokenized into `folder`, by `encode_parts` instead of this
    machine's cores if given; shards stay where they are. `save` ends the making.

    Raises RecipeError when the source cannot be used or the folder holds others' files by the names of ours, OSError
    when it cannot be written to or is full, RuntimeError should tokens and text disagree (a bug).
    """
    folder = Path(folder)
    check_data(config)
    # A train_gpt.py has what makes its own source's alone.
    if config.source == "shards":
        from hedgemix.data import shard_set

        made = shard_set.make(config, folder, log)
    else:
        from hedgemix.data import text_set

        made = text_set.make(config, folder, log, encode_parts or text_set.encode_here)
    return _describe(config, made, log)


def train_stream(dataset: Dataset) -> shards.TokenStream:
    """Open all training tokens."""
    return shards.TokenStream(dataset.train_shards)


def valid_stream(dataset: Dataset) -> shards.TokenStream:
    """Open the validation tokens, cut to max_valid_tokens; all but the first are scored."""
    return shards.TokenStream(dataset.valid_shards, dataset.max_valid_tokens)


def read_memory(dataset: Dataset) -> memory.Memory | None:
    """Read the training text that every artifact carries, None without; raises RecipeError when the file is not the one
    described."""
    if not dataset.memory:
        return None
    data = Path(dataset.memory).read_bytes()
    if hashlib.sha256(data).hexdigest() != dataset.memory_sha256:
        raise RecipeError(f"{dataset.memory} is not the file that {FILE_NAME} names; prepare the data again")
    return memory.Memory(dataset.memory_text_bytes, data)


def memory_tokens(dataset: Dataset) -> np.ndarray:
    """Tokenize the training text that every artifact carries, uint16 (M,); raises as `read_memory` does."""
    found = read_memory(dataset)
    return memory.tokens(tokenizer.load(dataset.tokenizer), memory.decompress(found) if found else [])


def bos_id(dataset: Dataset) -> int:
    """Look up the token that begins documents; raises RecipeError for a tokenizer that has none."""
    found = tokenizer.load(dataset.tokenizer).bos_id()
    if found < 0:
        raise RecipeError(
            f"model.within_documents needs documents that begin with BOS, and {dataset.tokenizer} has no such piece; "
            "turn it off, or use another tokenizer"
        )
    return found


def save(dataset: Dataset, folder: str | Path) -> None:
    """Write dataset.json; paths inside `folder` are kept relative, so the folder can be moved."""
    root = Path(folder).resolve()

    def place(path: str) -> str:
        full = Path(path).resolve()
        return str(full.relative_to(root)) if full.is_relative_to(root) else str(full)

    written = dataclasses.replace(_with_paths(dataset, place), folder="")
    write_json(root / FILE_NAME, to_dict(written))
    own_files.finish(root)


def load(folder: str | Path) -> Dataset:
    """Read what `save` wrote; raises RecipeError when it is not there or cannot be read."""
    root = Path(folder).resolve()
    try:
        dataset = from_dict(Dataset, read_json(root / FILE_NAME))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{root / FILE_NAME} cannot be read ({error}); prepare the data again") from None
    return dataclasses.replace(_with_paths(dataset, lambda path: str(root / path)), folder=str(root))


def check_places(dataset: Dataset, config: DataConfig) -> None:
    """Raise RecipeError when a loaded dataset names files that its source did not give: a dataset.json that others can
    write must not choose what is read, since the tokenizer goes into the artifact as it is."""
    folder = Path(dataset.folder if config.source != "shards" else config.shards_dir)
    mine = {path.resolve() for path in folder.iterdir()}
    if config.source == "shards" and config.tokenizer:
        mine.add(Path(config.tokenizer).resolve())
    if dataset.memory and Path(dataset.memory).resolve() != Path(dataset.folder).resolve() / memory.FILE_NAME:
        raise RecipeError(f"{dataset.folder}/{FILE_NAME} names {dataset.memory}, which is not its memory; remove it")
    for path in (*dataset.train_shards, *dataset.valid_shards, dataset.tokenizer):
        place = Path(path).resolve()
        if place not in mine or (config.source != "shards" and place.parent != folder.resolve()):
            raise RecipeError(f"{dataset.folder}/{FILE_NAME} names {path}, which is not of data.source; remove it")


def check(dataset: Dataset, train_tokens_needed: int, valid_tokens_needed: int) -> None:
    """Raise RecipeError when there are fewer tokens than one training batch or one scored window takes."""
    source = {"docs": "data.packages", "text": "data.paths", "shards": "data.shards_dir"}[dataset.source]
    cut = "" if dataset.source == "shards" else ", raise data.max_text_bytes"
    if dataset.train_tokens < train_tokens_needed:
        raise RecipeError(
            f"{source} gave {dataset.train_tokens:,} training tokens and one step needs {train_tokens_needed:,}; "
            f"name more text{cut} or lower train.batch_tokens"
        )
    if dataset.valid_tokens < valid_tokens_needed:
        share = "" if dataset.source == "shards" else ", raise data.valid_fraction"
        limit = ", raise data.max_valid_tokens" if dataset.max_valid_tokens else ""
        raise RecipeError(
            f"{source} gave {dataset.valid_tokens:,} validation tokens and scoring needs {valid_tokens_needed:,}; "
            f"name more text{cut}{share}{limit} or lower evaluate.window_tokens"
        )


def _describe(config: DataConfig, made: own_files.MadeFiles, log: Callable[[str], None]) -> Dataset:
    processor = made.processor
    stream = shards.TokenStream(made.valid, config.max_valid_tokens)
    digest = hashlib.sha256()
    valid_documents, last = int(stream.read(0, 1)[0] == processor.bos_id()), 0
    while last + 1 < len(stream):
        tokens = stream.read(last, min(READ_TOKENS, len(stream) - last))
        digest.update(tokens[1:].astype(shards.TOKEN).tobytes())
        valid_documents += int((tokens[1:] == processor.bos_id()).sum())
        last += len(tokens) - 1
    dataset = Dataset(
        source=config.source,
        train_shards=tuple(str(path.resolve()) for path in made.train),
        valid_shards=tuple(str(path.resolve()) for path in made.valid),
        tokenizer=str(made.model.resolve()),
        vocab_size=config.vocab_size,
        train_tokens=len(shards.TokenStream(made.train)),
        valid_tokens=len(stream),
        max_valid_tokens=config.max_valid_tokens,
        valid_bytes=bpb.count_bytes(bpb.byte_tables(processor), stream),
        valid_documents=valid_documents,
        tokenizer_sha256=hashlib.sha256(made.model.read_bytes()).hexdigest(),
        valid_sha256=digest.hexdigest(),
        train_sha256=edges_sha256(made.train),
        **made.known,
    )
    log(f"tokens: {dataset.train_tokens:,} for training, {dataset.valid_tokens:,} for validation")
    return dataset


def edges_sha256(paths: Iterable[Path]) -> str:
    """Hash each file's name, size, first and last megabyte: SHA-256, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()


def _with_paths(dataset: Dataset, change: Callable[[str], str]) -> Dataset:
    return dataclasses.replace(
        dataset,
        train_shards=tuple(map(change, dataset.train_shards)),
        valid_shards=tuple(map(change, dataset.valid_shards)),
        tokenizer=change(dataset.tokenizer),
        memory=change(dataset.memory) if dataset.memory else "",
    )
