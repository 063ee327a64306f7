"""Documents: the text a model is trained and scored on, read from a `DataConfig`.

Notable: every choice is made by the hash of a document's content, so the corpus does not depend on the order of files,
equal documents are never on both sides of the split, and a growing corpus keeps its old validation documents. The side
goes by the text without case and white space, so that a document set otherwise is no training text for itself. Sorted
by hash, documents come in groups by its leading bits: no more than one group is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from hedgemix.config import DataConfig, RecipeError
from hedgemix.data.reading import Reading
from hedgemix.data.spool import Spool

GROUPS = 128
"""10 GB are 80 MB each; as many files are open."""
GROUP_HELD_BYTES = 1 << 20
DIGEST_BYTES = 32
EQUAL = "documents equal to another"


def collect(config: DataConfig, reading: Reading | None = None, folder: str | Path | None = None) -> Iterator[str]:
    """Collect all documents of a docs or text source, without duplicates, in an order that only their contents decide.

    With `max_text_bytes`, docs keeps an even sample over the packages and text keeps what comes first in the files.
    `reading` counts; `folder` is where text waits that is too much for memory. Raises RecipeError when a source cannot
    be read or holds no text.
    """
    limit, reading = config.max_text_bytes, reading or Reading()
    if config.source == "docs":
        from hedgemix.data import docstrings  # a train_gpt.py has the reader of its own source alone

        documents = up_to(by_hash(docstrings.of_packages(config.packages, reading), reading, folder), limit, reading)
    elif config.source == "text":
        from hedgemix.data import text_files

        found = text_files.documents(config.paths, config.text_field, reading)
        documents = by_hash(up_to(distinct(found, reading), limit, reading) if limit else found, reading, folder)
    else:
        raise RecipeError(f"data.source is {config.source!r}, which holds tokens, not text; use 'docs' or 'text'")
    for document in documents:
        reading.documents += 1
        reading.n_bytes += len(document.encode())
        yield document
    if not reading.documents:
        name = "data.packages" if config.source == "docs" else "data.paths"
        fix = f", or raise data.max_text_bytes ({limit})" if limit else ""
        raise RecipeError(f"{name} gave no text; name more of them{fix}; {reading}")


def by_hash(documents: Iterable[str], reading: Reading, folder: str | Path | None = None) -> Iterator[str]:
    """Sort documents by the bytes of their SHA-256, the last first, and leave out those equal to another."""
    # Back to front: the front decides the side where the text is normalized as it is, and a corpus cut short in that
    # order would be validation first.
    groups = [Spool(folder, GROUP_HELD_BYTES) for _ in range(GROUPS)]
    for document in documents:
        content = document.encode()
        digest = hashlib.sha256(content).digest()[::-1]
        groups[digest[0] * GROUPS >> 8].add(digest + content)
    for place, group in enumerate(groups):
        held = {document[:DIGEST_BYTES]: document[DIGEST_BYTES:] for document in group.read()}
        reading.passed_over[EQUAL] += len(group) - len(held)
        groups[place] = Spool(folder)  # lets go of the file
        for digest in sorted(held):
            yield held[digest].decode()


def distinct(documents: Iterable[str], reading: Reading | None = None) -> Iterator[str]:
    """Leave out documents equal to an earlier one; what is held of each is its hash."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document
        elif reading:
            reading.passed_over[EQUAL] += 1


def up_to(documents: Iterable[str], limit: int, reading: Reading) -> Iterator[str]:
    """Give the first documents that have at most `limit` bytes together (0: all)."""
    total = 0
    for document in documents:
        total += len(document.encode())
        if limit and total > limit:
            reading.passed_over[f"rest of the text beyond data.max_text_bytes {limit:,}"] += 1
            return
        yield document


def split(documents: Iterable[str], valid_fraction: float, folder: str | Path | None = None) -> tuple[Spool, Spool]:
    """Split distinct documents into (training, validation), in the given order.

    A document is validation when the SHA-256 of its `normalized` text, as a fraction of 2**256, is below
    `valid_fraction`. `folder` is where text waits that is too much for memory.
    Raises RecipeError when the fraction is not inside (0, 1) or a side stays empty.
    """
    if not 0 < valid_fraction < 1:
        raise RecipeError(f"data.valid_fraction is {valid_fraction}; it must be above 0 and below 1, such as 0.02")
    sides = Spool(folder), Spool(folder)
    for document in documents:
        digest = hashlib.sha256(normalized(document).encode()).digest()
        sides[int.from_bytes(digest) < valid_fraction * 2.0**256].add(document.encode())
    for name, side in zip(("training", "validation"), sides, strict=True):
        if not len(side):
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
