"""Damaged artifacts: none is read as anything but what a checksum allows, and none takes the machine with it.

    python benchmarks/faults/fuzz.py [--mutations 10000] [--seed 0] [--artifact FILE]

Cuts, flips bits and writes over bytes of an artifact, with its checksum made right again, and lies in its document
about names, kinds and shapes. Each damaged file is read; only ArtifactError may come of it, or a model of the shapes it
declares. Prints counts, the longest read, and the most memory in use.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from hedgemix.artifact import format as artifact
from hedgemix.artifact.format import PREFIX, SECTIONS, ArtifactError
from hedgemix.artifact.tensors import Stepped, Stored
from hedgemix.data.memory import compress

SHAPES = (0, 1, 2, 15, 16, 17, 255, 4096, 2**16, 2**20, 2**24, 2**28, 2**30, 2**31, 2**40, -1, 1.5, None, "1", True)


@dataclass(frozen=True)
class Options:
    mutations: int = 10_000
    seed: int = 0
    artifact: Path | None = None
    """What is damaged (default: a small one with tensors of every kind)."""


@dataclass(frozen=True)
class Outcome:
    counts: dict[str, int]
    """By what came of the damaged files: `read`, or the beginning of the error."""
    longest_seconds: float
    before_bytes: int
    """Most memory that the process used before."""
    peak_bytes: int
    """Most memory that the process ever used."""


def small() -> bytes:
    """An artifact with tensors of every kind."""
    generator = torch.Generator().manual_seed(0)

    def index(n: int) -> torch.Tensor:
        return torch.randint(-40, 9, (n,), generator=generator, dtype=torch.int8)

    def stepped(rows: int, columns: int, spread: float) -> Stepped:
        codes = (spread * torch.randn(rows, columns, generator=generator)).round().int()
        return Stepped(codes, index(rows), index(columns))

    codes = torch.randint(-15, 16, (16, 16), generator=generator, dtype=torch.int8)
    tensors = {
        "a": stepped(24, 16, 3.0),
        "b": stepped(24, 16, 0.3),
        "c": stepped(9, 16, 5000.0),
        "d": Stored(codes, torch.rand(16, generator=generator).half()),
        "e": torch.randn(9, generator=generator).half(),
        "f": torch.randn(2, 3, generator=generator),
    }
    memory = compress(["A document that the experts begin with.", "And another document."])
    return artifact.pack({"model": {"layers": 2}, "seed": 7}, bytes(range(256)), tensors, 1, memory)


def sealed(sections: list[tuple[int, bytes]]) -> bytes:
    """The file of these sections (length, as stored), with a right checksum."""
    lengths = [number for length, part in sections for number in (length, len(part))]
    content = PREFIX[artifact.MEMORY_VERSION].pack(artifact.MAGIC, artifact.MEMORY_VERSION, *lengths)
    content += b"".join(part for _, part in sections)
    return content + hashlib.sha256(content).digest()


def sections_of(content: bytes) -> list[tuple[int, bytes]]:
    prefix = PREFIX[artifact.MEMORY_VERSION]
    _, _, *numbers = prefix.unpack_from(content)
    out, start = [], prefix.size
    for length, stored in zip(numbers[::2], numbers[1::2], strict=True):
        out.append((length, content[start : start + stored]))
        start += stored
    return out


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A damaged copy, nearly always with a right checksum."""
    kind = draw.choice(("anywhere", "raw", "section", "section", "section", "length", "document", "document"))
    if kind == "raw":
        return content[: draw.randrange(len(content))] if draw.random() < 0.5 else scratched(content, draw)
    if kind == "anywhere":
        body = scratched(content[:-32], draw)
        return body + hashlib.sha256(body).digest()
    sections = sections_of(content)
    if kind == "document":
        document = json.loads(lzma.decompress(sections[0][1]))
        lie(document, draw)
        data = json.dumps(document).encode()
        sections[0] = len(data), lzma.compress(data, lzma.FORMAT_ALONE)
        return sealed(sections)
    n = draw.choice([n for n, (_, part) in enumerate(sections) if part])
    length, part = sections[n]
    if kind == "length":
        sections[n] = draw.choice((0, 1, length + 1, max(length - 1, 0), 2 * length, 2**30)), part
    else:
        damaged = draw.choice((scratched, shortened, lengthened))(part, draw)
        sections[n] = (len(damaged) if SECTIONS[n] in ("steps", "weights") else length), damaged
    return sealed(sections)


def scratched(data: bytes, draw: random.Random) -> bytes:
    """Up to eight bits flipped or bytes written over."""
    altered = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        position = draw.randrange(len(altered))
        altered[position] = draw.choice((altered[position] ^ 1 << draw.randrange(8), draw.randrange(256), 0, 255))
    return bytes(altered)


def shortened(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[min(len(data), start + draw.choice((1, 2, 4, 100, len(data)))) :]


def lengthened(data: bytes, draw: random.Random) -> bytes:
    position = draw.randrange(len(data) + 1)
    return data[:position] + draw.randbytes(draw.choice((1, 2, 4, 100))) + data[position:]


def lie(document: dict[str, Any], draw: random.Random) -> None:
    """One or two entries of the table changed, removed, repeated or exchanged."""
    table = document["tensors"]
    for _ in range(draw.choice((1, 1, 2))):
        entry = draw.choice(table)
        kind = draw.choice(("size", "size", "size", "transpose", "kind", "name", "shape", "drop", "repeat", "swap"))
        if kind == "size" and isinstance(entry[2], list) and entry[2]:
            entry[2][draw.randrange(len(entry[2]))] = draw.choice(SHAPES)
        elif kind == "transpose" and isinstance(entry[2], list):
            entry[2].reverse()
        elif kind == "kind":
            entry[1] = draw.choice(("stepped", "quantized", "float16", "float32", "pickle", None, [], 1))
        elif kind == "name":
            entry[0] = draw.choice((table[0][0], "", None, 1, "x" * 1000))
        elif kind == "shape":
            entry[2] = draw.choice(([], [2] * 9, None, 7, "ab", {}, [2**15] * 2))
        elif kind == "drop" and len(table) > 1:
            table.remove(entry)
        elif kind == "repeat":
            table.append([f"{entry[0]}{len(table)}", *entry[1:]])
        else:
            draw.shuffle(table)


def run(content: bytes, mutations: int, seed: int, folder: Path) -> Outcome:
    """Read this many damaged copies; whatever is raised but ArtifactError is let through."""
    draw, counts, longest = random.Random(seed), Counter[str](), 0.0
    path, before = folder / "damaged", peak()
    for _ in range(mutations):
        path.write_bytes(mutated(content, draw))
        began = time.monotonic()
        try:
            found = artifact.read(path)
            assert all(tensor.isfinite().all() for tensor in found.tensors.values())
            counts["read"] += 1
        except ArtifactError as error:
            said = re.split(r"[:;(]", str(error).removeprefix(str(path)).strip(": "))[0]
            counts[re.sub(r"\d[\d,]*|'.*'|b'.*|declares .*|kind .*|shape .*", "…", said)[:70]] += 1
        longest = max(longest, time.monotonic() - began)
    return Outcome(dict(counts.most_common()), longest, before, peak())


def peak() -> int:
    """Bytes of memory that the process used at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(options: Options) -> None:
    content = options.artifact.read_bytes() if options.artifact else small()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(content, options.mutations, options.seed, Path(folder))
    for name, count in outcome.counts.items():
        print(f"{count:8,}  {name}")
    before, most = (f"{size / 2**20:,.0f} MiB" for size in (outcome.before_bytes, outcome.peak_bytes))
    print(f"{options.mutations:,} mutations of {len(content):,} bytes: the longest read took", end=" ")
    print(f"{outcome.longest_seconds:.2f} s; memory {before} before, {most} at most")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
