"""A record's validation text by general compressors, alone and after the training text.

    python -m benchmarks.quality.compressors FOLDER_OR_TABLE [--compressors "xz -9e" ...] [--update-docs]

Takes the folder of a dataset.json, or a record's parquet file, and prints a markdown table. Alone: bits per byte of the
scored validation text. Primed: what the archive grows by when the training text stands before it, per byte of
validation text; shipping that knowledge takes the archive of the training text, whose bytes stand beside it. Needs the
packages of `make test`; zpaq is left out where there is none, and the table says so. Seconds are CPU seconds of all
three archives.
"""

from __future__ import annotations

import lzma
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
import zstandard

from benchmarks.suite.report import update
from hedgemix.data import dataset, tokenizer
from hedgemix.data.shards import TokenStream

Compress = Callable[[bytes], int]
"""Bytes of a text's archive."""
DOCUMENT = Path(__file__).parents[2] / "docs" / "compressors.md"
END = b"\0"
"""Stands between documents, in place of the token that begins one."""
MEMORY_BYTES = 1 << 28  # holds the text and its model of any default recipe


@dataclass(frozen=True)
class Row:
    name: str
    alone_bytes: int
    primed_bytes: int
    """What the validation text adds to the archive of the training text."""
    train_archive_bytes: int
    seconds: float


@dataclass(frozen=True)
class Options:
    data: tyro.conf.Positional[Path]
    """The folder of a dataset.json, or a record's parquet file."""
    compressors: tuple[str, ...] = ()
    """Which, by the names in the table (default: all that are here)."""
    update_docs: bool = False
    """Write the table into docs/compressors.md too."""


def main(options: Options) -> None:
    found = dataset.load(folder_of(options.data))
    there = {name: compress for name, compress in COMPRESSORS.items() if name != ZPAQ or shutil.which("zpaq")}
    chosen = options.compressors or tuple(there)
    for name in chosen:
        if name not in there:
            sys.exit(f"error: there is no compressor {name!r} here; choose from {', '.join(there)}")
    train, valid = text_of(dataset.train_stream(found), found), text_of(dataset.valid_stream(found), found)
    rows = []
    for name in chosen:
        rows.append(measure(name, there[name], train, valid))
        print(f"{name}: {rows[-1].seconds:.1f} s", file=sys.stderr)
    text = f"{heading(found, train, valid)}\n\n{table(rows, len(valid))}"
    if ZPAQ not in there:
        text += f"\n\n{ZPAQ} is not installed on this machine, and left out."
    print(text)
    if options.update_docs:
        update(DOCUMENT, "compressors", text)


def folder_of(path: Path) -> Path:
    """The dataset's folder: the path, or what a record's table names."""
    return (
        path if path.is_dir() else Path(pd.read_parquet(path, columns=["dataset_path"]).dataset_path.dropna().iloc[0])
    )


def text_of(stream: TokenStream, found: dataset.Dataset) -> bytes:
    """The bytes the tokens stand for, with a zero byte before each document but the first."""
    processor = tokenizer.load(found.tokenizer)
    tokens = stream.read(0, len(stream))
    begins = [0, *(np.flatnonzero(tokens[1:] == processor.bos_id()) + 1), len(tokens)]
    return END.join(tokenizer.decode(processor, tokens[start:stop].tolist()) for start, stop in pairwise(begins))


def measure(name: str, compress: Compress, train: bytes, valid: bytes) -> Row:
    """Make the three archives: of each text, and of validation behind training text."""
    began = cpu_seconds()
    alone, before, both = compress(valid), compress(train), compress(train + END + valid)
    return Row(name, alone, both - before, before, cpu_seconds() - began)


def table(rows: Sequence[Row], valid_bytes: int) -> str:
    """Markdown, best primed last."""
    lines = [
        "| compressor | alone, bits per byte | primed, bits per byte | archive of the training text, bytes | CPU s |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row.primed_bytes):
        alone, primed = (8 * size / valid_bytes for size in (row.alone_bytes, row.primed_bytes))
        lines.append(f"| {row.name} | {alone:.4f} | {primed:.4f} | {row.train_archive_bytes:,} | {row.seconds:.1f} |")
    return "\n".join(lines)


def heading(found: dataset.Dataset, train: bytes, valid: bytes) -> str:
    share = found.valid_overlap_share
    seen = (
        "it is not known how much of the validation text the training text holds"
        if share is None
        else f"{share:.2%} of its windows of {found.overlap_window} are in the training text"
    )
    return (
        f"{len(valid):,} bytes of validation text ({found.source}, sha256 of its tokens {found.valid_sha256[:12]}) "
        f"after {len(train):,} of training text; {seen}. A zero byte parts documents, and is counted on both sides."
    )


def xz(text: bytes) -> int:
    window = max(1 << 16, 1 << (len(text) - 1).bit_length())  # from 64 MB on the preset's own would forget the start
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(window, 3 << 29)}]
    return len(lzma.compress(text, filters=filters))


def zstd(level: int) -> Compress:
    def compress(text: bytes) -> int:
        window = min(max((len(text) - 1).bit_length(), 10), zstandard.WINDOWLOG_MAX)
        settings = zstandard.ZstdCompressionParameters.from_level(level, window_log=window, enable_ldm=True)
        return len(zstandard.ZstdCompressor(compression_params=settings).compress(text))

    return compress


def brotli(text: bytes) -> int:
    import brotli as library  # what is not everywhere is imported where it is used

    return len(library.compress(text, quality=11, lgwin=24))


def ppmd(order: int) -> Compress:
    def compress(text: bytes) -> int:
        import pyppmd

        encoder = pyppmd.Ppmd7Encoder(max_order=order, mem_size=MEMORY_BYTES)
        return len(encoder.encode(text) + encoder.flush())

    return compress


def zpaq(text: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text").write_bytes(text)
        command = ["zpaq", "add", "archive.zpaq", "text", "-m5", "-t1"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return os.path.getsize(Path(folder, "archive.zpaq"))


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


ZPAQ = "zpaq -m5"
COMPRESSORS: dict[str, Compress] = {
    "xz -9e": xz,
    "zstd -19 --long": zstd(19),
    "zstd --ultra -22 --long": zstd(22),
    "brotli -q 11": brotli,
    "PPMd -o 6": ppmd(6),
    "PPMd -o 10": ppmd(10),
    "PPMd -o 16": ppmd(16),
    ZPAQ: zpaq,
}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
