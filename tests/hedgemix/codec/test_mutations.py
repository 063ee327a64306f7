"""Coded files that are wrong inside are refused by CodecError, and reading them takes little memory and time.

HEDGEMIX_MUTATIONS sets how many (3,000 take some minutes)."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

from hedgemix.artifact import format as artifact
from hedgemix.artifact.format import Artifact
from hedgemix.codec import bounds, text_codec
from hedgemix.codec.text_codec import CodecError, compress_tokens, decompress_tokens
from hedgemix.data import tokenizer
from support import tiny_artifact
from support.mutations import MOST_BYTES, MOST_SECONDS, mutate_coded, sealed, taken
from support.text_data import processor
from support.tiny_artifact import CONFIG

COUNT = int(os.environ.get("HEDGEMIX_MUTATIONS", 60))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact.read(tiny_artifact.make(tmp_path_factory.mktemp("codec")).artifact)


@pytest.fixture(scope="module")
def coded(found: Artifact) -> bytes:
    return compress_tokens(found, np.array(tokenizer.encode(processor(), "a short text")), CONFIG).data


def test_what_is_wrong_inside_is_refused_and_costs_little(found: Artifact, coded: bytes) -> None:
    assert taken(lambda: decompress_tokens(found, coded)).outcome == ""
    outcomes: Counter[str] = Counter()
    most = [0.0, 0.0]
    for number in range(COUNT):
        changed = mutate_coded(coded, Random(number))
        cost = taken(partial(decompress_tokens, found, changed, force=number % 2 == 0))
        outcomes[cost.outcome] += 1
        assert cost.outcome in ("", "CodecError"), (number, cost)
        assert cost.more_bytes <= MOST_BYTES and cost.seconds <= MOST_SECONDS, (number, cost)
        most = [max(most[0], cost.more_bytes), max(most[1], cost.seconds)]
    print(f"{COUNT} coded files: {dict(outcomes)}; most {most[0] / 2**20:.1f} MiB, {most[1]:.2f} s")
    assert outcomes["CodecError"] > COUNT / 2


def changed(coded: bytes, fields: dict[int, int], evaluate: dict[str, Any]) -> bytes:
    """A coded file with other numbers in its prefix, and other settings."""
    prefix = list(text_codec.PREFIX.unpack_from(coded))
    start, length = text_codec.PREFIX.size, prefix[-1]
    settings = json.loads(zlib.decompress(coded[start : start + length]))
    for name, value in evaluate.items():
        part, _, field = name.rpartition(".")
        (settings["evaluate"][part] if part else settings["evaluate"])[field] = value
    packed = zlib.compress(json.dumps(settings).encode())
    for place, value in {**fields, len(prefix) - 1: len(packed)}.items():
        prefix[place] = value
    return sealed(text_codec.PREFIX.pack(*prefix) + packed + coded[start + length : -32])


TOTAL, SCHEDULE, FIRST = 5, 6, 7


@pytest.mark.parametrize(
    ("fields", "evaluate"),
    [
        ({SCHEDULE: 2**31 - 1}, {}),
        ({SCHEDULE: 2**31 - 1}, {"chunk_tokens": 1}),
        ({SCHEDULE: 2**31 - 1}, {"chunk_tokens": 2**30, "segment_tokens": 1024}),
        ({TOTAL: 2**30, SCHEDULE: 2**30}, {}),
        ({TOTAL: 256, SCHEDULE: 2**31 - 1}, {"chunk_tokens": 2**16}),
        ({FIRST: 512}, {}),
        ({FIRST: 65535}, {}),
        ({}, {"segment_tokens": 2**40}),
        ({}, {"cache.enabled": True, "cache.memory_tokens": 2**30}),
        ({}, {"mixer.block_tokens": 2**40}),
        ({}, {"mixer.entropy_sets": 2**30}),
        ({}, {"mixer.gates": ["none"] * 5000, "mixer.memory_tokens": [1.0] * 5000}),
        ({}, {"mixer.match_lengths": list(range(1, 4000))}),
        ({}, {"ttt.epochs": 2**40}),
        ({}, {"mixer.gates": ["what"]}),
        ({}, {"mixer": []}),
        ({}, {"dtype": "float8"}),
        ({}, {"order": 1}),
        ({}, {"ttt.rate": float("nan")}),
        ({}, {"window_tokens": 10**400}),
    ],
)  # fmt: skip
def test_no_number_asks_for_more_than_the_file_can_hold(
    found: Artifact, coded: bytes, fields: dict[int, int], evaluate: dict[str, Any]
) -> None:
    cost = taken(lambda: decompress_tokens(found, changed(coded, fields, evaluate), force=True))
    # Of a longer text these tokens would be the same beginning, as long as nothing was learned.
    expected = ("", "CodecError") if set(fields) == {SCHEDULE} else ("CodecError",)
    assert cost.outcome in expected and cost.more_bytes <= MOST_BYTES and cost.seconds <= MOST_SECONDS, cost


def test_a_text_that_costs_almost_nothing_comes_back_and_its_file_grows_with_it(found: Artifact) -> None:
    tokens = np.full(1500, 70)
    made = compress_tokens(found, tokens, CONFIG)
    assert made.payload_bits >= 32 * bounds.words_for(1500) > 0
    assert np.array_equal(decompress_tokens(found, made.data), tokens)
    cut = sealed(made.data[: -32 - 4 * (made.payload_bits // 32 - 2)])
    with pytest.raises(CodecError, match="1,500 tokens, more than its bytes can hold"):
        decompress_tokens(found, cut)


def test_every_switch_of_float_results_is_a_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    before = text_codec.conditions(CONFIG)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert text_codec.conditions(CONFIG)["environment"] == {**before["environment"], "MKL_CBWR": "COMPATIBLE"}
    monkeypatch.setattr(text_codec.torch, "get_float32_matmul_precision", lambda: "medium")
    assert text_codec.conditions(CONFIG)["matmul_precision"] == "medium" != before["matmul_precision"]
