"""The report of a study: page and twin, with variants in every state."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline import cli
from pipeline.analysis import study, verdicts
from pipeline.report import study_page
from pipeline.report.page import Plot, html
from support import table_rows

BASE = [1.2946, 1.2900, 1.2942]
BETTER = [1.2926, 1.2881, 1.2921]
VARIANTS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "worse": ({"model.xsa": False}, [1.3035, 1.2993, 1.3030]),
    "better": ({"evaluate.ttt.rate": 0.0001}, BETTER),
    "one": ({"evaluate.ttt.rate": 0.0003}, [1.29]),
    "none": ({"model.layers": 12}, []),
    "a $x_{ <b>": ({"evaluate.chunk_tokens": 1}, [1.2950, 1.2890, 1.2951]),
}


def train(runs: Path, variant: str, slower: float = 0.0) -> None:
    """Give each seed of the variant a training of its own, with its log."""
    for seed in (1, 2, 3):
        folder = runs / "_steps" / f"train-{variant}-{seed}"
        folder.mkdir(parents=True)
        lines = [
            {"elapsed_seconds": 0.1 * n, "loss_nats": slower + 6 * math.exp(-n / 50)} for n in range(1, 200 + seed)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        table_rows.change(runs, f"rates-{variant}", seed, train_path=f"/elsewhere/runs/_steps/{folder.name}")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    table_rows.study(tmp_path, BASE, VARIANTS)
    return tmp_path


def run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the command; returns the study's folder."""
    monkeypatch.setattr("sys.argv", ["hedgemix", "study", str(runs)])
    cli.main()
    return runs / "_studies" / "rates"


def test_the_command_prints_and_writes(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(runs, monkeypatch)
    printed = capsys.readouterr().out
    assert "better is better: -0.0020 bits per byte in 3 seeds" in printed
    for name in ("study.html", "study.parquet"):
        assert f": {folder / name}" in printed and (folder / name).is_file()
    page, twin = (folder / "study.html").read_text(), (folder / "study.md").read_text()
    for told in (page, twin):
        for text in ("is not compared: it has no table yet", "Not all of it is done", "evaluate.ttt.rate 0.0001"):
            assert text in told
    assert "<script" not in page and "<b>" not in page and "a $x_{ &lt;b&gt;" in page
    [drawn] = re.findall(r"\]\(figures/(.*)\.svg\)", twin)
    assert drawn == "differences"
    assert ElementTree.fromstring((folder / "figures" / "differences.svg").read_text()).tag.endswith("svg")
    assert pd.read_parquet(runs).record.nunique() == 5  # the study's own table is none of the folder's


def test_rows_are_sorted_by_difference_and_the_base_is_last(runs: Path) -> None:
    loaded = study.load(str(runs))
    table = study_page.table(loaded, verdicts.findings(loaded))
    assert [row[0] for row in table.rows] == ["one", "better", "a $x_{ <b>", "worse", "none", "base"]
    better = dict(zip(table.heads, table.rows[1], strict=True))
    assert better["difference"] == "-0.0020" and re.fullmatch(r"-0\.00\d\d to -0\.00\d\d", better["95 % interval"])
    assert (better["record"], better["row"], better["seeds"], better["final"]) == ("no", "yes", "3", "1.2909")
    assert dict(zip(table.heads, table.rows[0], strict=True))["95 % interval"] == "" and table.apart == 1


def test_marks_say_what_is_better_and_worse(runs: Path) -> None:
    loaded = study.load(str(runs))
    text = html(study_page.compose(loaded, verdicts.findings(loaded)), "")
    marks = re.findall(r'<li><span class="mark ?(\w*)">.?</span><code>(.*?)</code>', text)
    assert marks == [("", "one"), ("good", "better"), ("", "a $x_{ &lt;b&gt;"), ("bad", "worse"), ("", "none")]


def test_curves_are_drawn_where_training_differs(runs: Path) -> None:
    def section() -> Any:
        loaded = study.load(str(runs))
        return study_page.training(loaded)

    train(runs, "base")
    for seed in (1, 2, 3):
        table_rows.change(runs, "rates-better", seed, train_path=f"runs/_steps/train-base-{seed}")
        table_rows.change(runs, "rates-a $x_{ <b>", seed, train_path=f"runs/_steps/train-base-{seed}")
        table_rows.change(runs, "rates-worse", seed, train_path=f"runs/_steps/train-base-{seed}")
    table_rows.change(runs, "rates-one", 1, train_path="runs/_steps/train-base-1")
    assert section() == []
    train(runs, "worse", 0.5)
    [found] = section()
    plot, same = found.blocks
    assert isinstance(plot, Plot) and all(name in plot.svg for name in ("above base", ">worse<"))
    assert ">better<" not in plot.svg and same == "Trained as the base: `better`, `one`, `a $x_{ <b>`."
    (runs / "_steps" / "train-worse-1" / "log.jsonl").unlink()  # two seeds are left
    assert "worse" in section()[0].blocks[0].svg
    for seed in (2, 3):
        (runs / "_steps" / f"train-worse-{seed}" / "log.jsonl").unlink()
    assert "No log.jsonl is there of worse" in section()[0].blocks[-1]
