"""Rates, momentum and quantization over a run, driven by hand instead of a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgemix.config import TrainConfig
from hedgemix.train.schedule import (
    elapsed_fraction,
    late_qat,
    looped,
    muon_momentum,
    pieces,
    rate_factor,
    step_kind,
    step_kinds,
)

CLOCK = TrainConfig(budget_seconds=120, reserve_seconds=20)
fractions = st.floats(0, 1)


def test_the_clock_decides_how_much_of_a_run_is_over() -> None:
    assert [elapsed_fraction(CLOCK, 12345, seconds) for seconds in (0, 25, 75, 100, 500)] == [0, 0.25, 0.75, 1, 1]


def test_steps_decide_when_their_number_is_fixed() -> None:
    config = TrainConfig(steps=8, budget_seconds=120, reserve_seconds=20)
    assert [elapsed_fraction(config, step, 1e9) for step in (0, 2, 7, 8, 9)] == [0, 0.25, 0.875, 1, 1]


def test_the_rate_is_constant_and_then_falls_linearly_to_zero() -> None:
    rates = [rate_factor(fraction, 0.5) for fraction in (0, 0.3, 0.5, 0.625, 0.75, 1)]
    assert rates == [1, 1, 1, 0.75, 0.5, 0]
    assert [rate_factor(fraction, 1.0) for fraction in (0, 0.25, 1)] == [1, 0.75, 0]
    assert rate_factor(0.999, 0.0) == rate_factor(1.0, 0.0) == 1


def test_the_rate_stops_falling_at_its_floor() -> None:
    assert [rate_factor(fraction, 0.5, 0.25) for fraction in (0, 0.5, 0.75, 0.875, 0.95, 1)] == [1, 1, 0.5] + [0.25] * 3
    assert rate_factor(1.0, 0.0, 0.25) == 1


@given(fractions, fractions, fractions, fractions)
def test_the_rate_never_rises(a: float, b: float, warmdown: float, floor: float) -> None:
    assert floor <= rate_factor(max(a, b), warmdown, floor) <= rate_factor(min(a, b), warmdown, floor) <= 1


def test_momentum_rises_linearly_and_stays() -> None:
    config = TrainConfig(muon_momentum_start=0.8, muon_momentum=0.96, muon_momentum_fraction=0.25)
    found = [muon_momentum(config, fraction) for fraction in (0, 0.125, 0.25, 0.6, 1)]
    assert found == pytest.approx([0.8, 0.88, 0.96, 0.96, 0.96])
    assert muon_momentum(TrainConfig(muon_momentum_fraction=0), 0) == TrainConfig().muon_momentum


def test_quantized_training_starts_below_its_rate() -> None:
    config = TrainConfig(late_qat=True, late_qat_below=0.5, warmdown_fraction=0.5)
    assert [late_qat(config, fraction) for fraction in (0, 0.5, 0.75, 0.76, 1)] == [False, False, False, True, True]
    assert not late_qat(TrainConfig(late_qat=False), 1)
    floored = TrainConfig(late_qat=True, late_qat_below=0.5, warmdown_fraction=0.5, rate_floor=0.4)
    assert [late_qat(floored, fraction) for fraction in (0, 0.75, 0.76, 1)] == [False, False, True, True]


def test_sequences_double_at_each_fraction() -> None:
    config = TrainConfig(growth_fractions=(0.1, 0.5))
    assert [pieces(config, fraction) for fraction in (0, 0.09, 0.1, 0.4, 0.5, 1)] == [4, 4, 2, 2, 1, 1]
    assert [pieces(TrainConfig(), fraction) for fraction in (0, 1)] == [1, 1]


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("qat", [False, True])
def test_a_warm_up_meets_every_kind_of_step_that_a_run_has(qat: bool, loops: bool) -> None:
    config = TrainConfig(late_qat=qat, growth_fractions=(0.1, 0.7), warmdown_fraction=0.6, loop_from_fraction=0.3)
    kinds = step_kinds(config, loops)
    met = {step_kind(config, loops, step / 100) for step in range(100)}
    assert met <= set(kinds) and len(set(kinds)) == len(kinds) == 3 * (1 + qat) * (1 + loops)
    assert len(met) == 3 + qat + loops
    assert step_kinds(TrainConfig(), False) == [(False, True, 1)]
    assert step_kinds(TrainConfig(late_qat=True), False) == [(False, True, 1), (True, True, 1)]


def test_the_loop_runs_from_its_fraction_on() -> None:
    config = TrainConfig(loop_from_fraction=0.35)
    assert [looped(config, fraction) for fraction in (0, 0.34, 0.35, 1)] == [False, False, True, True]
    assert looped(TrainConfig(loop_from_fraction=0), 0)


def test_the_default_run_is_the_references() -> None:
    """About 6,000 steps: momentum rises over 1,500, the rate falls over the last 3,500, 582 of 600 s are the loop's."""
    config = TrainConfig()
    assert elapsed_fraction(config, 0, 582) == 1 > elapsed_fraction(config, 0, 581)
    assert rate_factor(2500 / 6000, config.warmdown_fraction) == 1 > rate_factor(2550 / 6000, config.warmdown_fraction)
    assert muon_momentum(config, 1500 / 6000) == 0.99 > muon_momentum(config, 1490 / 6000)
