"""Bits by token and by document: they add up to the score, and each is where a slow count puts it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hedgemix.evaluate.breakdown import DOCUMENTS, TOKENS, Tally
from support import tiny_artifact
from support.text_data import processor


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_add_up_to_the_score_and_to_the_text(tmp_path: Path) -> None:
    case = tiny_artifact.make(tmp_path)
    result = case.score(trace=tmp_path / "run" / "trace.jsonl")
    counts = np.bincount(case.tokens[1:])
    for name in (TOKENS, DOCUMENTS):
        found = lines(tmp_path / "run" / name)
        assert sum(line["tokens"] for line in found) == result.scored_tokens
        assert sum(line["bytes"] for line in found) == result.scored_bytes
        for stage in ("quantized", "mixed", "ttt", "final"):
            bits = sum(line["bits"][stage] for line in found)
            assert bits / result.scored_bytes == pytest.approx(getattr(result, f"bpb_{stage}"), rel=1e-12)
    assert {line["token"]: line["tokens"] for line in lines(tmp_path / "run" / TOKENS)} == {
        token: count for token, count in enumerate(counts) if count
    }
    documents = lines(tmp_path / "run" / DOCUMENTS)
    assert [line["document"] for line in documents] == [0, 1, 2, 3]
    starts = [*np.flatnonzero(case.tokens == processor().bos_id()), len(case.tokens)]
    assert [line["tokens"] for line in documents] == [int(n) - (i == 0) for i, n in enumerate(np.diff(starts))]


def test_in_any_chunks_it_is_what_a_loop_counts(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    is_control = np.zeros(11, bool)
    is_control[1] = True
    tokens, sizes = generator.integers(0, 10, 200), generator.integers(0, 5, 200)
    nats = generator.uniform(0, 3, (2, 200))
    by_token: Any = defaultdict(lambda: np.zeros(4))
    by_document: Any = defaultdict(lambda: np.zeros(4))
    document = 0
    for at, token in enumerate(tokens):
        document += int(token == 1)
        for sums in (by_token[int(token)], by_document[document]):
            sums += [*nats[:, at], 1, sizes[at]]
    tally = Tally(("one", "two"), 11, is_control)
    for start, stop in ((0, 1), (1, 90), (90, 200)):
        tally.add(tokens[start:stop], sizes[start:stop], nats[:, start:stop])
        again = Tally(("one", "two"), 11, is_control)
        again.load_state_dict(tally.state_dict())
        tally = again
    tally.write(tmp_path)
    for name, key, told in ((TOKENS, "token", by_token), (DOCUMENTS, "document", by_document)):
        found = lines(tmp_path / name)
        assert [line[key] for line in found] == sorted(number for number, sums in told.items() if sums[2])
        for line in found:
            sums = told[line[key]]
            assert (line["tokens"], line["bytes"]) == (sums[2], sums[3])
            bits = {stage: nats / math.log(2) for stage, nats in zip(("one", "two"), sums, strict=False)}
            assert line["bits"] == pytest.approx(bits)
