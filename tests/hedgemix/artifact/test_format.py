"""The artifact comes back bit for bit, and nothing else is accepted as one."""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyppmd
import pytest
import torch
import zstandard
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.format import PREFIX, Artifact, ArtifactError
from hedgemix.artifact.tensors import Stepped, Stored, dequantize, stepped_weights
from hedgemix.data import memory
from hedgemix.entropy import matrices, vectors

HEADER = {"model": {"layers": 2, "width": 8}, "seed": 7, "recipe": "t\u00e9st"}
TOKENIZER = bytes(range(256))
GOLDEN = """
89484d580d0a1a0a020000009000000000000000820000000000000009000000000000002000000000000000080000000000000008000000
000000000e000000000000000e0000000000000006000000000000000f000000000000000800000000000000110000000000000004000000
000000000d000000000000005d00000004ffffffffffffffff003d88890693b629d7f1d53aa79e5d566577aed334a0dba13728e5df5986f0
1f53494d99607036d3ec52ab43c6579ffd060b3f54776e0d2070100a408b5a5228c544fd66ec2ec7e918c8c00da5a27ea0b85c2a577e5026
725b8293db573c79dba5aca4b6b39971276a17d13306e15a40e9fe091a405d00000004ffffffffffffffff003a1bc9a93f270a0416fd4b1c
3ffffe93500030071a00c88bb80f37243d05e58a422cad8fbd59b4ed28b52ffd2006310000f1000f0102fd28b52ffd200841000000000000
38343ec028b52ffd2004210000cdcccc3dc6471de8984887a6e7ef7857db22071b898e3d816c5bf6a2852f3919b96f71fc
"""


def stepped(rows: int = 5, columns: int = 7, seed: int = 0) -> Stepped:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-300, 301, (rows, columns), generator=generator, dtype=torch.int32)
    index = (torch.randint(-40, 41, (n,), generator=generator, dtype=torch.int8) for n in (rows, columns))
    return Stepped(codes, *index)


def tensors() -> dict[str, Tensor | Stored | Stepped]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-15, 16, (6, 8), generator=generator, dtype=torch.int8)
    table = torch.randint(-127, 128, (3, 4, 5), generator=generator, dtype=torch.int8)
    return {
        "matrix": Stored(codes, torch.rand(6, generator=generator).half()),
        "table": Stored(table, torch.rand(3, 4, generator=generator).half()),
        "gain": torch.randn(5, generator=generator).half(),
        "gate": torch.randn(2, 3, generator=generator),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 4),
        "stepped": stepped(),
        "stepped.too": stepped(seed=1),
        "other": stepped(3, 1),
        "stepless": stepped(0, 3),
    }


def plain(tensor: Tensor | Stored | Stepped) -> Tensor:
    """What decoding gives."""
    if isinstance(tensor, Stepped):
        return stepped_weights(tensor)
    return dequantize(tensor.codes, tensor.scale) if isinstance(tensor, Stored) else tensor.float()


def made(path: Path) -> Path:
    artifact.write(path, HEADER, TOKENIZER, tensors(), 19)
    return path


def packed(
    document: Any,
    codes: bytes = b"",
    halves: bytes = b"",
    singles: bytes = b"",
    steps: bytes = b"",
    weights: bytes = b"",
    memory: tuple[int, bytes] | None = None,
) -> bytes:
    """A file with a right checksum and wrong contents."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    whole = [data, b"", steps, weights, codes, halves, singles]
    stored = [lzma.compress(part, lzma.FORMAT_ALONE) for part in whole[:2]] + [steps, weights]
    stored += [zstandard.compress(part) if part else part for part in whole[4:]]
    return sealed([(len(p), s) for p, s in zip(whole, stored, strict=True)] + ([memory] if memory else []))


def table(*shapes: Any) -> dict[str, Any]:
    """A document of stepped tensors."""
    return {"header": {}, "tensors": [[f"t{n}", "stepped", shape] for n, shape in enumerate(shapes)]}


def coded(*stored: Stepped, index: int | None = None) -> dict[str, bytes]:
    """Sections of stepped tensors, maybe with another index for the first row's step."""
    pairs = [(each.row_index.numpy().astype(int), each.column_index.numpy().astype(int)) for each in stored]
    if index is not None:
        pairs[0][0][0] = index
    weights = matrices.encode([each.codes.numpy() for each in stored], pairs)
    return {"steps": vectors.encode([part for pair in pairs for part in pair]), "weights": weights}


ONE = coded(stepped())


def ppmd_of(text: bytes) -> tuple[bytes, bytes]:
    encoder = pyppmd.Ppmd8Encoder(*memory.MODEL)
    data = encoder.encode(text)
    return text, data + encoder.flush()


def sealed(sections: list[tuple[int, bytes]]) -> bytes:
    lengths = [number for length, part in sections for number in (length, len(part))]
    version = {7: artifact.VERSION, 8: artifact.MEMORY_VERSION}[len(sections)]
    content = PREFIX[version].pack(artifact.MAGIC, version, *lengths) + b"".join(part for _, part in sections)
    return content + hashlib.sha256(content).digest()


MEMORY = memory.compress(["A document \u00e9\n", "\x00", "the third"])
BAD_MEMORIES = [
    (0, b"", "it declares 0 bytes"),
    (2**20 + 64 * len(MEMORY.data), MEMORY.data, "it has not its declared length"),
    (MEMORY.text_bytes, b"", "it declares"),
    (MEMORY.text_bytes - 1, MEMORY.data, "it has not its declared length"),
    (MEMORY.text_bytes + 1, MEMORY.data, "it has not its declared length"),
    (MEMORY.text_bytes, MEMORY.data[:-5], "it has not its declared length|it cannot be decompressed"),
    (MEMORY.text_bytes, bytes(20), "it has not its declared length|it cannot be decompressed"),
    (MEMORY.text_bytes, b"no compressed data", "it has not its declared length|it cannot be decompressed"),
    (10, memory.compress(["a" * 1_000_000]).data, "it has not its declared length"),
    (len(ppmd_of(b"ab\xc3")[0]), ppmd_of(b"ab\xc3")[1], "a document is not UTF-8"),
    (len(ppmd_of(b"ab\xff\xffc")[0]), ppmd_of(b"ab\xff\xffc")[1], "a document is empty"),
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.hmx"
    n_bytes = artifact.write(path, HEADER, TOKENIZER, tensors(), 19)
    result = artifact.read(path)
    assert isinstance(result, Artifact)
    assert (result.header, result.tokenizer) == (HEADER, TOKENIZER)
    assert result.n_bytes == n_bytes == path.stat().st_size
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(result.tensors) == sorted(tensors())
    for name, tensor in tensors().items():
        assert result.tensors[name].dtype == torch.float32
        assert torch.equal(result.tensors[name], plain(tensor)), name
    assert [file.name for file in path.parent.iterdir()] == ["model.hmx"]


def test_nothing_in_it(tmp_path: Path) -> None:
    artifact.write(tmp_path / "a", {}, b"", {}, 1)
    assert artifact.read(tmp_path / "a").tensors == {}


def test_same_contents_same_bytes(tmp_path: Path) -> None:
    first = made(tmp_path / "a").read_bytes()
    other_order = dict(reversed(tensors().items()))
    artifact.write(tmp_path / "b", dict(reversed(HEADER.items())), TOKENIZER, other_order, 19)
    assert (tmp_path / "b").read_bytes() == first


def test_strided_tensors(tmp_path: Path) -> None:
    codes = torch.arange(12, dtype=torch.int8).view(3, 4).T
    artifact.write(tmp_path / "a", {}, b"", {"t": Stored(codes, torch.ones(4).half())}, 1)
    assert torch.equal(artifact.read(tmp_path / "a").tensors["t"], codes.float())


def test_the_format_stays_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "golden"
    path.write_bytes(bytes.fromhex(GOLDEN))
    result = artifact.read(path)
    assert (result.header, result.tokenizer) == ({"name": "golden"}, b"tokenizer")
    assert {name: tensor.tolist() for name, tensor in result.tensors.items()} == {
        "half": [1.5, -2.0],
        "matrix": [[-7.5, 0.0, 7.5], [0.25, 0.5, -0.75]],
        "single": torch.tensor(0.1).item(),
        "stepped": [[-0.5, 0.0, 3.0], [1.0, 2.1810154914855957, 600.0]],
    }


def test_a_memory_comes_back(tmp_path: Path) -> None:
    made(tmp_path / "without")
    n_bytes = artifact.write(tmp_path / "with", HEADER, TOKENIZER, tensors(), 19, MEMORY)
    with_memory, without = artifact.read(tmp_path / "with"), artifact.read(tmp_path / "without")
    assert (with_memory.memory, without.memory) == (("A document \u00e9\n", "\x00", "the third"), ())
    assert n_bytes == without.n_bytes + 16 + len(MEMORY.data)
    assert all(torch.equal(with_memory.tensors[name], each) for name, each in without.tensors.items())


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    content = made(tmp_path / "a").read_bytes()
    path = tmp_path / "flipped"
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with pytest.raises(ArtifactError, match="flipped"):
            artifact.read(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = made(tmp_path / "a").read_bytes()
    path = tmp_path / "short"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="truncated" if length else "not a hedgemix artifact"):
            artifact.read(path)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    content = made(tmp_path / "a").read_bytes()
    path = tmp_path / "b"
    for altered, message in [
        (b"PK\x03\x04" + bytes(500), "not a hedgemix artifact"),
        (content + b"\0", "bytes after its end"),
        (content[:8] + struct.pack("<I", 1) + content[12:], "format version 1, this hedgemix reads 2 and 3"),
        (content[:8] + struct.pack("<I", 4) + content[12:], "format version 4, this hedgemix reads 2 and 3"),
        (content[:8] + struct.pack("<I", 3) + content[12:], "declares a section over|instead of"),
        (content[:200] + bytes([content[200] ^ 1]) + content[201:], "altered"),
        (content[:12] + struct.pack("<Q", 2**40) + content[20:], "over 1,073,741,824 bytes"),
    ]:
        path.write_bytes(altered)
        with pytest.raises(ArtifactError, match=message):
            artifact.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed(b"{no"), "not the JSON"),
        (packed(b"\xff\xfe\xff"), "not the JSON"),
        (packed(b"[" * 100_000), "not the JSON"),
        (packed([]), "not the JSON"),
        (packed({"header": 1, "tensors": []}), "not a JSON object"),
        (packed({"header": {}, "tensors": [["a", "float32"]]}), "not the JSON"),
        (packed({"header": {}, "tensors": [["a", "pickle", [1]]]}, singles=bytes(4)), "unknown kind"),
        (packed({"header": {}, "tensors": [["a", [], [1]]]}), "unknown kind"),
        (packed({"header": {}, "tensors": [[1, "float32", [1]]]}, singles=bytes(4)), "unknown kind"),
        (packed({"header": {}, "tensors": [["a", "float32", [-1, -1]]]}, singles=bytes(4)), "impossible shape"),
        (packed({"header": {}, "tensors": [["a", "float32", [1.0]]]}, singles=bytes(4)), "impossible shape"),
        (packed({"header": {}, "tensors": [["a", "float32", [2**40, 0]]]}), "impossible shape"),
        (packed({"header": {}, "tensors": [["a", "float32", [2**30, 2**30]]]}), "does not fit"),
        (packed({"header": {}, "tensors": [["a", "float32", [2]]]}, singles=bytes(4)), "does not fit"),
        (packed({"header": {}, "tensors": [["a", "float32", [1]]] * 2}, singles=bytes(8)), "listed twice"),
        (packed({"header": {}, "tensors": [["a", "quantized", []]]}, codes=bytes(1), halves=bytes(2)), "impossible"),
        (
            packed({"header": {}, "tensors": [["a", "quantized", [1, 1]]]}, codes=b"\1", halves=b"\x00\x7c"),
            "'a' is not finite",
        ),
        (packed(table([5, 8]), **ONE), "cannot be decoded"),
        (packed(table([5, 7], [5, 7]), **ONE), "cannot be decoded"),
        (packed(table([5, 7]), steps=ONE["steps"]), "cannot be decoded"),
        (packed(table([5, 7]), weights=ONE["weights"]), "cannot be decoded"),
        (packed(table([5, 7]), **coded(stepped(), stepped(seed=1))), "cannot be decoded"),
        (packed(table([5, 7]), **coded(stepped(), index=300)), "step is out of range"),
        (packed(table(), **ONE), "steps and no tensor"),
        (packed(table([35]), **ONE), "impossible shape"),
        (packed(table([5, 7, 1]), **ONE), "impossible shape"),
        (packed(table([-5, 7]), **ONE), "impossible shape"),
        (packed(table([2**20, 2**20]), **ONE), "too large"),
        (packed(table(*[[2**15, 2**14]] * 3), **ONE), "too large"),
        (packed(table([2**15, 2**14]), **ONE), "too large"),
        (packed(table([2**30, 0]), **ONE), "too large"),
        (packed(table(*[[0, 0]] * 5000), **ONE), "has 5,000 tensors"),
        (packed({"header": {"x": "y" * 2**20}, "tensors": []}), "more than the format allows"),
        (packed({"header": {}, "tensors": []}, codes=bytes(2**21)), "more than the format allows"),
        (packed({"header": {}, "tensors": []}, memory=(2**26 + 1, MEMORY.data)), "67,108,865 bytes of memory in"),
        *(
            (packed({"header": {}, "tensors": []}, memory=(n, data)), f"bad: its memory is damaged: {message}")
            for n, data, message in BAD_MEMORIES
        ),
    ],
)
def test_well_sealed_nonsense_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        artifact.read(path)


def test_no_section_expands_beyond_its_declared_length(tmp_path: Path) -> None:
    document = json.dumps({"header": {}, "tensors": []}).encode()
    empty = b""
    nothing = lzma.compress(b"", lzma.FORMAT_ALONE)
    text = lzma.compress(document, lzma.FORMAT_ALONE)
    bomb, noise = bytes(10_000_000), b"no compressed data"
    path = tmp_path / "bomb"
    for sections in [
        [(len(document), text), (10, lzma.compress(bomb, lzma.FORMAT_ALONE)), *[(0, empty)] * 5],
        [
            (len(document), text),
            (0, nothing),
            *[(0, empty)] * 2,
            (10, zstandard.compress(bomb)),
            *[(0, empty)] * 2,
        ],
        [(len(document), noise), (0, text), *[(0, empty)] * 5],
        [(len(document), text), (0, nothing), *[(0, empty)] * 2, (10, noise), *[(0, empty)] * 2],
        [(len(document), text), (0, nothing), *[(0, empty)] * 2, (0, b"more"), *[(0, empty)] * 2],
    ]:
        path.write_bytes(sealed(sections))
        with pytest.raises(ArtifactError, match="bomb: a section"):
            artifact.read(path)


@pytest.mark.parametrize(
    ("header", "tensor", "message"),
    [
        ({"x": object()}, torch.ones(1), "header is not JSON"),
        ({"x": float("nan")}, torch.ones(1), "header is not JSON"),
        ({}, torch.ones(1, dtype=torch.bfloat16), "'a' is bfloat16"),
        ({}, torch.tensor([1e6]).half(), "not finite in float16"),
        ({}, Stored(torch.ones(2, 2, dtype=torch.int8), torch.ones(3).half()), "do not fit"),
        ({}, Stored(torch.ones(2, 2), torch.ones(2).half()), "use int8 and float16"),
        ({}, Stored(torch.ones(1, 2, dtype=torch.int8), torch.tensor([float("inf")]).half()), "scales are not finite"),
        ({}, replace(stepped(), row_index=torch.zeros(4, dtype=torch.int8)), "do not fit"),
        ({}, replace(stepped(), codes=torch.zeros(5, 7)), "do not fit"),
        ({}, replace(stepped(), codes=torch.full((5, 7), 2**24 + 1, dtype=torch.int32)), "out of range"),
        ({}, replace(stepped(), row_index=torch.full((5,), -128, dtype=torch.int8)), "out of range"),
    ],
)
def test_contents_that_cannot_be_stored(tmp_path: Path, header: dict[str, Any], tensor: Any, message: str) -> None:
    path = made(tmp_path / "a")
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=message):
        artifact.write(path, header, b"", {"a": tensor}, 1)
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "a")
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifact.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        artifact.write(path, {}, b"", {}, 1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_noise_is_not_stored_longer_than_huffman_coded(tmp_path: Path) -> None:
    codes = (torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 4).round().clamp(-15, 15)
    stored = {"a": Stored(codes.to(torch.int8), torch.ones(256).half())}
    sizes = [artifact.write(tmp_path / "a", {}, b"", stored, level) for level in (3, 9, 19)]
    counts = torch.unique(codes, return_counts=True)[1] / codes.numel()
    entropy_bytes = float(-(counts * counts.log2()).sum()) * codes.numel() / 8
    assert max(sizes) < 1.02 * entropy_bytes + 500
