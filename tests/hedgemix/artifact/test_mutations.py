"""Artifacts that are wrong inside are refused by ArtifactError, and reading them takes little memory and time.

HEDGEMIX_MUTATIONS sets how many (10,000 take some minutes)."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model, load_tokenizer
from support import tiny_artifact
from support.mutations import MOST_BYTES, MOST_SECONDS, lzma_of, mutate_artifact, sealed, take_apart, taken

COUNT = int(os.environ.get("HEDGEMIX_MUTATIONS", 60))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sound")
    return tiny_artifact.make(folder, ["A document that it remembers.", "Another."]).artifact.read_bytes()


def use(path: Path) -> None:
    found = artifact.read(path)
    load_model(found)
    load_tokenizer(found)


def test_what_is_wrong_inside_is_refused_and_costs_little(sound: bytes, tmp_path: Path) -> None:
    path, most = tmp_path / "a", [0.0, 0.0]
    path.write_bytes(sound)
    assert taken(lambda: use(path)).outcome == ""
    outcomes: Counter[str] = Counter()
    for number in range(COUNT):
        path.write_bytes(mutate_artifact(sound, Random(number)))
        cost = taken(lambda: use(path))
        outcomes[cost.outcome] += 1
        assert cost.outcome in ("", "ArtifactError"), (number, cost)
        assert cost.more_bytes <= MOST_BYTES and cost.seconds <= MOST_SECONDS, (number, cost)
        most = [max(most[0], cost.more_bytes), max(most[1], cost.seconds)]
    print(f"{COUNT} artifacts: {dict(outcomes)}; most {most[0] / 2**20:.1f} MiB, {most[1]:.2f} s")
    assert outcomes["ArtifactError"] > COUNT / 2


def with_section(content: bytes, at: int, length: int, data: bytes) -> bytes:
    sections, lengths = take_apart(content)
    sections[at], lengths[at] = data, length
    numbers = [number for pair in zip(lengths, map(len, sections), strict=True) for number in pair]
    prefix = artifact.PREFIX[artifact.MEMORY_VERSION].pack(artifact.MAGIC, artifact.MEMORY_VERSION, *numbers)
    return sealed(prefix + b"".join(sections))


def document(tensors: list[list[object]], model: dict[str, object] | None = None) -> bytes:
    header = {"vocab_size": 512, "context_tokens": 64, "model": model or {}}
    return json.dumps({"header": header, "tensors": tensors}).encode()


LARGEST_TABLE = document([["t", "stepped", [1024, 1040]]])
EMPTY_TABLES = document([[f"t{n}", "stepped", [0, 0]] for n in range(4096)])
LISTS = b'{"header":{"x":[' + b"[]," * (2**20 // 3 - 20) + b'[]]},"tensors":[]}'


@pytest.mark.parametrize("data", [LARGEST_TABLE, EMPTY_TABLES, LISTS], ids=["numbers", "tensors", "lists"])
def test_the_most_that_a_document_may_ask_for(sound: bytes, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(with_section(sound, 0, len(data), lzma_of(data)))
    cost = taken(lambda: use(tmp_path / "a"))
    assert cost.outcome == "ArtifactError" and cost.more_bytes <= MOST_BYTES and cost.seconds <= MOST_SECONDS, cost


@pytest.mark.parametrize(
    "model",
    [b"\n\0" * 2**20, b"\x12\0" * 2**20, b"\n\x04\n\x02ab" * 60_000, b"\n\xff\xff\xff\x7f", b"\x1a" + b"\xff" * 100],
    ids=["pieces", "parts", "same", "long", "endless"],
)
def test_the_most_that_a_tokenizer_may_ask_for(sound: bytes, tmp_path: Path, model: bytes) -> None:
    (tmp_path / "a").write_bytes(with_section(sound, 1, len(model), lzma_of(model)))
    cost = taken(lambda: use(tmp_path / "a"))
    assert cost.outcome == "ArtifactError" and cost.more_bytes <= MOST_BYTES and cost.seconds <= MOST_SECONDS, cost


@pytest.mark.parametrize(
    "field",
    ["layers", "width", "bigram_buckets", "mlp_hidden", "value_embedding_layers", "looped_layers", "lane_layers"],
)
def test_a_header_that_asks_for_a_larger_model_is_refused_first(sound: bytes, tmp_path: Path, field: str) -> None:
    (tmp_path / "sound").write_bytes(sound)
    found = artifact.read(tmp_path / "sound")
    for value in (2**14, 2**30, 10**30, 1.5, "2", None, [2], True):
        header = {**found.header, "model": {**found.header["model"], field: value}}
        changed = artifact.Artifact(header, found.tokenizer, found.tensors, found.sha256, found.n_bytes)
        cost = taken(lambda changed=changed: load_model(changed))
        assert cost.outcome == "ArtifactError" and cost.more_bytes <= MOST_BYTES and cost.seconds <= MOST_SECONDS, cost
