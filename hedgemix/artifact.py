"""The one file that is shipped: header, tokenizer and tensors. Versioned, checksummed, nothing in it is executable.

All integers and floats are little-endian.

    offset  bytes  content
    0       8      magic 89 48 4D 58 0D 0A 1A 0A (as PNG's: text-mode copying breaks it visibly)
    8       4      u32 format version, 1
    12      80     for each of the five sections below: u64 length, u64 length as stored
    92      ...    the sections as stored, one after the other
    end-32  32     SHA-256 of everything before

    section    coder  content
    document   lzma   JSON {"header": {...}, "tensors": [[name, kind, shape], ...]}, ASCII, keys and names sorted
    tokenizer  lzma   the SentencePiece .model
    codes      zstd   int8 codes of the "quantized" tensors, row-major
    halves     zstd   float16: the scales of the "quantized" tensors, one for each row, then the "float16" tensors; all
                      low bytes, then all high bytes
    singles    zstd   the "float32" tensors

Within a section tensors follow the document's order, so offsets are sums of sizes and cannot overlap. lzma is
FORMAT_ALONE. A zstd section is the shorter of the requested level and of plain Huffman coding: on 8 MB of int5 codes
Huffman was as short (1 % either way) in 0.03 s instead of 9: there is nothing to match in rounded noise.
An empty zstd section is stored as nothing.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

MAGIC = b"\x89HMX\r\n\x1a\n"
VERSION = 1
LARGEST_SECTION = 2**30
PREFIX = struct.Struct("<8sI10Q")
KINDS = {"quantized": 1, "float16": 2, "float32": 4}
"""How a tensor is stored, and the bytes of one element (without the scales)."""


class ArtifactError(ValueError):
    """A file that is not a sound artifact, or contents that cannot become one; the message names both and the fix."""


@dataclass(frozen=True)
class Stored:
    """A quantized tensor: codes int8 (..., R, C), scale float16 (..., R)."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Artifact:
    header: dict[str, Any]
    tokenizer: bytes
    tensors: dict[str, Tensor]
    """Float32 on the CPU, by name in sorted order."""
    sha256: str
    """Of the whole file, as sha256sum prints it."""
    n_bytes: int


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (..., R, C) * scale (..., R) in float32. Here, as evaluation reads artifacts without the quantizer."""
    return codes.float() * scale.float()[..., None]


def write(
    path: str | Path, header: dict[str, Any], tokenizer: bytes, tensors: Mapping[str, Stored | Tensor], zstd_level: int
) -> int:
    """Writes the artifact atomically and returns its bytes; the same contents give the same bytes.

    header: anything JSON. tensors: quantized ones, or plain ones in float16 or float32, which is how they are stored.
    Raises ArtifactError for other types, values that are not finite, or a header that is not JSON.
    """
    path = Path(path)
    table: list[tuple[str, str, list[int]]] = []
    codes: list[bytes] = []
    scales: list[bytes] = []
    halves: list[bytes] = []
    singles: list[bytes] = []
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Stored):
            _check_stored(name, tensor)
            table.append((name, "quantized", list(tensor.codes.shape)))
            codes.append(_raw(tensor.codes, "i1"))
            scales.append(_raw(tensor.scale, "<f2"))
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in ("float16", "float32"):
            raise ArtifactError(f"{path}: tensor {name!r} is {kind}; quantize it or convert it to float16 or float32")
        if not tensor.isfinite().all():
            raise ArtifactError(
                f"{path}: tensor {name!r} has values that are not finite in {kind}; store it as float32"
            )
        table.append((name, kind, list(tensor.shape)))
        (halves if kind == "float16" else singles).append(_raw(tensor, "<f2" if kind == "float16" else "<f4"))
    try:
        document = json.dumps(
            {"header": header, "tensors": table}, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: the header is not JSON ({error}); use plain numbers, texts, lists") from None

    half_bytes = b"".join(scales + halves)
    plain = [document.encode(), tokenizer, b"".join(codes), half_bytes[::2] + half_bytes[1::2], b"".join(singles)]
    if max(map(len, plain)) > LARGEST_SECTION:
        raise ArtifactError(f"{path}: a section is over {LARGEST_SECTION:,} bytes; the format is for small models")
    stored = [_lzma(part) for part in plain[:2]] + [_zstd(part, zstd_level) for part in plain[2:]]
    lengths = [length for pair in zip(plain, stored, strict=True) for length in map(len, pair)]
    content = PREFIX.pack(MAGIC, VERSION, *lengths) + b"".join(stored)
    _replace(path, content + hashlib.sha256(content).digest())
    return len(content) + 32


def read(path: str | Path) -> Artifact:
    """Reads and checks an artifact; raises ArtifactError unless it is exactly what `write` made.

    Nothing is decompressed before the checksum and the declared sizes (at most 1 GiB a section) were checked.
    """
    path = Path(path)
    with path.open("rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(PREFIX.size)
        lengths = _lengths(path, prefix, n_bytes)
        content = prefix + file.read(n_bytes - PREFIX.size)
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ArtifactError(f"{path} was altered: its checksum does not match; copy it again from its source")
    sections, start = [], PREFIX.size
    for index, (length, stored) in enumerate(lengths):
        part = content[start : start + stored]
        start += stored
        sections.append(_unlzma(path, part, length) if index < 2 else _unzstd(path, part, length))
    document, tokenizer, codes, planes, singles = sections
    header, table = _document(path, document)
    _check_sizes(path, table, len(codes), len(planes), len(singles))
    halves = np.frombuffer(planes, np.uint8).reshape(2, -1).T.tobytes()
    return Artifact(
        header=header,
        tokenizer=tokenizer,
        tensors=_tensors(path, table, codes, halves, singles),
        sha256=hashlib.sha256(content).hexdigest(),
        n_bytes=n_bytes,
    )


def _raw(tensor: Tensor, dtype: str) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().astype(dtype, copy=False).tobytes()


def _check_stored(name: str, stored: Stored) -> None:
    codes, scale = stored.codes, stored.scale
    if codes.dtype != torch.int8 or scale.dtype != torch.float16:
        raise ArtifactError(f"tensor {name!r}: codes are {codes.dtype}, scales {scale.dtype}; use int8 and float16")
    if codes.ndim < 1 or scale.shape != codes.shape[:-1]:
        raise ArtifactError(f"tensor {name!r}: scales {list(scale.shape)} do not fit codes {list(codes.shape)}")
    if not scale.isfinite().all():
        raise ArtifactError(f"tensor {name!r}: its scales are not finite; check that training converged")


def _lzma(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)


def _zstd(data: bytes, level: int) -> bytes:
    if not data:
        return b""
    huffman = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, window_log=17
    )
    compressors = zstandard.ZstdCompressor(level=level), zstandard.ZstdCompressor(compression_params=huffman)
    return min((compressor.compress(data) for compressor in compressors), key=len)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _lengths(path: Path, prefix: bytes, n_bytes: int) -> list[tuple[int, int]]:
    """(length, length as stored) of each section, checked against the size of the file."""
    if prefix[:8] != MAGIC[: len(prefix)] or not prefix:
        raise ArtifactError(f"{path} is not a hedgemix artifact; give the file that quantize wrote")
    if len(prefix) >= 12 and (version := struct.unpack_from("<I", prefix, 8)[0]) != VERSION:
        raise ArtifactError(f"{path} has format version {version}, this hedgemix reads {VERSION}; use the one it names")
    if len(prefix) < PREFIX.size:
        raise ArtifactError(f"{path} is truncated: {n_bytes:,} bytes; copy it again from its source")
    _, _, *numbers = PREFIX.unpack(prefix)
    lengths = list(zip(numbers[::2], numbers[1::2], strict=True))
    if max(numbers) > LARGEST_SECTION:
        raise ArtifactError(f"{path} declares a section over {LARGEST_SECTION:,} bytes; it is damaged, copy it again")
    expected = PREFIX.size + sum(stored for _, stored in lengths) + 32
    if n_bytes != expected:
        what = "is truncated" if n_bytes < expected else "has bytes after its end"
        raise ArtifactError(f"{path} {what}: {n_bytes:,} bytes instead of {expected:,}; copy it again from its source")
    return lengths


def _unlzma(path: Path, data: bytes, length: int) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LARGEST_SECTION)
    try:
        plain = decoder.decompress(data, max_length=length + 1)  # stops there, whatever the stream would go on to
    except lzma.LZMAError as error:
        raise ArtifactError(f"{path}: a section cannot be decompressed ({error}); write the artifact again") from None
    if len(plain) != length or not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"{path}: a section has not its declared length; write the artifact again")
    return plain


def _unzstd(path: Path, data: bytes, length: int) -> bytes:
    if not length and not data:
        return b""
    try:
        # zstandard allocates what the frame declares and then ignores max_output_size, so look first.
        if not length or zstandard.frame_content_size(data) != length:
            raise ArtifactError(f"{path}: a section has not its declared length; write the artifact again")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{path}: a section cannot be decompressed ({error}); write the artifact again") from None


Table = list[tuple[str, str, tuple[int, ...]]]


def _document(path: Path, data: bytes) -> tuple[dict[str, Any], Table]:
    try:
        document = json.loads(data)
        header, table = document["header"], [(name, kind, tuple(shape)) for name, kind, shape in document["tensors"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its document is not the JSON it should be ({error!r}); write it again") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: its header is not a JSON object; write the artifact again")
    return header, table


def _check_sizes(path: Path, table: Table, n_codes: int, n_halves: int, n_singles: int) -> None:
    sizes = {"quantized": 0, "float16": 0, "float32": 0}
    for name, kind, shape in table:
        if not isinstance(name, str) or not isinstance(kind, str) or kind not in KINDS:
            raise ArtifactError(f"{path}: tensor {name!r} is of unknown kind {kind!r}; use the hedgemix it names")
        sizes_fit = all(type(size) is int and 0 <= size <= LARGEST_SECTION for size in shape)
        if not sizes_fit or not (kind == "quantized") <= len(shape) <= 8:
            raise ArtifactError(f"{path}: tensor {name!r} has the impossible shape {shape}; write the artifact again")
        sizes[kind] += KINDS[kind] * math.prod(shape)
        if kind == "quantized":
            sizes["float16"] += 2 * math.prod(shape[:-1])
    if (sizes["quantized"], sizes["float16"], sizes["float32"]) != (n_codes, n_halves, n_singles):
        raise ArtifactError(f"{path}: its tensor table does not fit its sections; write the artifact again")
    if len({name for name, _, _ in table}) != len(table):
        raise ArtifactError(f"{path}: a tensor is listed twice; write the artifact again")


def _tensors(path: Path, table: Table, codes: bytes, halves: bytes, singles: bytes) -> dict[str, Tensor]:
    parts = {"quantized": np.frombuffer(codes, "i1"), "float32": np.frombuffer(singles, "<f4")}
    n_scales = sum(math.prod(shape[:-1]) for _, kind, shape in table if kind == "quantized")
    scales, parts["float16"] = np.split(np.frombuffer(halves, "<f2"), [n_scales])
    tensors = {}
    for name, kind, shape in table:
        values, parts[kind] = np.split(parts[kind], [math.prod(shape)])
        tensor = torch.from_numpy(values.astype(np.float32)).view(shape)
        if kind == "quantized":
            scale, scales = np.split(scales, [math.prod(shape[:-1])])
            tensor = dequantize(tensor, torch.from_numpy(scale.astype(np.float32)).view(shape[:-1]))
        if not tensor.isfinite().all():
            raise ArtifactError(f"{path}: tensor {name!r} is not finite; quantize the checkpoint again")
        tensors[name] = tensor
    return tensors
