"""Documents of files and folders: which files those are, and what each holds.

Nothing that was named is left out without being counted in `Reading.passed_over`, and what is wrong is told of up to
ten files, lines or rows together.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hedgemix.config import RecipeError
from hedgemix.data.archive import ZstdFile
from hedgemix.data.reading import Problems, Reading, encodable

WHOLE_BYTES = 64 * 1024  # text files up to this size are one document
PART_BYTES = 16 * 1024  # longer ones are split at the first blank line after this many bytes
TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
KINDS = f"{', '.join(SUFFIXES)} (all but parquet also .zst or .gz)"
BLANK_LINE = re.compile(rb"\n\s*\n")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
JOINER = "\u200d"
LARGEST_CHARACTER = 4  # bytes


def documents(paths: Sequence[str | Path], text_field: str = "text", reading: Reading | None = None) -> Iterator[str]:
    """Read documents of files and folders (recursed, sorted): a text file, a line of .jsonl, a row of .parquet.

    Text files above 64 KB become documents of about 16 KB, cut at blank lines; joined, they are the file again. Files
    are streamed. Empty documents are left out. Raises RecipeError naming the files and the places of what is wrong, up
    to ten; that they are there and can be opened is looked at before any is read.
    """
    reading, problems = reading or Reading(), Problems()
    files = find(paths, reading, problems)
    for path in files:
        _look_at(path, text_field, problems)
    problems.tell()
    for path in files:
        reading.files += 1
        found = _parquet if kind_of(path) == ".parquet" else _json_lines if kind_of(path) == ".jsonl" else _parts
        try:
            for document in found(path, text_field, reading, problems):
                if not document.strip():
                    reading.passed_over["empty documents"] += 1
                elif not problems.found:  # what follows a problem is only read for more of them
                    yield document
        except (OSError, EOFError, zlib.error) as error:
            problems.add(_unreadable(path, error))
        except RecipeError as error:
            problems.add(error)
    problems.tell()


def find(paths: Sequence[str | Path], reading: Reading, problems: Problems) -> list[Path]:
    """Find the files to read, each folder's sorted; hidden ones and those of other kinds are passed over. Links are
    followed, a folder that was seen already is not."""
    if not paths:
        raise RecipeError("data.paths is empty; name a file or a folder of text")
    files: list[Path] = []
    for path in paths:
        if not str(path):
            problems.add(
                "data.paths has an empty name, as of a shell variable that is not set; name a file or a folder"
            )
        elif Path(path).is_dir():
            inside = sorted(_walk(Path(path), reading, problems))
            if not inside:
                problems.add(f"data.paths: folder {path} holds no file that can be read: {KINDS}")
            files += inside
        elif not Path(path).exists():
            problems.add(f"data.paths: {path} does not exist; name a file or folder that does")
        elif not Path(path).is_file() or not kind_of(Path(path)):
            problems.add(f"data.paths: {path} cannot be read; it must be a file whose name ends in {KINDS}")
        else:
            files.append(Path(path))
    return files


def kind_of(path: Path) -> str:
    """Give the suffix that says how to read the file, '' when it cannot be read."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix != ".parquet" and suffix in SUFFIXES else ""
    return suffix if suffix in SUFFIXES else ""


def _walk(root: Path, reading: Reading, problems: Problems) -> Iterator[Path]:
    seen = set()

    def unreadable(error: OSError) -> None:
        problems.add(
            f"data.paths: folder {error.filename} cannot be read ({error.strerror}); permit it or leave it out"
        )

    for folder, inner, names in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back, or two to one place
            inner.clear()
            reading.passed_over["links to a folder that is read already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [name for name in inner if name.startswith(".")]
        reading.passed_over["hidden folders"] += len(hidden)
        inner[:] = sorted(set(inner) - set(hidden))
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                reading.passed_over["hidden files"] += 1
            elif not path.exists():
                reading.passed_over["links that lead nowhere"] += 1
            elif not kind_of(path) or not path.is_file():
                reading.passed_over["files of other kinds"] += 1
            else:
                yield path


def _look_at(path: Path, text_field: str, problems: Problems) -> None:
    """Note what can be known to be wrong with a file before it is read."""
    try:
        with open(path, "rb") as file:
            begin = file.read(2)
            if not begin and path.suffix.lower() in COMPRESSIONS:
                problems.add(_unreadable(path, EOFError("it is empty, not even an archive of nothing")))
            if kind_of(path) != ".parquet" and begin in UTF_16:
                problems.add(f"data.paths: {path} is UTF-16; convert it (iconv -f UTF-16 -t UTF-8) or leave it out")
        if kind_of(path) == ".parquet":
            with _opened_parquet(path, text_field):
                pass
    except OSError as error:
        problems.add(_unreadable(path, error))
    except RecipeError as error:
        problems.add(error)


def _unreadable(path: Path, error: Exception) -> str:
    check = {".gz": "check it (gzip -t) and replace it", ".zst": "check it (zstd -t) and replace it"}
    fix = check.get(path.suffix.lower(), "permit it, replace it or leave it out")
    return f"data.paths: {path} cannot be read ({getattr(error, 'strerror', None) or error}); {fix}"


@contextmanager
def _opened(path: Path, reading: Reading) -> Iterator[IO[bytes]]:
    """The file's content, unpacked, behind its byte order mark."""
    with open(path, "rb") as packed:
        compression = COMPRESSIONS.get(path.suffix.lower())
        content: Any = packed
        if compression:
            content = io.BufferedReader(gzip.GzipFile(fileobj=packed) if compression == "gzip" else ZstdFile(packed))
        if content.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):
            content.read(len(BYTE_ORDER_MARK))
            reading.passed_over["byte order marks"] += 1
        yield content


def _parts(path: Path, text_field: str, reading: Reading, problems: Problems) -> Iterator[str]:
    buffer, offset, ended = b"", 0, False
    with _opened(path, reading) as content:
        while True:
            while len(buffer) < WHOLE_BYTES + LARGEST_CHARACTER and not ended:
                block = content.read(WHOLE_BYTES)
                ended = not block
                buffer += block
            if not buffer:
                return
            cut = _cut(buffer, ended, whole=offset == 0)
            yield _decoded(buffer[:cut], path, offset)
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
    cut = next(
        (cut for cut in range(WHOLE_BYTES, WHOLE_BYTES - LARGEST_CHARACTER, -1) if buffer[cut] & 0xC0 != 0x80),
        WHOLE_BYTES,
    )
    following = buffer[cut : cut + LARGEST_CHARACTER].decode(errors="ignore")[:1]
    return cut - len(_behind_cut(buffer[PART_BYTES:cut].decode(errors="ignore"), following).encode())


def _behind_cut(text: str, following: str) -> str:
    """What of a text without line breaks, which `following` goes on from, lies behind its last white space; where it
    has none, behind the last place that is not inside a character with its marks."""
    words = re.split(r"(?<=\s)(?!\s)", text)
    if len(words) > 1:
        return words[-1]
    at = len(text)
    while at > 1 and following and (_is_joined(following) or text[at - 1] == JOINER):
        at -= 1
        following = text[at]
    return text[at:] if at > 1 else ""


def _is_joined(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or character == JOINER or "\U0001f3fb" <= character <= "\U0001f3ff"


def _decoded(block: bytes, path: Path, offset: int) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"data.paths: {path} is not UTF-8 at byte {offset + error.start}; convert it (iconv) or leave it out"
        ) from None


def _json_lines(path: Path, text_field: str, reading: Reading, problems: Problems) -> Iterator[str]:
    offset = 0
    with _opened(path, reading) as content:
        for number, line in enumerate(content, 1):
            text = _decoded(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                problems.add(f"data.paths: {path}:{number} is not JSON ({error}); mend or drop the line")
                continue
            document = values.get(text_field, 0) if isinstance(values, dict) else 0
            if document is None:
                reading.passed_over["rows whose text is null"] += 1
            elif not isinstance(document, str):
                problems.add(f"data.paths: {path}:{number} has no text in {text_field!r}; set data.text_field")
            elif not encodable(document):
                problems.add(f"data.paths: {path}:{number} holds a lone surrogate, which is no text; drop the line")
            else:
                yield document


def _parquet(path: Path, text_field: str, reading: Reading, problems: Problems) -> Iterator[str]:
    import pyarrow as pa  # docs and shards do without

    number = 0
    with _opened_parquet(path, text_field) as file:
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()).to_pylist():
                number += 1
                if value is None:
                    reading.passed_over["rows whose text is null"] += 1
                    continue
                try:
                    yield value.decode()
                except UnicodeDecodeError:
                    problems.add(f"data.paths: {path}: row {number} of {text_field!r} is not UTF-8; mend or drop it")


@contextmanager
def _opened_parquet(path: Path, text_field: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as content, pq.ParquetFile(content) as file:
            schema = file.schema_arrow
            if schema.names.count(text_field) != 1:
                has = "has no" if text_field not in schema.names else "has more than one"
                raise RecipeError(
                    f"data.paths: {path} {has} column {text_field!r}, but {', '.join(schema.names)}; "
                    "set data.text_field to one of them"
                )
            kind = schema.field(text_field).type
            if not _is_text(kind):
                raise RecipeError(
                    f"data.paths: column {text_field!r} of {path} is {kind}, not string; set data.text_field"
                )
            yield file
    except pa.ArrowException as error:
        raise RecipeError(f"data.paths: {path} cannot be read as parquet ({error}); replace the file") from None


def _is_text(kind: Any) -> bool:
    import pyarrow.types as of

    if of.is_dictionary(kind):
        return _is_text(kind.value_type)
    kinds = of.is_string, of.is_large_string, of.is_string_view, of.is_binary, of.is_large_binary, of.is_binary_view
    return of.is_null(kind) or any(is_kind(kind) for is_kind in kinds)
