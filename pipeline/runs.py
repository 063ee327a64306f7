"""Steps on disk: each has a folder named by what it reads, and is done when its result.json is there.

Layout under the runs folder (names beginning with _ are skipped by `pandas.read_parquet`):

    <record>.parquet              one row a seed
    _steps/<kind>-<key>/          result.json, written last, and what the step made
    _records/<record>/            recipe.json, record.lock
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hedgemix import bundle, corpus
from hedgemix.config import DataConfig, Recipe, RecipeError, config_hash, to_dict
from hedgemix.dataset import Dataset
from hedgemix.files import write_json

# Raise a step's number when its code changes what it makes from the same inputs: old results are then not reused.
VERSIONS = {"data": 1, "counts": 2, "train": 3, "score": 2, "quantize": 2, "evaluate": 5}


@dataclass(frozen=True)
class Step:
    kind: str
    key: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.key}"

    def record(self) -> dict[str, Any] | None:
        """All that result.json holds (kind, key, origin, started_at, finished_at, seconds, result), or None when the
        step is not done. A damaged result.json counts as not done."""
        try:
            found = json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == self.key else None

    def done(self) -> bool:
        return self.record() is not None

    def result(self) -> dict[str, Any]:
        record = self.record()
        if record is None:
            raise FileNotFoundError(f"step {self.name} has no result in {self.folder}")
        return record["result"]


def step(runs: Path, kind: str, *reads: Any) -> Step:
    """The step of this kind that reads exactly these configurations, hashes and parents' keys."""
    key = config_hash(kind, VERSIONS[kind], *reads)
    return Step(kind, key, runs / "_steps" / f"{kind}-{key}")


def perform(step: Step, work: Callable[[], dict[str, Any]], origin: dict[str, Any]) -> dict[str, Any]:
    """Do the step unless it is done; its result.json is written last, whole or not at all.

    `origin`: the versions and the tree that do it, kept beside the result. Two records that share a step do not do it
    at the same time: the second waits, and then finds it done.
    """
    if (record := step.record()) is not None:
        return record["result"]
    step.folder.mkdir(parents=True, exist_ok=True)
    with open(step.folder / "step.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (record := step.record()) is not None:
            return record["result"]
        for rest in step.folder.glob(".*.tmp"):  # of a writer that was killed
            rest.unlink(missing_ok=True)
        started, began = now(), time.monotonic()
        result = work()
        record = {
            "kind": step.kind,
            "key": step.key,
            "origin": origin,
            "started_at": started,
            "finished_at": now(),
            "seconds": time.monotonic() - began,
            "result": result,
        }
        write_json(step.folder / "result.json", record)
    return result


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class SeedSteps:
    """One seed's way through the pipeline."""

    seed: int
    train: Step
    score: Step
    quantize: Step
    evaluate: Step

    def all(self) -> tuple[Step, ...]:
        return self.train, self.score, self.quantize, self.evaluate

    def done(self) -> bool:
        return all(step.done() for step in self.all())


def seed_steps(runs: Path, recipe: Recipe, dataset: Dataset, seed: int) -> SeedSteps:
    """The seed's steps. A step's key covers what it reads and its parent's key, so changing the mixer names a new
    evaluation and nothing else. The number of evaluating ranks is left out: it does not change the score."""
    compute, evaluate = recipe.compute, to_dict(recipe.evaluate)
    machine = [compute.workers, compute.gpus_per_worker, compute.cpus_per_worker]
    text = [dataset.train_sha256, dataset.tokenizer_sha256, dataset.vocab_size]
    train = step(runs, "train", recipe.model, recipe.train, machine, text, seed)
    order = {name: value for name, value in evaluate.items() if name not in ("ttt", "mixer")}
    score = step(runs, "score", train.key, order, dataset.valid_sha256)
    room = bundle.artifact_room(recipe) if recipe.quantize.method == "stepped" else None
    quantize = step(runs, "quantize", train.key, recipe.quantize, room)
    evaluation = step(runs, "evaluate", quantize.key, evaluate, dataset.valid_sha256)
    return SeedSteps(seed, train, score, quantize, evaluation)


def data_step(runs: Path, config: DataConfig) -> Step:
    """The data's step reads the configuration and what its source looks like now: package versions, or the names,
    sizes and times of files."""
    if config.source == "docs":
        found = metadata.packages_distributions()
        source: list[Any] = [[name, installed_versions(found.get(name, []))] for name in config.packages]
    else:
        if config.source == "text":
            files = [
                file for path in config.paths for file in files_of(Path(path), corpus.SUFFIXES, corpus.COMPRESSIONS)
            ]
        else:
            files = files_of(Path(config.shards_dir), (".bin", ".model")) if config.shards_dir else []
            files += [Path(config.tokenizer)] if config.tokenizer else []
        source = [
            [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()
        ]
    return step(runs, "data", config, source)


def files_of(path: Path, suffixes: Iterable[str], compressions: Iterable[str] = ()) -> list[Path]:
    """The file itself, or the files of a folder whose names end in one of the suffixes, maybe compressed."""
    endings = tuple(suffix + packed for suffix in suffixes for packed in ("", *compressions))
    return sorted(file for file in path.rglob("*") if file.name.endswith(endings)) if path.is_dir() else [path]


def installed_versions(distributions: Iterable[str]) -> list[str]:
    return [f"{name} {metadata.version(name)}" for name in sorted(set(distributions))]


def counts_step(runs: Path, recipe: Recipe, dataset: Dataset) -> Step:
    mixer = recipe.evaluate.mixer
    experts = [list(mixer.orders), list(mixer.match_lengths)]
    return step(runs, "counts", dataset.valid_sha256, dataset.vocab_size, *experts)


def record_folder(runs: Path, record: str) -> Path:
    return runs / "_records" / record


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the record: a second driver of the same record is told so."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "record.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"another driver is at work on this record ({folder}); wait for it or stop it") from None
        yield


@contextmanager
def machine_to_itself(waiting: Callable[[], None]) -> Iterator[None]:
    """Hold this machine among records that each start a Ray of their own: timed training shares it with nobody.
    Calls `waiting` when there is another to wait for."""
    path = Path(tempfile.gettempdir()) / f"hedgemix-{os.getuid()}.lock"
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
