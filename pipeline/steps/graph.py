"""The steps of a record: which there are, what each is named by, and who may work on them.

Layout under the runs folder (names beginning with _ are skipped by `pandas.read_parquet`):

    <record>.parquet              one row a seed
    _steps/<kind>-<key>/          result.json, written last, and what the step made
    _records/<record>/            recipe.json, steps.json (the names of its steps), record.lock
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hedgemix import stages
from hedgemix.config import DataConfig, Recipe, config_hash, to_dict
from hedgemix.data import text_files
from hedgemix.data.dataset import Dataset
from hedgemix.data.reading import Problems, Reading
from hedgemix.evaluate import scoring_order
from hedgemix.runtime.layout import RESULT, STEP_NAMES
from hedgemix.standalone import script
from pipeline.steps.step import Step
from pipeline.storage.store import Storage

# Raise a step's number when its code changes what it makes from the same inputs: old results are then not reused.
VERSIONS = {"data": 3, "counts": 3, "train": 4, "score": 3, "quantize": 3, "evaluate": 7}


def step(storage: Storage, kind: str, *reads: Any) -> Step:
    """Name the step of this kind that reads exactly these configurations, hashes and parents' keys."""
    return Step(kind, config_hash(kind, VERSIONS[kind], *reads), storage)


@dataclass(frozen=True)
class SeedSteps:
    """Holds one seed's way through the pipeline."""

    seed: int
    train: Step
    score: Step
    quantize: Step
    evaluate: Step

    def all(self) -> tuple[Step, ...]:
        """Return the steps in an order in which each comes after those it reads."""
        return self.train, self.score, self.quantize, self.evaluate

    def records(self) -> dict[str, dict[str, Any]]:
        """Read the record of every step that stands, by its kind. One that read other files than its parent holds now,
        since that had to be made again, does not."""
        return self.judge()[0]

    def judge(self) -> tuple[dict[str, dict[str, Any]], dict[str, bytes]]:
        """Read the record of every step that stands, and the result.json of every other that has one, by their
        kinds."""
        found: dict[str, dict[str, Any]] = {}
        fallen: dict[str, bytes] = {}
        for step in self.all():
            content = step.storage.read_bytes(step.folder / RESULT)
            record = step.parse(content)
            if record is not None and all(
                same_files(found[kind], files) for kind, files in record["reads"].items() if kind in found
            ):
                found[step.kind] = record
            elif content is not None:
                fallen[step.kind] = content
        return found, fallen


def same_files(parent: dict[str, Any], sums: dict[str, str]) -> bool:
    """Say whether the parent's record has each of these files with this SHA-256."""
    return all(parent["files"].get(name, {}).get("sha256") == sha256 for name, sha256 in sums.items())


@dataclass(frozen=True)
class RecordPlan:
    """Says what a record is before it runs; made once, and read by all that name, do or tell its steps."""

    name: str
    recipe: Recipe
    """As it was written: no machine's share of CPUs is in it."""
    dataset: Dataset
    data: Step
    """What made the dataset."""
    seeds: dict[int, SeedSteps]
    counts: Step
    """The n-gram index of the validation text, for every seed."""
    chunks: int
    """Of an evaluation."""
    code_bytes: int
    """What the recipe's train_gpt.py takes."""
    room_bytes: int
    """Most bytes of an artifact."""
    study: str = ""
    """The study it belongs to; empty for a record by itself."""
    variant: str = ""
    """What it is called there."""

    @property
    def storage(self) -> Storage:
        """Return the storage that all steps lie in."""
        return self.data.storage


def plan_record(
    name: str,
    recipe: Recipe,
    dataset: Dataset,
    data: Step,
    seeds: Iterable[int],
    study: str = "",
    variant: str = "",
) -> RecordPlan:
    """Name every step of a record, in the storage of its data's step."""
    storage, code_bytes = data.storage, script.n_bytes(recipe)
    room_bytes = stages.artifact_room(recipe, code_bytes)
    return RecordPlan(
        name=name,
        recipe=recipe,
        dataset=dataset,
        data=data,
        seeds={seed: seed_steps(storage, recipe, dataset, seed, room_bytes) for seed in seeds},
        counts=counts_step(storage, recipe, dataset),
        chunks=len(scoring_order.chunks(dataset.valid_tokens, recipe.evaluate.chunk_tokens)),
        code_bytes=code_bytes,
        room_bytes=room_bytes,
        study=study,
        variant=variant,
    )


def seed_steps(storage: Storage, recipe: Recipe, dataset: Dataset, seed: int, room_bytes: int) -> SeedSteps:
    """Name the seed's steps. A step's key covers what it reads and its parent's key, so changing the mixer names a new
    evaluation and nothing else. The number of evaluating ranks is left out: it does not change the score."""
    compute, evaluate = recipe.compute, to_dict(recipe.evaluate)
    machine = [compute.workers, compute.gpus_per_worker, compute.cpus_per_worker]
    text = [dataset.train_sha256, dataset.tokenizer_sha256, dataset.vocab_size]
    train = step(storage, "train", recipe.model, recipe.train, machine, text, seed)
    order = {name: value for name, value in evaluate.items() if name not in ("ttt", "cache", "mixer")}
    score = step(storage, "score", train.key, order, dataset.valid_sha256)
    room = room_bytes if recipe.quantize.method == "stepped" else None
    quantize = step(storage, "quantize", train.key, recipe.quantize, room, *memory_of(dataset))
    evaluation = step(storage, "evaluate", quantize.key, evaluate, dataset.valid_sha256)
    return SeedSteps(seed, train, score, quantize, evaluation)


def data_step(storage: Storage, config: DataConfig) -> Step:
    """Name the data's step, which reads the configuration and what its source looks like now: package versions, or the
    names, sizes and times of files."""
    if config.source == "docs":
        found = script.distributions()
        source: list[Any] = [[name, installed_versions(found.get(name, []))] for name in config.packages]
    else:
        if config.source == "text":
            files = text_files.find(config.paths, Reading(), Problems()) if config.paths else []
        else:
            files = files_of(Path(config.shards_dir), (".bin", ".model")) if config.shards_dir else []
            files += [Path(config.tokenizer)] if config.tokenizer else []
        source = [
            [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()
        ]
    return step(storage, "data", config, source)


def files_of(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files of a folder whose names end in one of the suffixes."""
    return sorted(file for file in path.rglob("*") if file.name.endswith(suffixes))


def installed_versions(distributions: Iterable[str]) -> list[str]:
    """List these packages with the versions that are installed, sorted."""
    return [f"{name} {metadata.version(name)}" for name in sorted(set(distributions))]


def counts_step(storage: Storage, recipe: Recipe, dataset: Dataset) -> Step:
    """Name the step that indexes the scored text's n-grams, which all seeds share."""
    mixer = recipe.evaluate.mixer
    experts = [list(mixer.orders), list(mixer.match_lengths)]
    return step(storage, "counts", dataset.valid_sha256, dataset.vocab_size, *experts, *memory_of(dataset))


def memory_of(dataset: Dataset) -> list[str]:
    """List what a step that reads the memory is named by: nothing where there is none."""
    return [dataset.memory_sha256, dataset.tokenizer_sha256] if dataset.memory else []


def keep_steps(plan: RecordPlan) -> None:
    """Leave in steps.json what names the record's steps, for who watches it without its data: {"seeds": {seed: {kind:
    name}}, "counts": name, "chunks": of an evaluation}. Seeds of earlier commands stay."""
    storage = plan.storage
    path = storage.record_folder(plan.name) / STEP_NAMES
    try:
        begun = dict(json.loads(storage.read_bytes(path) or b"")["seeds"])
    except (ValueError, KeyError, TypeError):  # new, or damaged
        begun = {}
    names = {str(each.seed): {step.kind: step.name for step in each.all()} for each in plan.seeds.values()}
    told = {
        "seeds": begun | names,
        "counts": plan.counts.name,
        "chunks": plan.chunks,
    }
    storage.write_bytes(path, (json.dumps(told, indent=1) + "\n").encode())
