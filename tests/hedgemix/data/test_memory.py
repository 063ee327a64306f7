"""What an artifact remembers of its training text: documents in, the same documents and tokens out."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.data import memory, shards, tokenizer
from hedgemix.data.memory import Memory, MemoryTextError
from support.text_data import TEXTS, documents, processor


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS.filter(bool), min_size=1, max_size=5))
def test_documents_come_back(texts: list[str]) -> None:
    assert memory.decompress(memory.compress(texts)) == texts


def test_the_same_documents_give_the_same_bytes() -> None:
    """Golden: another version of the compressor, or other settings of it, could not read what is there."""
    assert memory.compress(["abracadabra", "abracadabra!"]) == Memory(24, bytes.fromhex(GOLDEN))


GOLDEN = "61037c120ce513af4a043a0abb8d8600"


@pytest.mark.parametrize("most", [200, 5_000, 20_000, 10**9])
def test_as_many_documents_as_fit(most: int) -> None:
    """Against compressing every number of documents."""
    texts = [text[:1500] for text in documents()[:60]]
    sizes = [len(memory.compress(texts[:n]).data) for n in range(1, len(texts) + 1)]
    fitting = texts[: sum(size <= most for size in sizes)]
    assert memory.choose(texts, most) == (fitting, memory.compress(fitting) if fitting else None)
    assert all(more >= fewer for fewer, more in pairwise(sizes))


def test_its_text_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGEST_TEXT", 2_500)
    assert memory.choose(["a" * 999] * 3, 10**6)[0] == ["a" * 999] * 2
    with pytest.raises(MemoryTextError, match="it declares 2,999 bytes of text, of at most 2,500"):
        memory.decompress(memory.compress(["a" * 999] * 3))


def test_damage_is_found_or_harmless() -> None:
    """A stream has no checksum of its own (the artifact has): what is wrong in it is refused, or another text of the
    declared length."""
    whole, draw = memory.compress(documents()[:20]), random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole.data)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            found = memory.decompress(Memory(whole.text_bytes, bytes(data[: draw.choice([len(data), len(data) // 2])])))
            assert sum(len(each.encode()) + 1 for each in found) - 1 == whole.text_bytes
        except MemoryTextError:
            refused += 1
    assert refused > 30


def test_tokens_are_those_of_training() -> None:
    texts = documents()[:5]
    expected = [token for text in texts for token in tokenizer.encode(processor(), text)]
    found = memory.tokens(processor(), texts)
    assert found.tolist() == expected and found.dtype == np.uint16
    assert memory.tokens(processor(), []).tolist() == []


def test_documents_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that begin in the stream, whatever pieces it is read in; the cut-off beginning of one that cuts a
    character in two is no text."""
    monkeypatch.setattr(shards, "PIECE_TOKENS", 100)
    texts = ["Größe \U0001f600 " + text[:300] for text in documents()[:6]]
    tokens = memory.tokens(processor(), texts)
    assert list(memory.shard_documents(processor(), shards.TokenStream([tokens[:350], tokens[350:]]))) == texts
    emoji = [processor().piece_to_id(f"<0x{byte:02X}>") for byte in "\U0001f600".encode()[1:]]
    cut = np.concatenate([np.array(emoji, np.uint16), tokens])
    assert list(memory.shard_documents(processor(), shards.TokenStream([cut]))) == texts


def test_a_memory_on_disk(tmp_path: Path) -> None:
    told: list[str] = []
    found = memory.write(documents(), 5_000, processor(), tmp_path, told.append)
    written = (tmp_path / "memory.ppmd").read_bytes()
    texts = memory.decompress(Memory(found["memory_text_bytes"], written))
    assert 4_000 < len(written) == found["memory_bytes"] <= 5_000
    assert texts == list(documents()[: found["memory_documents"]])
    assert found["memory_tokens"] == len(memory.tokens(processor(), texts))
    assert told == [
        f"memory: {len(texts)} training documents, {found['memory_tokens']:,} tokens, in {len(written):,} bytes"
    ]
    assert memory.write(documents(), 0, processor(), tmp_path / "none", told.append) == {}
    assert not (tmp_path / "none").exists()
    with pytest.raises(RecipeError, match="memory_bytes 3 holds not one training document"):
        memory.write(documents(), 3, processor(), tmp_path, told.append)
