"""Limits, and validation text among the training text: caught wherever it hides."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_tokenizer
from hedgemix.audit import limits
from hedgemix.audit.claim import Claim
from hedgemix.config import LimitsConfig
from hedgemix.data import bpb, shards
from hedgemix.data import dataset as datasets
from hedgemix.data.shards import map_shard
from hedgemix.standalone import script
from support.text_data import documents
from support.tiny_run import Record, make


@pytest.fixture
def sound(made: Record, tmp_path: Path) -> Claim:
    """A claim whose training shards may be spoiled; the hashes follow."""
    folder = shutil.copytree(made.folder / "_steps" / "data-0", tmp_path / "data")
    return replace(made.claim(), dataset=datasets.load(folder))


def test_bytes_are_counted_from_the_file_and_the_code(sound: Claim) -> None:
    found = limits.check_limits(sound)
    total = sound.artifact.stat().st_size + script.n_bytes(sound.recipe)
    assert found.passed and f"{total:,} of 300,000 bytes" in found.headline

    def limited(**fields: float) -> Claim:
        return replace(sound, recipe=replace(sound.recipe, limits=LimitsConfig(**fields)))  # type: ignore[arg-type]

    # The recipe is in the file that counts, so another limit changes it by some bytes.
    assert limits.check_limits(limited(total_bytes=total + 100)).passed
    for fields, message in (
        ({"total_bytes": total - 50}, f"bytes, the recipe allows {total - 50:,}"),
        ({"train_seconds": 0.5}, "1.0 training seconds"),
        ({"evaluate_seconds": 0.001}, "evaluation seconds"),
    ):
        found = limits.check_limits(limited(**fields))
        assert not found.passed and message in found.headline
    found = limits.check_limits(replace(sound, row={**sound.row, "artifact_bytes": 5}))
    assert not found.passed and "the row says 5" in found.headline


def place(claim: Claim, number: int) -> Path:
    return Path(claim.dataset.train_shards[number])


def copied(claim: Claim) -> None:
    shutil.copy(claim.dataset.valid_shards[0], place(claim, 1))


def linked(claim: Claim) -> None:
    place(claim, 1).unlink()
    os.link(claim.dataset.valid_shards[0], place(claim, 1))


def hidden(claim: Claim) -> None:
    """The validation text somewhere inside a longer shard."""
    old, text = map_shard(place(claim, 1)), map_shard(claim.dataset.valid_shards[0])
    shards.write_shard(place(claim, 1), np.concatenate([old[:333], text, old[333:]]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(copied, "is validation shard val_000000.bin"), (linked, "is validation shard val_000000.bin"), (hidden, "100%")],
)
def test_training_on_the_validation_text_is_caught(sound: Claim, spoil: Callable[[Claim], None], message: str) -> None:
    found = limits.unseen(sound, 200, 0)
    assert found.passed and found.figures["windows"] > 190 and found.figures["windows_in_training_text"] == 0
    assert found.figures["documents"] == found.figures["documents_without"] > 0
    spoil(sound)
    digest = datasets.edges_sha256(Path(shard) for shard in sound.dataset.train_shards)
    spoiled = replace(
        sound, row={**sound.row, "train_sha256": digest}, dataset=replace(sound.dataset, train_sha256=digest)
    )
    found = limits.unseen(spoiled, 200, 0)
    assert not found.passed and message in found.headline and found.figures["largest_share_of_a_shard"] == 1


def test_a_little_in_common_is_told_and_passes(sound: Claim) -> None:
    old, text = map_shard(place(sound, 1)), map_shard(sound.dataset.valid_shards[0])
    shards.write_shard(place(sound, 1), np.concatenate([text[: len(text) // 4], old[len(text) // 4 :]]))
    digest = datasets.edges_sha256(Path(shard) for shard in sound.dataset.train_shards)
    row = {**sound.row, "train_sha256": digest}
    found = limits.unseen(replace(sound, row=row, dataset=replace(sound.dataset, train_sha256=digest)), 200, 0)
    assert found.passed and 0.1 < found.figures["largest_share_of_a_shard"] < 0.3
    assert found.figures["documents_without"] < found.figures["documents"]


def test_documents_without_anything_known_are_scored_beside_all(sound: Claim) -> None:
    """The training text has the first documents; what they cost is not in the score of the others."""
    tokens = np.array(map_shard(sound.dataset.valid_shards[0]))
    bos = int(tokens[0])
    tokens[701:] = np.random.default_rng(0).permutation(tokens[701:])
    tokens[700] = bos
    shards.write_shard(Path(sound.dataset.valid_shards[0]), tokens)
    shards.write_shard(place(sound, 1), tokens[:700])
    charged = np.where(np.arange(len(tokens)) < 700, 1.0, 3.0)
    processor = load_tokenizer(artifact.read(sound.artifact))
    found = limits.by_document(sound, processor, charged)
    tables = bpb.byte_tables(processor)
    begins = np.flatnonzero(tokens == bos)
    assert found["documents"] == len(begins) and found["documents_without"] == (begins >= 700).sum() > 0
    assert found["documents_mostly_known"] == (begins < 700).sum() > 0
    n_bytes = bpb.count_bytes(tables, tokens[699:])
    assert found["bpb_of_documents_without"] == bpb.bits_per_byte(3.0 * (len(tokens) - 700), n_bytes)
    assert found["bpb_of_all"] < found["bpb_of_documents_without"]
    assert limits.by_document(sound, processor, None)["bpb_of_all"] is None


def test_validation_text_in_the_memory_is_caught(tmp_path: Path) -> None:
    """Though it is in no training shard."""
    texts = ["Gr\u00f6\u00dfe \u2581 \U0001f600\n" + text[:800] for text in documents()[10:14]]
    remembering = make(tmp_path / "runs", remembered=texts[:3]).claim()
    found = limits.unseen(remembering, 200, 0)
    assert not found.passed and "occur in the training text or the memory" in found.headline
    assert found.figures["windows_in_memory"] == found.figures["windows_in_training_text"] > 100


@pytest.mark.parametrize("name", ["valid_sha256", "train_sha256", "tokenizer_sha256"])
def test_other_texts_than_the_rows_are_caught(sound: Claim, name: str) -> None:
    found = limits.unseen(replace(sound, row={**sound.row, name: "0" * 64}), 10, 0)
    assert not found.passed and f"{name} is " in found.headline and "the row says 000" in found.headline
