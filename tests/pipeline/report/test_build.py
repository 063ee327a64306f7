"""The report of a real record, what it says of records in other states, and that page and twin say the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pandas as pd
import pytest

from hedgemix.config import RecipeError
from pipeline import cli
from pipeline.analysis import records, significance
from pipeline.report import build as report
from pipeline.report import figures, sections, summary
from pipeline.report.page import Page, Plot, Points, Section, Table, html, markdown
from pipeline.submission import eligibility
from pipeline.submission.eligibility import obstacles
from support import table_rows

SECTIONS = [
    "Every seed", "Is it better, and how sure is that?", "What each stage is worth", "What each part is worth",
    "Can it be handed in?", "Along the text", "Where the mixture and test-time training helped and hurt", "Training",
    "Where the bytes go", "Where the time goes", "What the audit found", "To do it again",
]  # fmt: skip
PLOTS = [
    "ladder", "running", "weights-hedge", "weights-ensemble", "ranks", "documents", "training", "bytes", "time-train",
    "time-evaluate",
]  # fmt: skip


class Reader(HTMLParser):
    """Tags, attributes and text of a page; complains of a tag that is closed and was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def runs(undisturbed: tuple[Path, int, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table_rows.folder(undisturbed[0], tmp_path_factory.mktemp("report"))


def test_the_command_leaves_a_report_of_every_declared_seed(undisturbed: tuple[Path, int, str]) -> None:
    out, _, printed = undisturbed
    folder = out / "_records" / "tiny"
    assert f"report: {folder / 'report.html'}" in printed
    text, twin = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    row = pd.read_parquet(out / "tiny.parquet").set_index("seed").loc[1]
    read = Reader(text)
    for told in (read.words, twin):
        assert f"{row.bpb_final:.4f} bits per byte" in told and "1 of 2 seeds are done" in told
        assert "seed 2 failed" in told and "one seed, so no spread" in told
        for title in SECTIONS:
            assert title in told
        assert "is not there" not in told
    assert re.findall(r"^## (.*)$", twin, re.M) == SECTIONS
    assert not read.open and read.tags.count("svg") == len(PLOTS) == read.tags.count("figcaption")


def test_the_page_needs_no_other_file_and_nothing_in_it_can_run(undisturbed: tuple[Path, int, str]) -> None:
    read = Reader((undisturbed[0] / "_records" / "tiny" / "report.html").read_text())
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(read.tags)
    for name, value in read.attributes:
        assert not name.startswith("on") and name != "src"
        assert name not in ("href", "xlink:href") or value.startswith("#")
    assert ("http-equiv", "Content-Security-Policy") in read.attributes


def test_the_figures_beside_the_twin_are_sound_files(undisturbed: tuple[Path, int, str]) -> None:
    folder = undisturbed[0] / "_records" / "tiny"
    twin = (folder / "report.md").read_text()
    assert re.findall(r"\]\(figures/(.*)\.svg\)", twin) == PLOTS
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == sorted(PLOTS)
    for path in (folder / "figures").iterdir():
        text = path.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg") and "var(" not in text


def test_the_parts_of_a_report_add_up(undisturbed: tuple[Path, int, str]) -> None:
    """Bytes by tensor to the artifact, savings by token to the difference of the scores."""
    record = records.load(str(undisturbed[0] / "tiny.parquet"))
    [row] = record.done
    twin = (record.folder / "report.md").read_text()
    table = twin[twin.index("| tensor |") :].split("\n\n")[0].splitlines()[2:]
    tensors = sum(int(line.split("|")[4].replace(",", "")) for line in table)
    assert 0.8 < (tensors + row["memory_bytes"]) / row["artifact_bytes"] < 1
    lines = record.lines(row, "evaluate_path", "tokens.jsonl")
    saved = sum(line["bits"]["quantized"] - line["bits"]["final"] for line in lines)
    assert saved / row["valid_bytes"] == pytest.approx(row["bpb_quantized"] - row["bpb_final"], rel=1e-9)


def test_several_seeds_have_a_spread_and_are_tested(runs: Path) -> None:
    table_rows.write(runs, "old", [1.51, 1.52, 1.50])
    new = table_rows.write(runs, "new", [1.41, 1.42, 1.43])
    lead = "\n".join(summary.key_findings(new, None))
    pairs = [(1.41, 1.51), (1.42, 1.52), (1.43, 1.50)]
    p = significance.against_pairs(pairs, 0.005 / significance.nats_per_bit(new.done[0])).p
    assert "1.4200 bits per byte" in lead and "std 0.0100" in lead
    assert f"0.0900 bits per byte better than record `old`; p = {p:.3f} (paired t)" in lead and "a new record" in lead
    told = page_of(new)
    assert "old (paired t)" in told and "old: paired t-test of 3 seeds" in told
    assert "seeds in all, 1 more, would show it against old, seed by seed, in 80%" in told
    # Against a published score instead, that the record does not reach by the margin.
    told = page_of(new, 1.4215)
    assert "published 1.4215" in told and "no new record" in told and "no number of seeds would show it" in told


def page_of(record: records.Record, against: float | None = None) -> str:
    return Reader(html(report.compose(record, against), "")).words


def test_seeds_of_different_runs_are_shown_and_not_averaged(runs: Path) -> None:
    table_rows.write(runs, "two-machines", [2.4, 2.5])
    record = table_rows.change(runs, "two-machines", 2, hardware="8 x NVIDIA H100")
    lead = "\n".join(summary.key_findings(record, None))
    assert "not one record" in lead and "different hardware" in lead and "seed 2" in lead
    told = page_of(record)
    assert (
        "2.4000" in told and "2.5000" in told and "2.4500" not in told and "mean" not in told.split("Is it better")[0]
    )
    assert "Not averaged" in told


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"audited": None, "audit_plan": None}, "not audited: seed 2; run hedgemix audit"),
        ({"audited": False, "audit_failed": ["streamed"]}, "seed 2 failed its audit (streamed)"),
        ({"artifact_bytes": 16_000_000}, " bytes, the recipe allows 1,400,000"),
        ({"train_seconds": 601.0}, "seed 2: 601.0 training seconds, the recipe allows 600"),
        ({"evaluate_seconds": 700.0}, "seed 2: 700.0 evaluation seconds, the recipe allows 600"),
        ({"status": "failed", "error": "train: it broke"}, "seed 2 is failed; run the record"),
        ({"config_hash": "other"}, "different configurations"),
    ],
)
def test_what_stands_in_the_way_of_handing_in_is_told(
    runs: Path, values: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eligibility, "contradictions", lambda record: [])  # the rows' files are those of one seed
    sound = table_rows.write(runs, "sound", [2.4, 2.5], audited=True, audit_plan="full")
    assert obstacles(sound) == [] and "Can be handed in" in summary.key_findings(sound, None)[-1]
    told = obstacles(table_rows.change(runs, "sound", 2, **values))
    assert len(told) == 1 and expected in told[0]
    (runs / "sound.parquet").unlink()


def test_parts_are_told_as_differences_by_seed_once_they_were_measured(runs: Path) -> None:
    assert "Not measured. python benchmarks/quality/ablation.py" in page_of(records.load(str(runs / "tiny.parquet")))
    found = [
        {"default": default, "variants": {"neural": default + 1, "without memory": 1.1 * default}}
        for default in (1.0, 2.0)
    ]
    measured = SimpleNamespace(done=found, content=lambda row, *where: json.dumps(row).encode())
    said, table = sections.parts(cast(records.Record, measured)).blocks
    assert said == "Everything: 1.5000 bits per byte, mean of 2 seeds."
    assert cast(Table, table).rows == [
        ["neural", "2.5000", "+1.0000", "+1.0000 to +1.0000"],
        ["without memory", "1.6500", "+0.1500", "-0.4853 to +0.7853"],
    ]


def test_a_record_without_its_files_still_has_a_report(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.parquet").write_bytes((runs / "tiny.parquet").read_bytes())
    told = page_of(records.load(str(tmp_path / "tiny.parquet")))
    for name in ("trace.jsonl", "tokens.jsonl", "log.jsonl"):
        assert f"{name} of seed 1 is not there" in told
    assert "No artifact is there" in told and "bits per byte" in told


def test_a_record_of_which_nothing_is_done_has_a_report(runs: Path) -> None:
    record = table_rows.change(runs, table_rows.write(runs, "begun", [2.4]).name, 1, status="pending", bpb_final=None)
    told = page_of(record)
    assert "No seed has finished yet" in told and "seed 1 pending: not finished" in told


def test_text_that_looks_like_html_is_shown_as_text() -> None:
    evil = "<script>alert(1)</script>"
    drawn = figures.ladder({"a": [1.0, 1.1], "b": [0.9]})
    blocks = [evil, Table((evil,), ((evil,),)), Points((evil,), (True,)), Plot("p", drawn, evil)]
    text = html(Page(evil, (evil,), (Section(evil, blocks),)), evil)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 8


def test_twin_and_page_have_the_same_words() -> None:
    table = Table(("seed", "figure"), (("1", "a|b"), ("22", "")), apart=1)
    page = Page(
        "Title", ("First.", "Second `code`."), (Section("Part", ("Words.", table, Points(("x", "y"), (True, False)))),)
    )
    assert markdown(page, "foot", "figures").splitlines() == [
        "# Title", "", "**First.**", "", "Second `code`.", "", "## Part", "", "Words.", "",
        "| seed | figure |", "| ---: | --- |", "| 1 | a\\|b |", "| 22 |  |", "", "- ✓ x", "- ✗ y", "", "*foot*",
    ]  # fmt: skip
    words = Reader(html(page, "foot")).words.split()
    for word in ("Title", "First.", "code", "Part", "Words.", "a|b", "22", "✓x", "✗y", "foot"):
        assert word in words


def test_a_table_of_an_older_schema_reads_as_one_with_empty_columns(
    undisturbed: tuple[Path, int, str], tmp_path: Path
) -> None:
    table = pd.read_parquet(undisturbed[0] / "tiny.parquet")
    table.drop(columns=["retries", "memory_tokens"]).assign(attempts=4).to_parquet(tmp_path / "tiny.parquet")
    row = records.load(str(tmp_path / "tiny.parquet")).rows[0]
    assert row["retries"] is None and row["memory_tokens"] is None and row["bpb_final"] == table.bpb_final[0]


@pytest.mark.parametrize("run", ["nowhere.parquet", "_records", "page.parquet", "old.parquet", "."])
def test_what_is_no_record_is_refused_in_a_line(
    run: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("_records").mkdir()
    Path("page.parquet").write_text("no parquet")
    pd.read_parquet(runs / "tiny.parquet").drop(columns="config_hash").to_parquet("old.parquet")
    monkeypatch.setattr("sys.argv", ["hedgemix", "report", run])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and run.removesuffix(".parquet") in told
    assert len(told.splitlines()) == 1


def test_a_folder_of_one_record_is_that_record(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "one.parquet").write_bytes((runs / "tiny.parquet").read_bytes())
    assert records.load(str(tmp_path)).name == "one"
    (tmp_path / "two.parquet").write_bytes((runs / "tiny.parquet").read_bytes())
    with pytest.raises(RecipeError, match="holds 2 records: one.parquet, two.parquet"):
        records.load(str(tmp_path))


def test_a_notebook_s_way_to_draw_is_not_taken() -> None:
    environment = {**os.environ, "MPLBACKEND": "module://no.such.backend"}
    code = "from pipeline.report import study_figures; import matplotlib; print(matplotlib.get_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment)
    assert (done.stdout, done.stderr) == ("agg\n", "")
