"""The one file that is shipped: header, tokenizer and tensors. Versioned, checksummed, nothing in it is executable.

All integers and floats are little-endian.

    offset  bytes  content
    0       8      magic 89 48 4D 58 0D 0A 1A 0A (as PNG's: text-mode copying breaks it visibly)
    8       4      u32 format version: 2, or 3 with a memory
    12      112    for each section below: u64 length, u64 length as stored; 128 bytes with a memory
    124     ...    the sections as stored, one after the other
    end-32  32     SHA-256 of everything before

    section    coder   content
    document   lzma    JSON {"header": {...}, "tensors": [[name, kind, shape], ...]}, ASCII, keys and names sorted
    tokenizer  lzma    the SentencePiece .model
    steps      vectors  step indices of the "stepped" tensors: of each the rows', then the columns'
    weights    matrices their integer codes, coded with the steps known
    codes      zstd    int8 codes of the "quantized" tensors, row-major
    halves     zstd    float16: the scales of the "quantized" tensors, one for each row, then the "float16" tensors; all
                       low bytes, then all high bytes
    singles    zstd    the "float32" tensors
    memory     ppmd    version 3 alone: documents for the experts to begin with, see `data.memory`

Within a section tensors follow the document's order, so offsets are sums of sizes and cannot overlap. lzma is
FORMAT_ALONE; `vectors` and `matrices` are specified in their modules, and decode with integers only. A step is
2^(index / 8); a stepped weight is (code * row step) * column step in float32. A zstd section is the shorter of the
requested level and of plain Huffman coding: on 8 MB of int5 codes Huffman was as short (1 % either way) in 0.03 s
instead of 9: there is nothing to match in rounded noise. An empty section is stored as nothing, but for the first two.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hedgemix.artifact.sections import (
    LARGEST_SECTION,
    ArtifactError,
    check_length,
    from_lzma,
    from_ppmd,
    from_zstd,
    to_lzma,
    to_zstd,
)
from hedgemix.artifact.tensors import LARGEST_INDEX, Stepped, Stored, dequantize, stepped_weights
from hedgemix.data.memory import Memory
from hedgemix.entropy import gaussian_tables, matrices, vectors
from hedgemix.entropy.rans import CoderError
from hedgemix.runtime.files import replacing

MAGIC = b"\x89HMX\r\n\x1a\n"
VERSION, MEMORY_VERSION = 2, 3
FREE_STEPS, FREE_NUMBERS, NUMBERS_A_BYTE = 2**17, 2**20, 64
"""Most steps, and most weights, that a file may have: so many, and some for each byte of their section. No real model
comes near (that would be 1/8 bit a weight; a table that was never trained is free), and a file with a wrong table
cannot ask for all memory."""
MOST_TENSORS = 4096
PREFIX = {VERSION: struct.Struct("<8sI14Q"), MEMORY_VERSION: struct.Struct("<8sI16Q")}
KINDS = {"stepped": 0, "quantized": 1, "float16": 2, "float32": 4}
"""How a tensor is stored, and the bytes of one element in the sections whose sizes follow from shapes."""


Table = list[tuple[str, str, tuple[int, ...]]]


@dataclass(frozen=True)
class Artifact:
    """Holds a sound artifact, its weights dequantized."""

    header: dict[str, Any]
    tokenizer: bytes
    tensors: dict[str, Tensor]
    """Float32 on the CPU, by name in sorted order."""
    sha256: str
    """Of the whole file, as sha256sum prints it."""
    n_bytes: int
    memory: tuple[str, ...] = ()
    """Training documents."""


@dataclass(frozen=True)
class Parts:
    """Holds a sound artifact as it is stored, before weights are made of it."""

    header: dict[str, Any]
    tokenizer: bytes
    table: Table
    """Name, kind and shape of each tensor."""
    stepped: list[Stepped]
    """Those of this kind, in the table's order."""
    codes: bytes
    halves: bytes
    singles: bytes
    memory: tuple[str, ...]
    lengths: dict[str, tuple[int, int]]
    """Of each section: bytes, and bytes as stored."""
    sha256: str
    n_bytes: int


SECTIONS = ("document", "tokenizer", "steps", "weights", "codes", "halves", "singles", "memory")
Tensors = Mapping[str, "Stepped | Stored | Tensor"]


def write(
    path: str | Path,
    header: dict[str, Any],
    tokenizer: bytes,
    tensors: Tensors,
    zstd_level: int,
    memory: Memory | None = None,
) -> int:
    """Write the artifact atomically and return its bytes; raises ArtifactError as `pack` does."""
    content = pack(header, tokenizer, tensors, zstd_level, memory, str(path))
    lengths = dict(zip(SECTIONS, _lengths(Path(path), content, len(content)), strict=False))
    shapes = [(each.codes.shape[0], each.codes.shape[1]) for each in tensors.values() if isinstance(each, Stepped)]
    _check_count(Path(path), shapes, lengths["steps"][1], lengths["weights"][1])
    with replacing(Path(path)) as file:
        file.write(content)
    return len(content)


def pack(
    header: dict[str, Any],
    tokenizer: bytes,
    tensors: Tensors,
    zstd_level: int,
    memory: Memory | None = None,
    name_of_file: str = "artifact",
) -> bytes:
    """Make the bytes of an artifact; the same contents give the same bytes.

    header: anything JSON. tensors: stepped or quantized ones, or plain ones in float16 or float32, which is how they
    are stored. memory: training documents, None without. Raises ArtifactError, beginning with the file's name, for
    other types, values that are not finite, or a header that is not JSON.
    """
    table: list[tuple[str, str, list[int]]] = []
    weights: list[np.ndarray] = []
    indices: list[tuple[np.ndarray, np.ndarray]] = []
    parts: dict[str, list[bytes]] = {"codes": [], "scales": [], "float16": [], "float32": []}

    def refuse(problem: str) -> ArtifactError:
        return ArtifactError(f"{name_of_file}: {problem}")

    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Stepped):
            _check_stepped(name, tensor)
            table.append((name, "stepped", list(tensor.codes.shape)))
            weights.append(tensor.codes.detach().cpu().numpy())
            indices.append((tensor.row_index.cpu().numpy(), tensor.column_index.cpu().numpy()))
        elif isinstance(tensor, Stored):
            _check_stored(name, tensor)
            table.append((name, "quantized", list(tensor.codes.shape)))
            parts["codes"].append(_raw(tensor.codes, "i1"))
            parts["scales"].append(_raw(tensor.scale, "<f2"))
        else:
            kind = str(tensor.dtype).removeprefix("torch.")
            if kind not in ("float16", "float32"):
                raise refuse(f"tensor {name!r} is {kind}; quantize it or convert it to float16 or float32")
            if not tensor.isfinite().all():
                raise refuse(f"tensor {name!r} has values that are not finite in {kind}; store it as float32")
            table.append((name, kind, list(tensor.shape)))
            parts[kind].append(_raw(tensor, "<f2" if kind == "float16" else "<f4"))
    try:
        document = json.dumps(
            {"header": header, "tensors": table}, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise refuse(f"the header is not JSON ({error}); use plain numbers, texts, lists") from None

    halves = b"".join(parts["scales"] + parts["float16"])
    steps = [(rows.astype(np.int64), columns.astype(np.int64)) for rows, columns in indices]
    coded = [b"", b""]
    if weights:
        coded = [vectors.encode([vector for pair in steps for vector in pair]), matrices.encode(weights, steps)]
    plain = [b"".join(parts["codes"]), halves[::2] + halves[1::2], b"".join(parts["float32"])]
    sections = [(len(part), to_lzma(part)) for part in (document.encode(), tokenizer)]
    sections += [(len(part), part) for part in coded]
    sections += [(len(part), to_zstd(part, zstd_level)) for part in plain]
    version = MEMORY_VERSION if memory else VERSION
    sections += [(memory.text_bytes, memory.data)] if memory else []
    if max(length for length, _ in sections) > LARGEST_SECTION:
        raise refuse(f"a section is over {LARGEST_SECTION:,} bytes; the format is for small models")
    lengths = [number for length, part in sections for number in (length, len(part))]
    content = PREFIX[version].pack(MAGIC, version, *lengths) + b"".join(part for _, part in sections)
    return content + hashlib.sha256(content).digest()


def read(path: str | Path) -> Artifact:
    """Read and check an artifact; raises ArtifactError unless it is exactly what `write` made.

    Nothing is decompressed before the checksum and the declared sizes were checked, and none of these may be out of
    proportion to the file's own: see `sections` and `FREE_NUMBERS`.
    """
    parts = read_parts(path)
    tensors = _tensors(Path(path), parts)
    return Artifact(parts.header, parts.tokenizer, tensors, parts.sha256, parts.n_bytes, parts.memory)


def read_parts(path: str | Path) -> Parts:
    """Read and check an artifact as `read` does, but leave its tensors codes and steps."""
    path = Path(path)
    with path.open("rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(PREFIX[MEMORY_VERSION].size)
        lengths = _lengths(path, prefix, n_bytes)
        content = prefix + file.read(n_bytes - len(prefix))
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ArtifactError(f"{path} was altered: its checksum does not match; copy it again from its source")
    parts, start = [], n_bytes - 32 - sum(stored for _, stored in lengths)
    for _, stored in lengths:
        parts.append(content[start : start + stored])
        start += stored
    declared = [length for length, _ in lengths]
    document, tokenizer = (from_lzma(path, part, length) for part, length in zip(parts[:2], declared, strict=False))
    codes, planes, singles = (
        from_zstd(path, part, length) for part, length in zip(parts[4:7], declared[4:7], strict=True)
    )
    header, table = _document(path, document)
    _check_sizes(path, table, len(codes), len(planes), len(singles))
    return Parts(
        header=header,
        tokenizer=tokenizer,
        table=table,
        stepped=_stepped(path, [(shape[0], shape[1]) for _, kind, shape in table if kind == "stepped"], *parts[2:4]),
        codes=codes,
        halves=np.frombuffer(planes, np.uint8).reshape(2, -1).T.tobytes(),
        singles=singles,
        memory=from_ppmd(path, parts[7], declared[7]) if parts[7:] else (),
        lengths=dict(zip(SECTIONS, lengths, strict=False)),
        sha256=hashlib.sha256(content).hexdigest(),
        n_bytes=n_bytes,
    )


def _stepped(path: Path, shapes: list[tuple[int, int]], steps: bytes, weights: bytes) -> list[Stepped]:
    """The stepped tensors, in the document's order."""
    if not shapes:
        if weights or steps:
            raise ArtifactError(f"{path}: it has steps and no tensor for them; write the artifact again")
        return []
    _check_count(path, shapes, len(steps), len(weights))
    try:
        index = vectors.decode(steps, [length for shape in shapes for length in shape])
        if any(len(each) and abs(each).max() > LARGEST_INDEX for each in index):
            raise ArtifactError(f"{path}: a step is out of range; write the artifact again")
        pairs = list(zip(index[::2], index[1::2], strict=True))
        codes = matrices.decode(weights, shapes, pairs)
    except CoderError as error:
        raise ArtifactError(f"{path}: its weights cannot be decoded ({error}); write the artifact again") from None
    return [
        Stepped(torch.from_numpy(matrix), *(torch.from_numpy(each.astype(np.int8)) for each in pair))
        for matrix, pair in zip(codes, pairs, strict=True)
    ]


def _check_count(path: Path, shapes: list[tuple[int, int]], n_steps: int, n_weights: int) -> None:
    steps, weights = sum(map(sum, shapes)), sum(map(math.prod, shapes))
    for wanted, free, stored in ((steps, FREE_STEPS, n_steps), (weights, FREE_NUMBERS, n_weights)):
        if wanted > free + NUMBERS_A_BYTE * stored:
            raise ArtifactError(f"{path}: its tensors are too large for their {stored:,} bytes; check what made it")


def _raw(tensor: Tensor, dtype: str) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().astype(dtype, copy=False).tobytes()


def _check_stepped(name: str, tensor: Stepped) -> None:
    shapes = tuple(tensor.codes.shape), (*tensor.row_index.shape, *tensor.column_index.shape)
    types = tensor.codes.dtype, tensor.row_index.dtype, tensor.column_index.dtype
    if shapes[0] != shapes[1] or types != (torch.int32, torch.int8, torch.int8):
        raise ArtifactError(f"tensor {name!r}: codes {shapes[0]} and steps {shapes[1]} of types {types} do not fit")
    parts = (
        (tensor.codes, gaussian_tables.LARGEST),
        (tensor.row_index, LARGEST_INDEX),
        (tensor.column_index, LARGEST_INDEX),
    )
    if any(part.numel() and (part.min() < -most or part.max() > most) for part, most in parts):
        raise ArtifactError(f"tensor {name!r}: codes or steps out of range; check that training converged")


def _check_stored(name: str, stored: Stored) -> None:
    codes, scale = stored.codes, stored.scale
    if codes.dtype != torch.int8 or scale.dtype != torch.float16:
        raise ArtifactError(f"tensor {name!r}: codes are {codes.dtype}, scales {scale.dtype}; use int8 and float16")
    if codes.ndim < 1 or scale.shape != codes.shape[:-1]:
        raise ArtifactError(f"tensor {name!r}: scales {list(scale.shape)} do not fit codes {list(codes.shape)}")
    if not scale.isfinite().all():
        raise ArtifactError(f"tensor {name!r}: its scales are not finite; check that training converged")


def _lengths(path: Path, prefix: bytes, n_bytes: int) -> list[tuple[int, int]]:
    """(length, length as stored) of each section, checked against the size of the file."""
    if prefix[:8] != MAGIC[: len(prefix)] or not prefix:
        raise ArtifactError(f"{path} is not a hedgemix artifact; give the file that quantize wrote")
    version = struct.unpack_from("<I", prefix, 8)[0] if len(prefix) >= 12 else VERSION
    if version not in PREFIX:
        known = " and ".join(map(str, PREFIX))
        raise ArtifactError(f"{path} has format version {version}, this hedgemix reads {known}; use the one it names")
    if len(prefix) < PREFIX[version].size:
        raise ArtifactError(f"{path} is truncated: {n_bytes:,} bytes; copy it again from its source")
    _, _, *numbers = PREFIX[version].unpack_from(prefix)
    lengths = list(zip(numbers[::2], numbers[1::2], strict=True))
    if max(numbers) > LARGEST_SECTION:
        raise ArtifactError(f"{path} declares a section over {LARGEST_SECTION:,} bytes; it is damaged, copy it again")
    expected = PREFIX[version].size + sum(stored for _, stored in lengths) + 32
    if n_bytes != expected:
        what = "is truncated" if n_bytes < expected else "has bytes after its end"
        raise ArtifactError(f"{path} {what}: {n_bytes:,} bytes instead of {expected:,}; copy it again from its source")
    for name, (length, stored) in zip(SECTIONS, lengths, strict=False):
        check_length(path, name, length, stored)
    return lengths


def _document(path: Path, data: bytes) -> tuple[dict[str, Any], Table]:
    try:
        document = json.loads(data)
        header, table = document["header"], [(name, kind, tuple(shape)) for name, kind, shape in document["tensors"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its document is not the JSON it should be ({error!r}); write it again") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: its header is not a JSON object; write the artifact again")
    if len(table) > MOST_TENSORS:
        raise ArtifactError(f"{path} has {len(table):,} tensors, of at most {MOST_TENSORS:,}; check what made it")
    return header, table


def _check_sizes(path: Path, table: Table, n_codes: int, n_halves: int, n_singles: int) -> None:
    sizes = dict.fromkeys(KINDS, 0)
    for name, kind, shape in table:
        if not isinstance(name, str) or not isinstance(kind, str) or kind not in KINDS:
            raise ArtifactError(f"{path}: tensor {name!r} is of unknown kind {kind!r}; use the hedgemix it names")
        sizes_fit = all(type(size) is int and 0 <= size <= LARGEST_SECTION for size in shape)
        if not sizes_fit or not (kind == "quantized") <= len(shape) <= 8 or (kind == "stepped" and len(shape) != 2):
            raise ArtifactError(f"{path}: tensor {name!r} has the impossible shape {shape}; write the artifact again")
        sizes[kind] += KINDS[kind] * math.prod(shape)
        if kind == "quantized":
            sizes["float16"] += 2 * math.prod(shape[:-1])
    if (sizes["quantized"], sizes["float16"], sizes["float32"]) != (n_codes, n_halves, n_singles):
        raise ArtifactError(f"{path}: its tensor table does not fit its sections; write the artifact again")
    if len({name for name, _, _ in table}) != len(table):
        raise ArtifactError(f"{path}: a tensor is listed twice; write the artifact again")


def _tensors(path: Path, stored: Parts) -> dict[str, Tensor]:
    stepped = iter(stored.stepped)
    parts = {"quantized": np.frombuffer(stored.codes, "i1"), "float32": np.frombuffer(stored.singles, "<f4")}
    n_scales = sum(math.prod(shape[:-1]) for _, kind, shape in stored.table if kind == "quantized")
    scales, parts["float16"] = np.split(np.frombuffer(stored.halves, "<f2"), [n_scales])
    tensors = {}
    for name, kind, shape in stored.table:
        if kind == "stepped":
            tensors[name] = stepped_weights(next(stepped))
            continue
        values, parts[kind] = np.split(parts[kind], [math.prod(shape)])
        tensor = torch.from_numpy(values.astype(np.float32)).view(shape)
        if kind == "quantized":
            scale, scales = np.split(scales, [math.prod(shape[:-1])])
            tensor = dequantize(tensor, torch.from_numpy(scale.astype(np.float32)).view(shape[:-1]))
        if not tensor.isfinite().all():
            raise ArtifactError(f"{path}: tensor {name!r} is not finite; quantize the checkpoint again")
        tensors[name] = tensor
    return tensors
