"""The plots of a study: what they average, show and cut short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.analysis.significance import summary
from pipeline.report import study_figures


def test_a_mean_curve_is_the_mean_at_equal_seconds() -> None:
    def log(rate: float, stop: int) -> list[dict[str, Any]]:
        return [{"elapsed_seconds": 0.5 * n, "loss_nats": 5 - rate * n} for n in range(stop)]

    seconds, nats = study_figures.mean_curve([log(0.01, 41), log(0.03, 61)])
    assert (seconds[0], seconds[-1]) == (0.0, 20.0)  # as far as the shorter goes
    assert nats == pytest.approx(5 - 0.02 * seconds / 0.5)


def test_an_interval_that_dwarfs_the_others_is_cut_short() -> None:
    narrow = summary([0.001, 0.002, 0.003])
    wide = summary([0.0, 0.1])
    low, high = study_figures.sight([narrow, narrow, wide])
    assert low < narrow.low and wide.low < low and wide.mean < high < wide.high
    assert study_figures.sight([narrow])[1] == pytest.approx(narrow.high, rel=0.1)
    one = summary([0.0])
    assert study_figures.sight([one])[0] < 0 < study_figures.sight([one])[1]
    drawn = study_figures.differences({"a": narrow, "b": narrow, "c": wide}, {"a": "worse", "b": "x", "c": "x"}, 0.0001)
    assert "var(--s7" in drawn and "var(--s8" in drawn


@pytest.mark.parametrize("name", ["short", "a-name-of-more-than-twenty-six-characters", "x" * 200])
def test_names_on_an_axis_take_two_lines_at_most(name: str) -> None:
    lines = study_figures.wrapped(name).splitlines()
    assert len(lines) <= 2 and max(map(len, lines)) <= 26 and ("…" in lines[-1]) == (len(name) > 52)


def test_many_variants_are_drawn_though_colours_are_few() -> None:
    logs = [[{"elapsed_seconds": float(n), "loss_nats": 5.0 - n / 10} for n in range(10)]]
    text = study_figures.learning({f"variant-{n}": logs for n in range(12)})
    assert all(f">variant-{n}<" in text for n in range(12)) and "stroke-dasharray" in text
    assert np.isfinite(study_figures.padded(np.zeros(3))).all()
