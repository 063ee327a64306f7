"""Held-out text coded with an artifact, and with general compressors.

    python benchmarks/quality/text_codec.py runs/RECORD.parquet [--seed 1337] [--text-bytes 60000]

Takes the record's first validation documents, codes and decodes them with `hedgemix compress` and `decompress` in
processes of their own, checks that the bytes come back, and sets the size against the bits that the evaluation of the
same text reports, and against xz, zstd and brotli at their strongest. Prints a markdown table.
"""

from __future__ import annotations

import json
import lzma
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import brotli
import numpy as np
import pandas as pd
import torch
import tyro
import zstandard

from hedgemix.artifact import format as artifact
from hedgemix.codec import text_codec
from hedgemix.config import Recipe, from_dict, to_dict
from hedgemix.data import dataset, tokenizer
from hedgemix.data.shards import TokenStream
from hedgemix.evaluate.evaluator import evaluate_artifact
from hedgemix.experts import ngram_index


@dataclass(frozen=True)
class Options:
    table: tyro.conf.Positional[Path]
    """A record's parquet file."""
    seed: int | None = None
    """Whose artifact (default: the first finished row's)."""
    text_bytes: int = 60_000
    """At least this much text, in whole documents."""


def main(options: Options) -> None:
    rows = pd.read_parquet(options.table)
    rows = rows[(rows.status == "done") & (rows.seed == (rows.seed if options.seed is None else options.seed))]
    if not len(rows):
        sys.exit(f"error: {options.table} has no finished row of that seed")
    row = rows.iloc[0]
    recipe = from_dict(Recipe, json.loads(row.config))
    text = held_out(Path(row.dataset_path), options.text_bytes)
    model = Path(row.artifact_path)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text").write_bytes(text)
        (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
        coding = command(folder, "compress", model, "text", "coded", "--recipe", "recipe.json")
        decoding = command(folder, "decompress", model, "coded", "back")
        if (folder / "back").read_bytes() != text:
            sys.exit("error: another text came back")
        size = (folder / "coded").stat().st_size
        payload = 8 * size - 8 * text_codec.header_bytes((folder / "coded").read_bytes())
        bits = reported(model, text, recipe, folder / "counts")
    distance = abs(payload - bits)
    print(f"seed {row.seed}: {len(text):,} bytes came back byte for byte from {size:,} bytes")
    print(f"coded {payload:,} bits; reported {bits:,.1f}; {distance:,.1f} apart, {distance / bits:.4%}")
    print(f"allowed: 0.1 % + 64 bits = {0.001 * bits + 64:,.1f}\n")
    lines = [("hedgemix", size, coding, decoding)] + [general(name, text) for name in COMPRESSORS]
    print("| coder | bytes | bits per byte | with the artifact, bytes | coding s | decoding s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, length, coded, decoded in lines:
        whole = length + (int(row.artifact_bytes) if name == "hedgemix" else 0)
        print(f"| {name} | {length:,} | {8 * length / len(text):.4f} | {whole:,} | {coded:.2f} | {decoded:.2f} |")


COMPRESSORS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "xz -9": (lambda text: lzma.compress(text, preset=9), lzma.decompress),
    "zstd --ultra -22": (zstandard.ZstdCompressor(level=22).compress, zstandard.ZstdDecompressor().decompress),
    "brotli -q 11": (lambda text: brotli.compress(text, quality=11), brotli.decompress),
}


def general(name: str, text: bytes) -> tuple[str, int, float, float]:
    compress, decompress = COMPRESSORS[name]
    began = time.perf_counter()
    coded = compress(text)
    between = time.perf_counter()
    if decompress(coded) != text:
        sys.exit(f"error: {name} gave another text back")
    return name, len(coded), between - began, time.perf_counter() - between


def command(folder: Path, *arguments: object) -> float:
    """Seconds of one `hedgemix` command, its start included."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hedgemix.cli", *map(str, arguments)], cwd=folder, check=True)
    return time.perf_counter() - began


def held_out(folder: Path, at_least: int) -> bytes:
    """The first validation documents, whole ones."""
    found = dataset.load(folder)
    stream, processor = dataset.valid_stream(found), tokenizer.load(found.tokenizer)
    tokens = stream.read(0, len(stream))
    ends = [*np.flatnonzero(tokens == processor.bos_id())[1:], len(tokens)]
    text = b""
    for start, stop in zip([0, *ends], ends, strict=False):
        text += tokenizer.decode(processor, tokens[start:stop].tolist())
        if len(text) >= at_least:
            break
    return text


def reported(model: Path, text: bytes, recipe: Recipe, counts: Path) -> float:
    """Bits of the text by the evaluation that makes a record's score."""
    found = artifact.read(model)
    processor, mixer = tokenizer.load(found.tokenizer), recipe.evaluate.mixer
    tokens = np.array(tokenizer.encode_exact(processor, text.decode()), dtype=np.uint16)
    ngram_index.build(tokens, mixer.orders, processor.vocab_size(), mixer.match_lengths, counts)
    result = evaluate_artifact(model, TokenStream([tokens]), counts, recipe.evaluate, torch.device("cpu"))
    return result.nats_per_token * result.scored_tokens / math.log(2)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
