"""Which seeds a study runs: a sequence that anyone can tell in advance, more of it for what is undecided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hedgemix.recipes import RECIPES
from pipeline.results.schema import Row
from pipeline.study.definition import Study, StudyRecord
from pipeline.study.seeds import Seeds, differences, first_seeds, same_text

BASE = RECIPES["laptop"]()
STUDY = Study("s", (StudyRecord("s", "base", BASE), StudyRecord("s-a", "a", BASE), StudyRecord("s-b", "b", BASE)))


def row(seed: int, score: float | None, text: str = "t", **columns: Any) -> Row:
    status = "failed" if score is None else "done"
    return Row("s", "laptop", "0", seed, status, bpb_final=score, valid_sha256=text, **columns)


def test_seeds_after_the_declared_are_the_smallest_unused() -> None:
    assert first_seeds((1337, 42, 7), 3) == (1337, 42, 7) and first_seeds((1337, 42, 7), 2) == (1337, 42)
    assert first_seeds((1337, 2, 7), 9) == (1337, 2, 7, 1, 3, 4, 5, 6, 8)


def test_differences_are_of_seeds_that_both_finished() -> None:
    base = [row(1, 1.5), row(2, None), row(3, 1.25), row(4, 1.0)]
    assert differences([row(3, 1.5), row(1, 1.25), row(2, 1.0), row(5, 1.0)], base) == [0.25, -0.25]
    assert differences([row(1, 1.0, "other")], base) == []


def test_one_text_in_other_tokens_is_the_same_text() -> None:
    mine = row(1, 1.0, "a", text_sha256="x", valid_bytes=5)
    assert same_text(mine, replace(mine, valid_sha256="b"))
    assert not same_text(mine, replace(mine, valid_sha256="b", valid_bytes=6))
    assert not same_text(row(1, 1.0, "a"), row(1, 1.0, "b"))  # shards: no documents are known


class Scores:
    """Runs a study's rounds on scores that are given: the base's are 1, a variant's 1 and its difference by seed."""

    def __init__(self, seeds: Seeds, **scores: Sequence[float]) -> None:
        self.seeds, self.rounds = seeds, [seeds.now()]
        rows: dict[str, list[Row]] = {}
        while True:
            for name, now in self.rounds[-1].items():
                given = scores.get(name.removeprefix("s-"), [0.0] * 99)
                rows[name] = [row(seed, 1.0 + given[at]) for at, seed in enumerate(now)]
            if not seeds.more(rows):
                break
            self.rounds.append(seeds.now())


def test_without_a_rule_there_is_one_round() -> None:
    done = Scores(Seeds(STUDY, (5, 6), None, 10))
    assert done.rounds == [dict.fromkeys(("s", "s-a", "s-b"), (5, 6))] and not done.seeds.stopped


def test_only_the_undecided_variant_and_the_base_get_more_seeds() -> None:
    wide = [0.1 * (-1) ** n for n in range(9)]
    done = Scores(Seeds(STUDY, (5, 6, 7), 0.01, 5), a=[0.5] * 9, b=wide)
    assert done.rounds == [
        dict.fromkeys(("s", "s-a", "s-b"), (5, 6, 7)),
        dict.fromkeys(("s", "s-b"), (5, 6, 7, 1)),
        dict.fromkeys(("s", "s-b"), (5, 6, 7, 1, 2)),
    ]
    stopped = done.seeds.stopped
    assert stopped["a"] == {"seeds": 3, "why": "half-width 0.0000 bits per byte after 3 seeds, at most 0.01"}
    assert stopped["b"]["seeds"] == 5 and stopped["b"]["why"].startswith("undecided: half-width ")


def test_a_study_stops_when_it_is_decided() -> None:
    clear = [-0.1, -0.1001, -0.0999, -0.1002, -0.1, -0.1]
    done = Scores(Seeds(STUDY, (1, 2, 3), "decided", 6), a=clear, b=clear)
    assert len(done.rounds) == 1
    assert all(each["why"].startswith("decided: 0.1000 bits per byte better") for each in done.seeds.stopped.values())


@pytest.mark.parametrize(
    ("mine", "base", "why"),
    [
        ([row(1, 1.0), row(2, None)], [row(1, 1.0), row(2, 1.0)], "undecided: seed 2 failed"),
        ([row(1, 1.0), row(2, 1.0)], [row(1, None), row(2, 1.0)], "undecided: the base's seed 1 failed"),
        ([row(1, 1.0, "x")], [row(1, 1.0, "y")], "undecided: it scored another text than the base"),
    ],
)
def test_nothing_is_added_where_it_would_decide_nothing(mine: list[Row], base: list[Row], why: str) -> None:
    seeds = Seeds(Study("s", STUDY.records[:2]), (1, 2), "decided", 10)
    assert not seeds.more({"s": base, "s-a": mine})
    assert seeds.stopped == {"a": {"seeds": len(mine), "why": why}}
