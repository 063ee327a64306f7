"""What is said of a study's variants: pairs, intervals, Holm's p, the word; and what cannot be said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.analysis import significance, study, verdicts
from pipeline.analysis.verdicts import Finding
from support import table_rows

BASE = [1.2946, 1.2900, 1.2942]
SETTING: dict[str, Any] = {"evaluate.ttt.rate": 0.0001}


def findings(runs: Path, **variants: list[float]) -> dict[str, Finding]:
    """The findings on variants with these scores, the best first."""
    table_rows.study(runs, BASE, {name: (SETTING, scores) for name, scores in variants.items()})
    return {each.variant.name: each for each in verdicts.findings(study.load(str(runs)))}


def stopped(runs: Path, **whys: str) -> dict[str, Finding]:
    """The findings once a rule stopped these variants."""
    told = {name: {"seeds": 3, "why": why} for name, why in whys.items()}
    (runs / "_studies" / "rates" / "stopped.json").write_text(json.dumps(told))
    return {each.variant.name: each for each in verdicts.findings(study.load(str(runs)))}


def test_variants_are_paired_with_the_base_and_corrected_for_being_many(tmp_path: Path) -> None:
    better, worse, luck = [1.2926, 1.2881, 1.2921], [1.3035, 1.2993, 1.3030], [1.2950, 1.2890, 1.2951]
    found = findings(tmp_path, luck=luck, worse=worse, better=better)
    assert [(name, each.word) for name, each in found.items()] == [
        ("better", "better"), ("luck", "not decided"), ("worse", "worse")
    ]  # fmt: skip
    ps = {name: stats.ttest_rel(scores, BASE).pvalue for name, scores in (("better", better), ("worse", worse))}
    sample = found["better"].sample
    assert sample and sample.mean == pytest.approx(-0.0020, abs=1e-9)
    interval = stats.ttest_rel(better, BASE).confidence_interval()
    assert (sample.low, sample.high) == pytest.approx((interval.low, interval.high))
    assert found["better"].p == pytest.approx(ps["better"]) and found["worse"].p == pytest.approx(ps["worse"])
    first, second = sorted(ps, key=lambda name: ps[name])
    assert found[first].p_holm == pytest.approx(3 * ps[first])
    assert found[second].p_holm == pytest.approx(max(3 * ps[first], 2 * ps[second]))
    said = verdicts.sentence(found["better"])
    assert said.startswith("`better` is better: -0.0020 bits per byte in 3 seeds, 95 % interval -0.00")
    assert said.endswith(f"p = {verdicts.format_p(ps['better'])}, as one of these variants 0.002.")
    assert verdicts.sentence(found["luck"]).endswith(
        "p = 0.877, as one of these variants 0.877."
    )  # no 1,000 seeds would
    lead = verdicts.headline(study.load(str(tmp_path)), list(found.values()))
    assert lead == [said, "3 variants: 1 better, 1 worse, 1 not decided."]


def test_what_one_variant_alone_would_show_seven_do_not(tmp_path: Path) -> None:
    clear, luck = [1.2926, 1.2883, 1.2917], [1.2950, 1.2890, 1.2951]
    alone = findings(tmp_path / "one", clear=clear)["clear"]
    among = findings(tmp_path / "seven", clear=clear, **{f"luck-{n}": luck for n in range(6)})["clear"]
    assert 0.05 / 7 < alone.p == among.p < 0.05 and (alone.word, among.word) == ("better", "not decided")
    assert among.p_holm == pytest.approx(7 * alone.p) and among.needed and among.needed > 3


def test_the_seeds_that_would_decide_it_do(tmp_path: Path) -> None:
    """In four of five simulated studies of so many seeds, and in fewer of one seed less."""
    found = findings(tmp_path, luck=[1.2940, 1.2905, 1.2925])["luck"]
    assert found.needed and found.sample
    assert f"about {found.needed} seeds would decide it" in verdicts.sentence(found)
    drawn = np.random.default_rng(0).normal(found.sample.mean, found.sample.deviation, (20_000, found.needed))
    for count, enough in ((found.needed, True), (found.needed - 1, False)):
        share = (stats.ttest_1samp(drawn[:, :count], 0.0, axis=1).pvalue < 0.05).mean()
        assert (share >= 0.8) == enough


def test_the_fields_rules_hold_by_their_margins(tmp_path: Path) -> None:
    scale = significance.nats_per_bit(table_rows.made_up())
    by = 0.006 / scale
    found = findings(
        tmp_path, record=[BASE[0] - by, BASE[1] - 1.01 * by, BASE[2] - 0.99 * by], row=[x - 0.0005 for x in BASE[:2]]
        + [BASE[2] - 0.0004], neither=[x + 0.001 for x in BASE],
    )  # fmt: skip
    assert found["record"].holds == (True, True) and found["row"].holds == (False, True)
    assert found["neither"].holds == (False, False)


def test_only_seeds_that_both_finished_are_paired(tmp_path: Path) -> None:
    findings(tmp_path, some=[1.29, 1.28, 1.27, 1.26])
    table_rows.change(tmp_path, "rates-some", 2, status="failed", error="train: it broke", bpb_final=None)
    [found] = verdicts.findings(study.load(str(tmp_path)))
    assert set(found.differences) == {1, 3} and found.seeds() == "3 of 4"
    assert found.differences[1] == pytest.approx(1.29 - BASE[0])
    assert found.mean("bpb_final") == pytest.approx((1.29 + 1.27 + 1.26) / 3)
    assert verdicts.gaps(study.load(str(tmp_path))) == ["some, seed 2 failed: train: it broke"]
    for seed in (1, 4):
        table_rows.change(tmp_path, "rates-some", seed, status="pending", bpb_final=None)
    assert sorted(verdicts.gaps(study.load(str(tmp_path)))) == [
        "some, seed 2 failed: train: it broke",
        "some, seeds 1, 4 pending: not finished",
    ]


def test_what_is_missing_is_told_and_nothing_computed_of_it(tmp_path: Path) -> None:
    found = findings(tmp_path, none=[], one=[1.29], sound=[1.2926, 1.2881, 1.2921], failed=[1.2])
    table_rows.change(tmp_path, "rates-failed", 1, status="failed", error="evaluate: out of memory", bpb_final=None)
    loaded = study.load(str(tmp_path))
    found = {each.variant.name: each for each in verdicts.findings(loaded)}
    assert [*found][-2:] == ["failed", "none"]  # last, by name
    said = {name: verdicts.sentence(each) for name, each in found.items()}
    assert said["none"] == "`none` is not compared: it has no table yet."
    assert said["failed"] == "`failed` is not compared: record rates-failed has no finished seed."
    assert said["one"] == "`one` is not decided: -0.0046 bits per byte in 1 seed; one pair tells no spread."
    assert math.isnan(found["one"].p_holm) and math.isnan(found["none"].mean("bpb_final"))
    assert found["sound"].p_holm == pytest.approx(4 * found["sound"].p)  # three tests are still to come
    assert verdicts.gaps(loaded) == ["none: no table yet", "failed, seed 1 failed: evaluate: out of memory"]
    assert (
        verdicts.headline(loaded, list(found.values()))[-1] == "Not all of it is done: none: no table yet, and 1 more."
    )


def test_a_base_without_seeds_compares_nothing(tmp_path: Path) -> None:
    findings(tmp_path, sound=[1.2926, 1.2881, 1.2921])
    (tmp_path / "rates-base.parquet").unlink()
    [found] = verdicts.findings(study.load(str(tmp_path)))
    assert found.word == "not compared" and "record rates-base has no finished seed" in verdicts.sentence(found)
    assert verdicts.headline(study.load(str(tmp_path)), [found])[0].startswith("No variant is found better")


def test_seeds_of_other_numbers_make_no_pair(tmp_path: Path) -> None:
    findings(tmp_path, sound=[1.2926, 1.2881, 1.2921])
    for seed in (1, 2, 3):
        table_rows.change(tmp_path, "rates-base", seed, status="pending", bpb_final=None)
    table_rows.write(tmp_path, "rates-base", [0, 0, 0, 1.3], table_rows.made_up(), status="pending", bpb_final=None)
    table_rows.change(tmp_path, "rates-base", 4, status="done", bpb_final=1.3)
    [found] = verdicts.findings(study.load(str(tmp_path)))
    assert verdicts.sentence(found) == "`sound` is not compared: no seed is done of both it and the base."


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"valid_sha256": "f" * 64, "valid_bytes": 7}, "they scored different texts"),
        (table_rows.setting({"limits.total_bytes": 16_000_000}), "other limits: limits.total_bytes 16000000"),
    ],
)
def test_other_texts_and_limits_are_refused(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    findings(tmp_path, other=[1.2, 1.2, 1.2], sound=[1.2926, 1.2881, 1.2921])
    for seed in (1, 2, 3):
        table_rows.change(tmp_path, "rates-other", seed, **values)
    sound, other = verdicts.findings(study.load(str(tmp_path)))
    assert other.word == "not compared" and expected in verdicts.sentence(other) and other.differences == {}
    assert sound.word == "better" and other.mean("bpb_final") == pytest.approx(1.2)


def test_a_variant_of_two_machines_is_refused_and_of_another_one_remarked(tmp_path: Path) -> None:
    found = findings(tmp_path, moved=[1.2926, 1.2881, 1.2921])
    for seed in (1, 2):
        table_rows.change(tmp_path, "rates-moved", seed, hardware="another")
    loaded = study.load(str(tmp_path))
    [mixed] = verdicts.findings(loaded)
    assert mixed.word == "not compared" and "different hardware" in mixed.why_not
    table_rows.change(tmp_path, "rates-moved", 3, hardware="another")
    loaded = study.load(str(tmp_path))
    [found["moved"]] = verdicts.findings(loaded)
    assert found["moved"].word == "better"
    assert verdicts.remarks(loaded, list(found.values())) == [
        "moved: different hardware: another and a processor of the base"
    ]


def test_where_seeds_were_added_until_decided_the_word_is_that_tests(tmp_path: Path) -> None:
    """Its p, looked at again and again, is not corrected by Holm, and counts among those that are."""
    before = findings(tmp_path, one=[1.2926, 1.2881, 1.2921], other=[1.2926, 1.2883, 1.2917])
    assert [each.word for each in before.values()] == ["better", "better"]
    why = "undecided: p = 0.0081 after 3 seeds, above 0.0057"
    found = stopped(tmp_path, other=why)
    assert found["other"].word == "not decided" and math.isnan(found["other"].p_holm)
    assert verdicts.sentence(found["other"]).endswith(f"seeds were added until: {why}.")
    assert found["one"].p_holm == pytest.approx(2 * found["one"].p) and found["one"].word == "better"
    found = stopped(tmp_path, one="decided: 0.0020 bits per byte better, p = 0.0001 after 3 seeds, at most 0.0028")
    assert found["one"].word == "better" and math.isnan(found["one"].p_holm)


def test_where_seeds_were_added_for_the_interval_the_word_is_holms(tmp_path: Path) -> None:
    findings(tmp_path, one=[1.2926, 1.2881, 1.2921])
    found = stopped(tmp_path, one="half-width 0.0002 bits per byte after 3 seeds, at most 0.002")["one"]
    assert found.word == "better" and found.p_holm == found.p
    assert verdicts.sentence(found).endswith("until: half-width 0.0002 bits per byte after 3 seeds, at most 0.002.")


def test_fields_are_written_as_options_are(tmp_path: Path) -> None:
    fields = {"model.xsa": False, "evaluate.mixer.orders": [1, 2], "data.seed": None, "evaluate.ttt.rate": 0.0001}
    told = "model.xsa false, evaluate.mixer.orders 1 2, data.seed none, evaluate.ttt.rate 0.0001"
    assert verdicts.format_fields(fields) == told
