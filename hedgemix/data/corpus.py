"""Documents: the text a model is trained and scored on, read from a `DataConfig`.

Notable: every choice is made by the hash of a document's content, so the corpus does not depend on the order of files,
equal documents are never on both sides of the split, and a growing corpus keeps its old validation documents. The side
goes by the text without case and white space, so that a document set otherwise is no training text for itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from hedgemix.config import DataConfig, RecipeError
from hedgemix.data import docstrings

WHOLE_BYTES = 64 * 1024  # text files up to this size are one document
PART_BYTES = 16 * 1024  # longer ones are split at the first blank line after this many bytes
TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
BLANK_LINE = re.compile(rb"\n\s*\n")


def collect(config: DataConfig) -> list[str]:
    """Collect all documents of a docs or text source, without duplicates, in an order that only their contents decide.

    With `max_text_bytes`, docs keeps an even sample over the packages and text keeps what comes first in the files.
    Raises RecipeError when a source cannot be read or holds no text.
    """
    limit = config.max_text_bytes
    if config.source == "docs":
        documents = list(_up_to(_sorted(_distinct(docstrings.of_packages(config.packages))), limit))
    elif config.source == "text":
        documents = _sorted(_up_to(_distinct(text_documents(config.paths, config.text_field)), limit))
    else:
        raise RecipeError(f"data.source is {config.source!r}, which holds tokens, not text; use 'docs' or 'text'")
    if not documents:
        field = "data.packages" if config.source == "docs" else "data.paths"
        fix = f", or raise data.max_text_bytes ({limit})" if limit else ""
        raise RecipeError(f"{field} gave no text; name more of them{fix}")
    return documents


def split(documents: Iterable[str], valid_fraction: float) -> tuple[list[str], list[str]]:
    """Split documents into (training, validation), without duplicates and in the given order.

    A document is validation when the SHA-256 of its `normalized` text, as a fraction of 2**256, is below
    `valid_fraction`.
    Raises RecipeError when the fraction is not inside (0, 1) or a side stays empty.
    """
    if not 0 < valid_fraction < 1:
        raise RecipeError(f"data.valid_fraction is {valid_fraction}; it must be above 0 and below 1, such as 0.02")
    sides: tuple[list[str], list[str]] = ([], [])
    for document in _distinct(documents):
        sides[int.from_bytes(_digest(normalized(document))) < valid_fraction * 2.0**256].append(document)
    for name, side in zip(("training", "validation"), sides, strict=True):
        if not side:
            raise RecipeError(
                f"data.valid_fraction {valid_fraction} of {sum(map(len, sides))} documents leaves none for {name}; "
                "change it, or read more text"
            )
    return sides


def normalized(text: str) -> str:
    """Give the text in lower case with one space between words: texts that only differ in that are one text."""
    return " ".join(text.lower().split())


def batches(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Group documents, in order, so that each group but the last has at least so many characters."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def text_documents(paths: Sequence[str | Path], text_field: str = "text") -> Iterator[str]:
    """Read documents of files and folders (recursed, sorted): a text file, a line of .jsonl, a row of .parquet.

    Text files above 64 KB become documents of about 16 KB, cut at blank lines; joined, they are the file again. Files
    are streamed. Empty documents are left out. Raises RecipeError naming the file and the place of what is wrong.
    """
    if not paths:
        raise RecipeError("data.paths is empty; name a file or a folder of text")
    for path in _files(paths):
        if _kind(path) == ".parquet":
            documents = _parquet_documents(path, text_field)
        else:
            documents = _stream_documents(path, text_field)
        yield from (document for document in documents if document.strip())


def _digest(document: str) -> bytes:
    return hashlib.sha256(document.encode()).digest()


def _distinct(documents: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for document in documents:
        digest = _digest(document)
        if digest not in seen:
            seen.add(digest)
            yield document


def _sorted(documents: Iterable[str]) -> list[str]:
    # Back to front: the front decides the side where the text is normalized as it is, and a corpus cut short in that
    # order would be validation first.
    return sorted(documents, key=lambda document: _digest(document)[::-1])


def _up_to(documents: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for document in documents:
        total += len(document.encode())
        if limit and total > limit:
            return
        yield document


def _kind(path: Path) -> str:
    """The suffix that says how to read the file, '' when it cannot be read."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix != ".parquet" and suffix in SUFFIXES else ""
    return suffix if suffix in SUFFIXES else ""


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    kinds = f"{', '.join(SUFFIXES)} (all but parquet also .zst or .gz)"
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if _kind(file) and file.is_file())
            if not files:
                raise RecipeError(f"data.paths: folder {path} holds no file that can be read: {kinds}")
            yield from files
        elif not path.exists():
            raise RecipeError(f"data.paths: {path} does not exist; name a file or folder that does")
        elif not _kind(path):
            raise RecipeError(f"data.paths: {path} cannot be read; its name must end in {kinds}")
        else:
            yield path


def _stream_documents(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa  # docs and shards do without

    try:
        # pyarrow's decompression says when a file ends too early; gzip's and zstandard's readers differ in that.
        with pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix.lower())) as stream:
            if _kind(path) == ".jsonl":
                yield from _json_documents(stream, path, text_field)
            else:
                yield from _parts(stream, path)
    except OSError as error:
        raise RecipeError(f"data.paths: {path} cannot be read ({error}); replace the file") from None


def _parts(stream: IO[bytes], path: Path) -> Iterator[str]:
    buffer, offset, ended = b"", 0, False
    while True:
        while len(buffer) <= WHOLE_BYTES and not ended:
            block = stream.read(WHOLE_BYTES)
            ended = not block
            buffer += block
        if not buffer:
            return
        cut = _cut(buffer, ended, whole=offset == 0)
        yield _decode(buffer[:cut], path, offset)
        buffer, offset = buffer[cut:], offset + cut


def _cut(buffer: bytes, ended: bool, whole: bool) -> int:
    if ended and len(buffer) <= (WHOLE_BYTES if whole else PART_BYTES):
        return len(buffer)
    blank = BLANK_LINE.search(buffer, PART_BYTES)
    if blank and blank.end() <= WHOLE_BYTES:
        return blank.end()
    if len(buffer) <= WHOLE_BYTES:
        return len(buffer)
    newline = buffer.rfind(b"\n", PART_BYTES, WHOLE_BYTES)
    if newline >= 0:
        return newline + 1
    # Between two characters: at most three bytes back from a byte that continues one.
    return next((cut for cut in range(WHOLE_BYTES, WHOLE_BYTES - 4, -1) if buffer[cut] & 0xC0 != 0x80), WHOLE_BYTES)


def _decode(block: bytes, path: Path, offset: int) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"data.paths: {path} is not UTF-8 at byte {offset + error.start}; convert it (iconv) or leave it out"
        ) from None


def _json_documents(stream: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(io.BufferedReader(stream), 1):  # type: ignore[type-var, arg-type]
        text = _decode(line, path, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"data.paths: {path}:{number} is not JSON ({error}); mend or drop the line") from None
        document = values.get(text_field) if isinstance(values, dict) else None
        if not isinstance(document, str):
            raise RecipeError(f"data.paths: {path}:{number} has no text in {text_field!r}; set data.text_field")
        if not docstrings.encodable(document):
            raise RecipeError(f"data.paths: {path}:{number} holds a lone surrogate, which is no text; drop the line")
        yield document


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise RecipeError(
                    f"data.paths: {path} has no column {text_field!r}, but {', '.join(schema.names)}; "
                    "set data.text_field to one of them"
                )
            kind = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise RecipeError(
                    f"data.paths: column {text_field!r} of {path} is {kind}, not string; set data.text_field"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                yield from (value for value in batch.column(0).to_pylist() if value is not None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.paths: {path} cannot be read as parquet ({error}); replace the file") from None
