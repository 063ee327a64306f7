"""The benchmark suite: its arithmetic with a clock of our own, and all of it on sizes of a few seconds."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.plain import quantization as plain
from benchmarks.plain.evaluation import sliding_nats
from benchmarks.suite import launches, report, suite, timing
from benchmarks.suite.machine import Limits
from benchmarks.suite.setup import Row
from hedgemix.artifact.tensors import steps
from hedgemix.config import ModelConfig
from hedgemix.model.transformer import Model
from hedgemix.quantize import gptq


class Clock:
    """Shows what the work took that was done since."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def works(self, seconds: list[float], name: str, calls: list[str]) -> object:
        left = iter(seconds)

        def work() -> str:
            calls.append(name)
            self.now += next(left)
            return f"{name}{len(calls)}"

        return work


def test_pairs_alternate_and_the_warm_up_is_not_counted() -> None:
    clock, calls = Clock(), []
    a, b = clock.works([99, 2, 4, 6], "a", calls), clock.works([99, 1, 1, 2], "b", calls)
    found = timing.compare(a, b, repeats=3, warmup=1, clock=clock)
    assert "".join(calls) == "baabbaab"
    assert (found.a_seconds, found.b_seconds, found.ratio, found.repeats) == (4, 1, 4, 3)
    assert found.ratio_range == (2, 4)
    assert found.a_quartiles == (3, 5) and found.b_quartiles == (1, 1.5)
    assert found.results == ("a7", "b8")


def test_scaling_changes_the_baseline_alone() -> None:
    found = timing.summary([1.0, 2.0], [1.0, 1.0]).scaled(10)
    assert (found.a_seconds, found.b_seconds, found.ratio, found.ratio_range) == (15, 1, 15, (10, 20))


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        timing.compare(int, int, repeats=0)


def test_the_slower_of_work_and_traffic_is_the_limit() -> None:
    limits = Limits(float32=100.0, bfloat16=1000.0, bandwidth=10.0)
    assert limits.seconds(200, 10) == 2
    assert limits.seconds(200, 10, "bfloat16") == 1
    assert limits.seconds(200, 50) == 5


def test_the_published_algorithm_and_ours_round_alike() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 80), torch.randn(400, 80) * torch.logspace(0, -1, 80)
    hessian = x.mT @ x / 400
    back, _, _ = gptq.factor(hessian.clone(), 0.01, "w")
    row, column = steps(torch.full((24,), -8)), steps(torch.arange(80) % 8)
    ours = gptq.round_to_steps(weight[None], back[None], row[None], column[None], 32)[0]
    theirs = plain.quantize(weight, hessian, row, column, 0.01, 32)
    assert float((ours != theirs).float().mean()) <= 0.002
    assert not torch.equal(ours, (weight / row[:, None] / column).round().int())


def test_plain_windows_score_every_target_once_with_a_full_context() -> None:
    torch.manual_seed(0)
    config = ModelConfig(layers=2, width=32, heads=2, kv_heads=2, mlp_hidden=32, rope_dims=4)
    model = Model(config, 50, 16)
    tokens = torch.randint(50, (48,))
    model.requires_grad_(False)
    nats = sliding_nats(model, tokens, window=16, stride=4, batch_windows=3)
    assert nats.shape == (47,)
    for t in (5, 16, 17, 20, 30, 47):
        stop = 16 if t <= 16 else min(16 + 4 * -(-(t - 16) // 4), 47)
        window = tokens[max(0, stop - 16) : stop]
        row = model.logits(model.features(window[None]))[0].log_softmax(-1)[t - 1 - max(0, stop - 16)]
        assert float(nats[t - 1]) == pytest.approx(-float(row[tokens[t]]), abs=1e-4), t


@pytest.mark.soak
def test_a_gpus_rates_replace_assumptions_and_a_cpus_do_not(rows: list[Row]) -> None:
    limits = Limits(1e12, 2e12, 3e9)
    assert suite.rates_from(rows, limits, False, 5.0).measured == ("indexing", "coding")
    assumed = {"double", "link", "launch_seconds", "replay_seconds", "wait_seconds"}
    assert set(suite.rates_from(rows, limits, True, 5.0).assumed()) == assumed


def test_views_are_no_operations() -> None:
    x = torch.ones(4)
    assert launches.counted(lambda: (x[1:].view(3, 1) + 1).mul_(2)) == 2


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def rows(out: Path) -> list[Row]:
    return suite.main(suite.Options(device="cpu", quick=True, out=out))


@pytest.mark.soak
def test_every_stage_has_rows_that_agree(rows: list[Row]) -> None:
    assert list(dict.fromkeys(row.stage for row in rows)) == list(suite.STAGES)
    for row in rows:
        assert row.agrees, row
        assert row.agreement >= 0 and row.seconds > 0 and row.baseline_seconds > 0
        assert row.ratio_low <= row.ratio * (1 + 1e-9) and row.ratio_high >= row.ratio * (1 - 1e-9)
        assert row.limit_share == pytest.approx(row.limit_seconds / row.seconds)


@pytest.mark.soak
def test_the_table_has_every_field_and_the_machine(rows: list[Row], out: Path) -> None:
    frame = pd.read_parquet(out / "results.parquet")
    assert list(frame.columns[: len(fields(Row))]) == [field.name for field in fields(Row)]
    assert len(frame) == len(rows) and frame.agrees.all()
    assert json.loads(frame.machine[0])["torch"] == torch.__version__
    assert (frame.limit_bandwidth > 0).all()


@pytest.mark.soak
def test_markdown_says_what_the_rows_say(rows: list[Row], out: Path) -> None:
    parsed = report.parse(report.table(rows))
    assert parsed == [{head: report.cells(row)[name] for name, head in report.COLUMNS.items()} for row in rows]
    assert report.table(rows) in (out / "results.md").read_text()
    assert "No GPU figure was measured" in (out / "results.md").read_text()
    wrong = replace(rows[0], agreement=1e9)
    assert not wrong.agrees and "TOO MUCH" in report.table([wrong])


def test_documents_are_changed_between_their_markers_only(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("a\n<!-- bench:table -->\nold\n<!-- /bench:table -->\nz\n")
    for _ in range(2):
        report.update(path, "table", "new \\1")
    assert path.read_text() == "a\n<!-- bench:table -->\nnew \\1\n<!-- /bench:table -->\nz\n"
    with pytest.raises(ValueError, match="bench:plan"):
        report.update(path, "plan", "x")


@pytest.mark.parametrize(("name", "part"), [("README.md", "table"), ("docs/performance.md", "table"),
                                            ("docs/performance.md", "plan")])  # fmt: skip
def test_the_documents_have_the_markers(name: str, part: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.md"
    copy.write_text((suite.ROOT / name).read_text())
    report.update(copy, part, "text")


def test_an_unknown_stage_is_named() -> None:
    with pytest.raises(SystemExit, match="no stage 'mixng'"):
        suite.main(suite.Options(only=("mixng",)))
