"""What benchmarks/overhead/overhead.py says about marks that are known, and the plain side's whole seed, marked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.overhead import overhead, timeline
from benchmarks.overhead.timeline import Command, Mark
from hedgemix.config import to_dict
from hedgemix.data import dataset as datasets
from hedgemix.runtime.files import write_json
from pipeline import record
from pipeline.steps import graph
from pipeline.storage.store import Storage
from support import tiny_record

ROOT = Path(__file__).resolve().parent.parent.parent


def test_only_seconds_outside_every_stage_are_without_work() -> None:
    assert timeline.covered([(1, 3), (2, 4), (6, 9), (7, 8)], 0, 10) == 6
    assert timeline.covered([(1, 3), (2, 4), (6, 9)], 2.5, 7) == 2.5
    marks = [Mark(1, "train_stage", 2, 5, 3.0), Mark(2, "score_stage", 4, 7, 2.0), Mark(1, "perform train", 0, 6, 4.0)]
    command = Command(0, 10, 1, marks, {1: [(0, 0.0), (10, 6.0)], 2: [(10, 2.5)]})
    assert command.without_work() == 5
    assert command.without_work(0, 4.5) == 2
    assert command.cpu_without_work() == 3.5


def test_a_step_is_the_median_over_all_ranks_without_the_first() -> None:
    marks = []
    for pid, step in ((1, 0.1), (2, 0.3)):
        for index in range(10):
            begin = 100.0 * index if index < 4 else 1000 + step * index
            marks.append(Mark(pid, "train_step", begin, begin + 0.05, step / 2))
    cpu = {1: [(1001.0, 0.0), (1002.0, 1.0)], 2: [(1001.0, 0.0), (1002.0, 1.0)], 3: [(1000.0, 1.0), (1000.5, 1.2)]}
    command = Command(0, 2000, 1, marks, cpu)
    assert command.steps() == (pytest.approx(200), pytest.approx(100))
    # Process 3 alone does not train: 0.2 s in the 1,000.9 s from the first step to the last.
    assert command.beside_training() == pytest.approx(0.2 / 1000.9)


def test_the_phases_are_all_of_the_time_without_work() -> None:
    marks = [
        Mark(1, "init", 3, 5, 0), Mark(2, "perform train", 8, 30, 0), Mark(3, "import ray.train", 11, 12, 0),
        Mark(3, "import pipeline.execution.train_job", 12, 14, 0), Mark(3, "init_process_group", 14, 14.5, 0),
        Mark(3, "train_stage", 15, 29, 0), Mark(4, "quantize_stage", 32, 35, 0), Mark(5, "perform evaluate", 36, 45, 0),
        Mark(6, "evaluate_stage", 38, 44, 0),
    ]  # fmt: skip
    command = Command(1, 50, 1, marks, {})
    found = timeline.phases(command)
    assert list(found.values()) == [2, 2, 3, 3.5, 3, 0.5, 1, 3, 2, 6]
    assert sum(found.values()) == command.without_work()


@pytest.mark.soak
def test_the_plain_side_does_a_whole_seed_and_is_marked(text: Path, tmp_path: Path) -> None:
    recipe, _ = record.parse(["laptop", *tiny_record.arguments(text, tmp_path)])
    record.prepare(recipe, Storage("", tmp_path), Console(quiet=True))
    write_json(tmp_path / "recipe.json", to_dict(recipe))
    marks = tmp_path / "marks"
    marks.mkdir()
    environment = {
        **os.environ,
        overhead.MARKS: str(marks),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks" / "overhead" / "marks"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    stages = ["train", "quantize", "score", "counts", "evaluate"]
    launch = [sys.executable, "-m", "benchmarks.plain.launch", "--runs", str(tmp_path), "--seed", "1", "--stages"]
    command = [*launch, *stages, "--recipe", str(tmp_path / "recipe.json")]
    with timeline.Sampler(f"{overhead.MARKS}={marks}", seconds=0.05) as sampler:
        subprocess.run(command, env=environment, check=True, timeout=300)
    data = graph.data_step(Storage("", tmp_path), recipe.data)
    steps = graph.plan_record("tiny", recipe, datasets.load(data.folder), data, (1,)).seeds[1]
    assert len(steps.records()) == len(steps.all())
    found = Command(0, 1, 1, timeline.read(marks), sampler.found)
    assert len(found.named("train_step")) == recipe.train.steps
    assert {mark.name for mark in found.named(*timeline.WORK)} == set(timeline.WORK)
    (pid,) = {mark.pid for mark in found.named("train_step")}
    assert sampler.found[pid][-1][1] > sum(mark.cpu for mark in found.named("train_stage"))
