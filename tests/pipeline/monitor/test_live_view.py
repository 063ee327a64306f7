"""What a terminal and a log show of seeds and of a study's variants."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from pipeline.monitor.live_view import StudyView, View, of_variant

DONE = {"stage": "done", "fraction": 1.0, "bpb": 1.25}
TRAINING = {"stage": "train", "fraction": 0.45, "step": 9, "loss_nats": 2.5, "tokens_per_second": 2e4}
FAILED = {"stage": "failed", "detail": "train: it broke"}
WAITING = {"stage": "waiting"}


def drawn(view: View) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=80).print(view.table())
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_a_variant_s_state_counts_its_seeds() -> None:
    told = of_variant(
        {1: DONE, 2: {**DONE, "bpb": 1.75}, 3: TRAINING, 4: FAILED, 5: WAITING, 6: {"stage": "starting x"}}
    )
    assert (told["stage"], told["bpb"]) == ("2/6 done, 1 failed", 1.5)
    assert told["at_work"] == "3: train 45 %, 6: starting x"
    assert "bpb" not in of_variant({1: WAITING}) and of_variant({1: WAITING})["stage"] == "0/1 done"


def test_a_study_is_a_line_a_variant_in_80_columns() -> None:
    view = StudyView(Console(file=io.StringIO()))
    view.update_seeds({"base": {1: DONE, 2: TRAINING}, "x" * 50: {1: FAILED, 2: WAITING}})
    head, base, long = drawn(view)
    assert head.split() == ["variant", "seeds", "bits/byte", "at", "work"]
    assert base.split() == ["base", "1/2", "done", "1.2500", "2:", "train", "45", "%"]
    assert long.startswith("x" * 25 + "…") and "0/2 done, 1 failed" in long


def lines(view: View, states: list[dict[Any, dict[str, Any]]]) -> list[str]:
    for state in states:
        view.update(state)
    assert isinstance(view.console.file, io.StringIO)
    return [line.split("] ", 1)[1] for line in view.console.file.getvalue().splitlines()]


def test_a_log_has_a_line_when_a_seed_s_stage_changes() -> None:
    view = View(Console(file=io.StringIO(), width=200))
    assert lines(view, [{1: WAITING, 2: WAITING}, {1: TRAINING}, {1: TRAINING}, {1: DONE}]) == [
        "seed 1: waiting",
        "seed 2: waiting",
        "seed 1: train   45 %  step 9, 2.500 nats/token, 20,000 tokens/s",
        "seed 1: done  100 %  1.2500 bits/byte",
    ]


def test_a_log_of_a_study_has_a_line_when_a_variant_s_counts_change() -> None:
    view = StudyView(Console(file=io.StringIO(), width=200))
    half, more, done = (
        of_variant(seeds) for seeds in ({1: DONE, 2: WAITING}, {1: DONE, 2: TRAINING}, {1: DONE, 2: DONE})
    )
    assert lines(view, [{"base": half}, {"base": more}, {"base": done}]) == [
        "base: 1/2 done  1.2500 bits/byte",
        "base: 2/2 done  1.2500 bits/byte",
    ]
