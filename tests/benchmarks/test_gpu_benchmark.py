"""The two calls on a GPU, on a CPU: every section, what a broken one costs, and what the documents say of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import predictions, sections
from benchmarks.gpu import text as texts
from benchmarks.gpu.__main__ import arguments, main
from benchmarks.gpu.calls import CALLS, documented
from benchmarks.gpu.sections import Job, Results, Section
from benchmarks.gpu.timing import KINDS, Profile, Stopwatch
from benchmarks.suite import launches
from hedgemix import recipes
from hedgemix.artifact import format as artifact
from hedgemix.config import RecipeError
from hedgemix.data import dataset, shards, tokenizer
from pipeline.forecast import gpu_plan

ROOT = Path(__file__).resolve().parent.parent.parent
WITHOUT = ("ray", "tyro", "constriction", "huggingface_hub", "rich", "pandas")
"""Packages that a machine with a GPU may lack."""
CALL = """
import runpy, sys
sys.modules.update(dict.fromkeys({without}))
sys.argv = ["benchmarks.gpu", *{arguments}]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def documents() -> list[str]:
    """Forty of made-up words, no two alike."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), generator.integers(2, 9))) for _ in range(300)]
    return [" ".join(words[i] for i in generator.zipf(1.3, 400).clip(max=300) - 1) + ".\n" for _ in range(40)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of text, and a folder of shards with its tokenizer."""
    folder = tmp_path_factory.mktemp("gpu")
    made = documents()
    (folder / "text").mkdir()
    for number, each in enumerate(made):
        (folder / "text" / f"{number}.txt").write_text(each)
    processor = tokenizer.train(made, 300, folder / "shards" / "tiny.model")
    tokens = np.concatenate(tokenizer.encode_batch(processor, made[:8]))
    shards.write_shard(folder / "shards" / "tiny_train_000000.bin", tokens)
    shards.write_shard(folder / "shards" / "tiny_val_000000.bin", tokens[::-1].copy())
    return folder


def call(given: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """As on a machine without those packages."""
    files = sorted(map(str, (given / "text").iterdir()))
    places = ["--shards", str(given / "shards"), "--out", str(out), "--work", str(given / "work")]
    arguments = [*more, "--device", "cpu", "--tiny", *places, "--text", *files]
    code = CALL.format(without=WITHOUT, arguments=arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_section_runs_and_leaves_what_it_says(given: Path, tmp_path: Path) -> None:
    for name in CALLS:
        done = call(given, tmp_path, name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.rstrip().splitlines()[-1].startswith(f"| {name}: ")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    ended = {(line["call"], line["section"]): line["status"] for line in lines if "status" in line}
    assert ended == {(name, each.name): "ended" for name, every in CALLS.items() for each in every}

    def plain(name: str) -> str:
        return re.sub(r"\d+", "N", name)  # sizes are part of some names

    told = {(line["call"], line["section"], plain(line["name"])) for line in lines if "name" in line}
    for name, every in predictions.PREDICTED.items():
        for section, figures in every.items():
            for figure in figures:
                known = (name, section, plain(figure)) in told or figure.startswith(predictions.GPU_ONLY)
                assert known, f"{name}: {section} does not tell {figure}"
    assert all(line["card"] == "no GPU" for line in lines) and not any(map(predictions.wrong, lines))
    kept = {"results.jsonl", "table.txt", "profile.txt", "log.jsonl", "trace.jsonl", "artifact.hmx"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert sum(line["section"] == "vary" and "final" in line.get("name", "") for line in lines) == 5
    assert artifact.read(tmp_path / "artifact.hmx").n_bytes < 500_000
    trained = next(line["value"] for line in lines if line.get("name") == "steps")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == trained
    assert "aten::" in (tmp_path / "profile.txt").read_text()


def test_no_document_is_on_both_sides(given: Path, tmp_path: Path) -> None:
    files, model = sorted((given / "text").iterdir()), given / "shards" / "tiny.model"
    found = texts.find(files, given / "shards", model, 0.25, tmp_path)
    found.start()
    data = found.wait()
    processor = tokenizer.load(model)

    def read(path: str) -> set[bytes]:
        tokens = shards.map_shard(path)
        parts = np.split(tokens, np.flatnonzero(tokens == processor.bos_id()))[1:]
        return {tokenizer.decode(processor, part) for part in parts}

    own = [path for path in data.train_shards if Path(path).name.startswith("text_")]
    train, valid = (set[bytes]().union(*map(read, paths)) for paths in (own, data.valid_shards))
    assert train | valid == {each.encode() for each in documents()} and not train & valid
    assert 0 < len(valid) < len(train)
    assert [Path(path).name for path in data.train_shards if path not in own] == ["given_tiny_train_000000.bin"]
    written = (found.folder / dataset.FILE_NAME).stat().st_mtime_ns
    found.start()
    assert not found.running() and (found.folder / dataset.FILE_NAME).stat().st_mtime_ns == written


def test_text_that_cannot_be_tokenized_says_so(given: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_bytes(b"\xff" * 100)
    found = texts.find([tmp_path / "odd.txt"], given / "shards", given / "shards" / "tiny.model", 0.25, tmp_path)
    found.start()
    with pytest.raises(RuntimeError, match="not UTF-8"):
        found.wait()
    with pytest.raises(RecipeError, match="no file"):
        texts.find([tmp_path / "absent"], given / "shards", given / "shards" / "tiny.model", 0.25, tmp_path)


def test_what_cannot_work_is_named(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, ":4096:8")  # kept from staying after the test
    text, folders = ["--text", str(given / "text" / "0.txt")], ["--out", str(tmp_path), "--work", str(tmp_path)]
    shard = ["--shards", str(given / "shards")]
    for more, message in (
        ([*shard, "--tiny", "--only", "mixng"], "first has no section 'mixng'"),
        (shard, "add --tiny"),
        (["--shards", str(tmp_path), "--tiny"], "has 0 .model files"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments(["first", "--device", "cpu", *text, *folders, *more]))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    nothing: Any = None
    results = Results(tmp_path / "results.jsonl", "first")
    return Job(torch.device("cpu"), nothing, nothing, tmp_path, tmp_path, results, 1.0)


def good(job: Job) -> None:
    job.tell("good", 1.0, "s")


def raises(job: Job) -> None:
    job.tell("before", 2)
    raise ValueError("of no use | at all")


def sleeps(job: Job) -> None:
    time.sleep(60)


def swallows(job: Job) -> None:
    """As a compiler might: it tries again, whatever came."""
    with contextlib.suppress(BaseException):
        time.sleep(60)
    time.sleep(60)


def hangs(job: Job) -> None:
    """As in a kernel that does not return: no alarm is heard."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    subprocess.run(["sleep", "60"])


def dies(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "status", "error"),
    [
        (raises, "failed", "ValueError: of no use | at all (in test_gpu_benchmark.py, line"),
        (sleeps, "stopped", "over its 1 s (in test_gpu_benchmark.py, line"),
        (swallows, "stopped", "over its 1 s"),
        (hangs, "killed", "did not stop at its limit of 1 s"),
        (dies, "killed", "its process ended with -9"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_broken_section_costs_itself_alone(
    job: Job, monkeypatch: pytest.MonkeyPatch, work: Callable[[Job], None], status: str, error: str
) -> None:
    monkeypatch.setattr(sections, "GRACE_SECONDS", 2.0)
    run = [Section("bad", 1.0, work, ""), Section("good", 10.0, good, "")]
    assert not sections.run(run, job, 60.0)
    lines = job.results.lines()
    [bad] = [line for line in lines if line["section"] == "bad" and "status" in line]
    assert bad["status"] == status and bad["error"].startswith(error) and bad["seconds"] < 10
    assert [line["name"] for line in lines if "name" in line] == (["before"] if work is raises else []) + ["good"]
    assert lines[-1]["status"] == "ended"
    assert f"| first: bad | {status} |" in predictions.table(lines, ["first"])


def test_nothing_is_begun_that_cannot_end_in_time(job: Job) -> None:
    run = [Section("long", 100.0, good, "", least_seconds=50.0), Section("short", 100.0, good, "", least_seconds=1.0)]
    assert not sections.run(run, job, sections.CLOSING_SECONDS + 20.0)
    assert [(line["section"], line["status"]) for line in job.results.lines() if "status" in line] == [
        ("long", "skipped"), ("short", "ended"),
    ]  # fmt: skip


def test_a_call_tells_of_its_own_lines_only(job: Job) -> None:
    sections.run([Section("one", 5.0, good, "")], job, 60.0)
    assert Results(job.results.path, "record").lines() == [] and len(job.results.lines()) == 2


def test_a_difference_that_is_too_large_is_seen() -> None:
    line = {"call": "first", "card": "", "section": "agreement", "name": "rows, device against CPU", "unit": "nats"}
    line |= {"note": "", "most": 1e-5}
    for value, bad in ((1e-6, False), (1e-5, False), (2e-5, True), (float("nan"), True)):
        assert predictions.wrong({**line, "value": value}) is bad
        assert ("TOO MUCH" in predictions.table([{**line, "value": value}])) is bad
    assert not predictions.wrong({**line, "value": 5.0, "most": None})


def test_the_latest_of_two_runs_is_shown_beside_the_prediction() -> None:
    line = {"call": "first", "card": "a card", "section": "training", "name": "ms a step", "unit": "ms", "note": ""}
    shown = predictions.table([{**line, "value": 3.0}, {**line, "value": 123.4}]).splitlines()
    [row] = [each for each in shown if each.startswith("| first: training | ms a step |")]
    assert row == "| first: training | ms a step | 123.4 ms | 100 to 120 ms | 97 ms for as many tokens a GPU |  |"
    assert shown[0] == "Measured on: a card."


def test_kernels_have_the_kind_that_their_names_say() -> None:
    kinds = {
        "triton_red_fused__scaled_dot_product_cudnn_attention_mm_3": "element-wise",
        "triton_tem_fused_mm_7": "matrix products",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma": "attention",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd": "attention",
        "Memcpy HtoD (Pageable -> Device)": "copies",
        "aten::addmm": "matrix products",
    }
    for name, kind in kinds.items():
        assert next(each for each, of in KINDS.items() if re.search(of, name)) == kind, name
    assert not any(re.search(of, "vectorized_elementwise_kernel") for of in KINDS.values())


def test_a_profile_adds_up_to_what_ran() -> None:
    x = torch.randn(300, 300)
    found = Profile(lambda: (x @ x).exp(), torch.device("cpu"))
    kinds = found.kinds()
    assert kinds["matrix products"] > 0 and kinds["element-wise"] > 0 and kinds["attention"] == 0
    assert sum(kinds.values()) == pytest.approx(sum(spent for _, spent in found.kernels()))
    assert found.calls["aten::mm"] == 1


def test_a_stopwatch_tells_the_time_between_its_marks() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (0.0, 0.03):
        time.sleep(seconds)
        watch.mark()
    first, second = watch.milliseconds()
    assert first < 30 <= second


def between(page: str, name: str) -> str:
    text = (ROOT / page).read_text()
    return text.partition(f"<!-- bench:{name} -->\n")[2].partition(f"\n<!-- /bench:{name} -->")[0]


def test_the_page_has_every_section_and_prediction() -> None:
    shown = between("docs/gpu.md", "gpu")
    for name, every in CALLS.items():
        for each in every:
            assert f"| {name} | {each.name} | {each.limit_seconds:.0f} s | {each.proves} |" in shown
    if "Not measured yet" in shown:
        assert shown == documented([])


def test_every_document_says_what_the_plan_computes() -> None:
    """From the rates that the page shows and the operations that it counted."""
    shown = between("docs/performance.md", "plan")
    told = dict(re.findall(r"^\| (\w+) \| ([\d.e+-]+) \| (?:yes|assumed) \|$", shown, re.MULTILINE))
    assert set(told) == {each.name for each in fields(gpu_plan.Rates)} - {"measured"}
    for name in gpu_plan.Rates().assumed():
        if f"| {name} | {told[name]} | assumed |" in shown:
            assert float(told[name]) == pytest.approx(getattr(gpu_plan.Rates(), name), rel=0.01), name
    rates = replace(gpu_plan.Rates(), **{name: float(value) for name, value in told.items()})
    pattern = r"(\d+) array operations asked for and (\d+) replayed.*?(\d+) array operations a piece"
    [counted] = re.findall(pattern, shown, re.DOTALL)
    [adapting] = re.findall(r"(\d+) operations asked for and (\d+) replayed", shown.replace("array operations", ""))
    assert gpu_plan.Launches(*map(float, (*counted, *adapting))) == gpu_plan.COUNTED
    stages = gpu_plan.plan(recipes.record(), rates, gpu_plan.COUNTED)
    seconds = gpu_plan.evaluation_seconds(stages)
    [said] = re.findall(r"^Evaluation: (\d+) s", shown, re.MULTILINE)
    assert float(said) == pytest.approx(seconds, rel=0.01)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"Computed from operations, launches and waits at assumed rates, evaluation takes {said} of its 600 s" in readme
    )
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert f"of evaluation's {said} seconds" in page


def test_launches_are_those_of_an_evaluation() -> None:
    evaluate = replace(recipes.record().evaluate, segment_tokens=512)
    small = replace(evaluate.mixer, orders=(1, 2), match_lengths=(), block_tokens=64)
    found = launches.count_launches(replace(evaluate, mixer=small), 50)
    longer = launches.count_launches(replace(evaluate, mixer=replace(small, block_tokens=128)), 50)
    assert found.asked == longer.asked > 50  # the host asks for a replay, whatever is in it
    assert longer.replayed < found.replayed < 2 * longer.replayed
    assert found.rule == longer.rule > 50
    assert found.adapting_replayed == longer.adapting_replayed == 0 < found.adapting  # no span fits into a piece


def test_the_plan_multiplies_what_is_counted() -> None:
    assert launches.count_launches(gpu_plan.COUNTED_OF, 32) == gpu_plan.COUNTED


def test_memory_that_is_not_filled_is_no_operation() -> None:
    x = torch.ones(2, 3, 4)
    assert launches.counted(lambda: torch.empty(3)) == 0
    assert launches.counted(lambda: x @ torch.ones(4, 5)) == 2  # ones, and a product whose shape is changed


def test_what_is_in_graphs_is_counted_apart() -> None:
    graphs, x = launches.Graphs(), torch.ones(4)
    replay = graphs.record(lambda: x.mul_(2).add_(1), x.device)
    assert launches.counted(lambda: (replay(), replay(), x.exp())) == 5
    assert graphs.replays == 2 and graphs.operations == 4
