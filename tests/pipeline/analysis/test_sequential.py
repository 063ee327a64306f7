"""When a study has seeds enough: error rates and power by simulation, and what is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.analysis import sequential
from pipeline.analysis.sequential import decide, levels

STUDIES = 20_000


def found_at(effect: float, first: int, looks: int, error_rate: float = 0.05) -> np.ndarray:
    """Simulate studies of differences with this mean in standard deviations, tested by scipy at every look: the look,
    from 0, at which each is decided, or `looks`."""
    drawn = np.random.default_rng(12345).normal(effect, 1.0, (STUDIES, first + looks - 1))
    counts = range(first, first + looks)
    p = np.stack([stats.ttest_1samp(drawn[:, :count], 0.0, axis=1).pvalue for count in counts], axis=1)
    holds = p <= np.array(levels(first, looks, error_rate))
    return np.where(holds.any(1), holds.argmax(1), looks)


@pytest.mark.parametrize(("first", "looks", "variants"), [(3, 8, 1), (3, 8, 7), (2, 4, 1)])
def test_looking_at_every_seed_errs_no_more_often_than_stated(first: int, looks: int, variants: int) -> None:
    rate = 0.05 / variants
    wrong = (found_at(0.0, first, looks, rate) < looks).mean()
    assert abs(wrong - rate) <= 3 * math.sqrt(rate * (1 - rate) / STUDIES)  # nor much less often: that costs seeds


def test_a_test_at_every_look_would_err_three_times_as_often() -> None:
    drawn = np.random.default_rng(1).normal(0.0, 1.0, (STUDIES, 10))
    p = np.stack([stats.ttest_1samp(drawn[:, :count], 0.0, axis=1).pvalue for count in range(3, 11)], axis=1)
    assert 0.16 < (p.min(1) <= 0.05).mean() < 0.18


def test_power_is_what_the_module_tells() -> None:
    large, middling = found_at(2.0, 3, 8), found_at(1.0, 3, 8)
    assert (large < 8).mean() > 0.99 and 5.3 < (3 + np.minimum(large, 7)).mean() < 5.5
    assert 0.66 < (middling < 8).mean() < 0.70
    assert 3.9 < (3 + np.minimum(found_at(4.0, 3, 8), 7)).mean() < 4.1


def test_one_look_is_students_test() -> None:
    assert levels(4, 1, 0.05)[0] == pytest.approx(0.05, rel=0.05)


def test_levels_grow_with_the_seeds_and_are_shared_by_variants() -> None:
    few = levels(3, 8, 0.05)
    assert list(few) == pytest.approx([few[0] / 3 * count for count in range(3, 11)])
    assert 0.05 / 8 < sum(few) / 8 < 0.05 and all(a < b / 5 for a, b in zip(levels(3, 8, 0.05 / 7), few, strict=True))
    early = levels(1, 3, 0.05)  # one look of three has seeds enough
    assert early[:2] == (0.0, 0.0) and early[2] == pytest.approx(0.05, rel=0.05)
    assert levels(-1, 5, 0.05) == (0.0, 0.0, 0.0, 0.0, pytest.approx(early[2]))


def test_a_clear_difference_is_decided_at_the_first_look() -> None:
    better = decide([-0.0020, -0.0021, -0.0019], look=1, looks=8, rule="decided")
    assert better.stop
    assert better.why == "decided: 0.0020 bits per byte better, p = 0.00083 after 3 seeds, at most 0.0057"
    worse = decide([0.0020, 0.0021, 0.0019], look=1, looks=8, rule="decided")
    assert worse.stop and "0.0020 bits per byte worse" in worse.why
    shared = decide([-0.0020, -0.0021, -0.0019], look=1, looks=8, rule="decided", variants=7)
    assert not shared.stop and shared.why == "p = 0.00083 after 3 seeds, above 0.00061"


def test_an_unclear_one_goes_on_until_the_last_look() -> None:
    values = [-0.001, 0.002, -0.003, 0.001, -0.002]
    going_on = decide(values, look=3, looks=8, rule="decided")
    assert not going_on.stop and going_on.why.startswith("p = 0.5")
    last = decide(values, look=8, looks=8, rule="decided")
    assert last.stop and last.why.startswith("undecided: p = 0.5") and "after 5 seeds" in last.why


def test_a_missing_seed_leaves_the_error_rate() -> None:
    """The seed of the second look fails: three again, and one fewer than planned from there on."""
    drawn = np.random.default_rng(7).normal(0.0, 1.0, (STUDIES, 9))
    p = np.stack([stats.ttest_1samp(drawn[:, :count], 0.0, axis=1).pvalue for count in range(3, 10)], axis=1)
    planned, then = levels(3, 8, 0.05), levels(2, 8, 0.05)
    wrong = ((p[:, 0] <= max(planned[0], then[1])) | (p <= np.array(then[1:])).any(1)).mean()
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)
    told = decide([-0.0020, -0.0023, -0.0017, -0.0026], look=3, looks=8, rule="decided").why
    assert told.endswith(f"at most {then[2]:.2g}")


def test_seeds_that_score_the_same_are_no_verdict() -> None:
    same = decide([0.0, 0.0, 0.0], look=1, looks=8, rule="decided")
    assert same.stop and same.why == "undecided: 3 seeds scored as the base's to the last digit"
    assert not decide([0.25, 0.25, 0.25], look=1, looks=8, rule="decided").stop  # no spread, so no p


def test_an_interval_is_narrow_enough_or_not() -> None:
    values = [-0.001, 0.001, 0.0, 0.002]
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert decide(values, look=2, looks=8, rule=half * 1.0001).stop
    wide = decide(values, look=2, looks=8, rule=half * 0.9999)
    assert not wide.stop and wide.why == f"half-width {half:.4f} bits per byte after 4 seeds, above {half * 0.9999:g}"
    last = decide(values, look=8, looks=8, rule=0.0001)
    assert last.stop and last.why.startswith("undecided: half-width")


@pytest.mark.parametrize("rule", [1.0, "decided"])
def test_two_seeds_decide_nothing(rule: sequential.Until) -> None:
    early, last = (decide([-0.5, -0.51], look=look, looks=2, rule=rule) for look in (1, 2))
    assert not early.stop and last.stop and last.why.startswith("undecided: 2 seeds in common")
    assert not decide([], look=1, looks=2, rule=rule).stop


@pytest.mark.parametrize(
    ("differences", "options", "expected"),
    [
        ([0.1, 0.2, 0.3], {"look": 0}, "count from 1"),
        ([0.1, 0.2, 0.3], {"look": 4}, "count from 1"),
        ([0.1, 0.2, 0.3], {"variants": 0}, "count from 1"),
        ([0.1, math.nan, 0.3], {}, "not finite"),
        ([0.1, 0.2, 0.3], {"rule": 0.0}, "no half-width"),
        ([0.1, 0.2, 0.3], {"rule": math.nan}, "no half-width"),
    ],
)
def test_what_is_no_question_is_refused(differences: list[float], options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        decide(differences, **{"look": 1, "looks": 3, "rule": 0.1, **options})


def test_a_verdict_is_read_back_from_what_was_said() -> None:
    better, worse = [-0.0020, -0.0021, -0.0019], [0.0020, 0.0021, 0.0019]
    unclear, same, few = [-0.001, 0.002, -0.003], [0.0, 0.0, 0.0], [-0.5, -0.51]

    def read(differences: list[float], rule: sequential.Until = "decided", look: int = 1) -> str | None:
        return sequential.verdict(decide(differences, look=look, looks=8, rule=rule).why)

    assert (read(better), read(worse)) == ("better", "worse")
    assert {read(each, look=look) for each in (unclear, same, few) for look in (1, 8)} == {"not decided"}
    assert {read(each, 0.001, look) for each in (better, unclear) for look in (1, 8)} == {None}
    assert sequential.verdict("") is None
