"""Variants at equal time: a schedule against a clock, costs against what was measured, scores against an evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks.quality import equal_time
from benchmarks.quality.equal_time import Costs, Options, Task
from benchmarks.quality.held_out_end import dataset_of
from hedgemix.config import DataConfig, Recipe, RecipeError
from hedgemix.data import dataset as datasets
from hedgemix.data import shards, tokenizer
from hedgemix.recipes import laptop
from hedgemix.train.schedule import StepKind
from support.text_data import documents

DATA = DataConfig(vocab_size=300)
SMALL = {
    "data.vocab_size": "300", "data.memory_bytes": "1000", "limits.total_bytes": "150000",
    "model.width": "32", "model.mlp_hidden": "32", "model.rope_dims": "8", "model.bigram_buckets": "0",
    "model.value_embedding_width": "16", "train.batch_tokens": "128", "train.sequence_tokens": "32",
    "train.calibration_sequences": "4", "evaluate.window_tokens": "32", "evaluate.segment_tokens": "512",
    "evaluate.overlap_tokens": "32", "evaluate.mixer.orders": "1,2", "evaluate.cache.enabled": "false",
    "evaluate.ttt.enabled": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()[:60]))
    return path


NONE: Any = None
"""No data set: nothing is read."""


def task(recipe: Recipe, text: str = "text") -> Task:
    return Task("name", recipe, text, dataset=NONE)


def varied(recipe: Recipe, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, **(model or {})), train=replace(recipe.train, **train))


def test_the_end_of_a_text_is_held_out(text: Path, tmp_path: Path) -> None:
    found = dataset_of(text, DATA, 2000, tmp_path)
    kept = len(documents()[:60])
    while sum(len(each.encode()) for each in documents()[kept:60]) < 2000:
        kept -= 1
    ends = "".join(documents()[kept:60]).encode()
    processor = tokenizer.load(found.tokenizer)

    def texts(stream: shards.TokenStream) -> bytes:
        return tokenizer.decode(processor, stream.read(0, len(stream)).tolist())

    assert texts(datasets.valid_stream(found)) == ends and found.valid_bytes == len(ends)
    train = texts(datasets.train_stream(found))
    assert found.train_bytes == len(train) <= sum(len(each.encode()) for each in documents()[:kept])
    assert max(map(len, documents()[:5])) > 100 and documents()[0].split("\n")[0].encode() in train
    marked = dataset_of(text, replace(DATA, case_markers=True), 2000, tmp_path)
    assert (marked.valid_bytes, marked.train_bytes) == (found.valid_bytes, found.train_bytes)
    assert marked.tokenizer_sha256 != found.tokenizer_sha256
    assert dataset_of(text, DATA, 2000, tmp_path) == found
    with pytest.raises(RecipeError, match="lower --held-bytes"):
        dataset_of(text, DATA, 10**9, tmp_path)


def test_a_schedule_is_that_of_a_clock() -> None:
    loops = varied(laptop(), {"layers": 3, "looped_layers": (1,)}, loop_from_fraction=0.5, growth_fractions=(0.25,))
    ms = {StepKind(False, False, 2): 10.0, StepKind(False, False, 1): 20.0, StepKind(False, True, 1): 50.0}
    assert task(loops).kinds == dict(zip(ms, (0.0, 0.25, 0.5), strict=True))
    found = equal_time.schedule(task(loops), ms, 0.4)
    assert found == pytest.approx(
        [*(at / 400 for at in range(0, 100, 10)), 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.625, 0.75, 0.875]
    )


def test_rates_and_start_values_are_the_same_work() -> None:
    plain, kind = laptop(), StepKind(False, True, 1)
    same = varied(plain, {"zero_outputs": True, "qk_gain": 5.0}, rate_floor=0.1, embedding_decay=0.3)
    grown = varied(plain, growth_fractions=(0.1,))
    assert {task(each).work(kind) for each in (plain, same, grown)} == {task(plain, "other text").work(kind)}
    within = varied(plain, {"within_documents": True})
    others = [varied(plain, {"head_gates": True}), varied(plain, muon_equal_rows=True), within]
    works = [task(plain).work(kind), task(grown).work(StepKind(False, True, 2)), task(within, "other text").work(kind)]
    assert len({*works, *(task(each).work(kind) for each in others)}) == 6


def test_what_is_measured_later_goes_by_its_ratio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain, gates, kind = task(laptop()), task(varied(laptop(), {"head_gates": True})), StepKind(False, True, 1)
    times = {plain.work(kind): [10.0, 30.0]}
    monkeypatch.setattr(equal_time, "in_turns", lambda places, rounds: {key: times[key] for key in places})
    Costs(tmp_path / "costs.json", 2).measure([plain, plain])
    times = {plain.work(kind): [50.0, 70.0], gates.work(kind): [60.0, 90.0]}
    costs = Costs(tmp_path / "costs.json", 2)
    costs.measure([plain, gates])
    assert (costs.of(plain), costs.of(gates)) == ({kind: 20.0}, {kind: 25.0})
    times = {}
    Costs(tmp_path / "costs.json", 2).measure([plain, gates])  # nothing is left to be measured


def noted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[tuple[dict[str, Any], Any]]:
    """What this function will be given, and what it will return."""
    calls, work = list[tuple[dict[str, Any], Any]](), getattr(place, name)

    def and_note(**given: Any) -> Any:
        calls.append((given, work(**given)))
        return calls[-1][1]

    monkeypatch.setattr(place, name, and_note)
    return calls


def test_a_line_is_what_the_artifact_scores(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {
        name: noted(monkeypatch, place, name)
        for place, name in (
            (equal_time.trainer, "train"), (equal_time.stages, "quantize_stage"), (equal_time.stages, "evaluate_stage"),
        )
    }  # fmt: skip
    monkeypatch.setattr(equal_time.script, "n_bytes", lambda recipe: 5000)
    variants = tmp_path / "variants.toml"
    variants.write_text('[[variant]]\nname = "equal rows"\ntrain.muon_equal_rows = true\n')
    options = Options(
        "laptop", (text,), tmp_path, str(variants), tuple(SMALL.items()), seeds=(1,), seconds=0.04, held_bytes=2000,
        rounds=2, mixed=True,
    )  # fmt: skip
    equal_time.main(options)
    runs = (tmp_path / "runs.jsonl").read_text()
    lines = [json.loads(line) for line in runs.splitlines()]
    assert [(line["variant"], line["text"]) for line in lines] == [("base", text.name), ("equal rows", text.name)]
    for line, (trained, _), (exported, _), (_, result) in zip(lines, *calls.values(), strict=True):
        assert line["bpb"] == pytest.approx(result.bpb_quantized, rel=1e-7)
        assert line["bpb_mixed"] == result.bpb_final != line["bpb"]
        assert abs(line["bpb_full"] - line["bpb"]) < 0.1 and line["artifact_bytes"] < exported["room_bytes"]
        assert exported["room_bytes"] == 150_000 - 2 * 4096 - 1000, "beside whole pages of code and the memory"
        assert line["steps"] == len(trained["fractions"]) and line["ms"] == pytest.approx(40 / line["steps"])
    table = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == table and "| **base** |" in table and "| equal rows |" in table
    monkeypatch.setattr(equal_time, "run", lambda *given: pytest.fail("a run that has its line was run again"))
    equal_time.main(replace(options, base="equal rows"))
    assert "| **equal rows** |" in capsys.readouterr().out and (tmp_path / "runs.jsonl").read_text() == runs
    for wrong in (replace(options, base="no variant"), replace(options, recipe="no recipe")):
        with pytest.raises(SystemExit, match="error: .*'no (variant|recipe)'.*choose from"):
            equal_time.main(wrong)


def test_differences_are_paired_by_seed() -> None:
    same = {"ms": 40.0, "steps": 1000, "text_bytes_per_second": 60_000.0}
    one, other = (1.5, 1.9, 1.7), (1.4, 1.85, 1.75)
    lines = {
        name: [{"bpb": bpb, "bpb_full": bpb - 0.01, **same} for bpb in scores]
        for name, scores in (("base", one), ("other", other))
    }
    by = [b - a for a, b in zip(one, other, strict=True)]
    low, high = stats.t.interval(0.95, 2, sum(by) / 3, stats.sem(by))
    *_, base, row = equal_time.markdown(lines, "base").splitlines()
    compared = f"{sum(by) / 3:+.4f} ({low:+.4f} to {high:+.4f})"
    assert base == "| **base** | 1.7000 |  | 1.6900 |  |  | 40.0 | 1,000 | 60,000 |"
    assert row == f"| other | 1.6667 | {compared} | 1.6567 | {compared} | 2 of 3 | 40.0 | 1,000 | 60,000 |"
    assert not math.isnan(low) and equal_time.told([-0.5]) == "-0.5000"
