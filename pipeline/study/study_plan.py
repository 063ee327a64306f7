"""What a study will do before it does it: its steps by kind, those that are shared or done, seconds and GPU-hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from hedgemix.config import DataConfig, Recipe, RecipeError, config_hash, to_dict
from hedgemix.data import dataset as datasets
from hedgemix.data.dataset import Dataset
from pipeline.steps.graph import RecordPlan, data_step
from pipeline.steps.step import Step
from pipeline.storage.store import REMOTE_URI, Storage, storage_at
from pipeline.study.definition import Study
from pipeline.study.rounds import check_differ, plan_all

KINDS = ("data", "counts", "train", "score", "quantize", "evaluate")


@dataclass(frozen=True)
class Share:
    """Tells of one kind of step how often the records name one, how many those are, and what is left of them."""

    kind: str
    named: int
    different: int
    done: int
    seconds: float | None
    """Of all that are left; None when nothing tells."""
    gpu_seconds: float
    source: str
    """What the seconds are from."""


def storage_of(out: str) -> Storage:
    """Name the storage of `--out` without making anything there."""
    return storage_at(out) if REMOTE_URI.match(out) else Storage("", Path(out).resolve())


def text_of(storage: Storage, config: DataConfig) -> tuple[Dataset, Step]:
    """Load the dataset where it is made; else stand in for it with one that differs where its configuration does."""
    step = data_step(storage, config)
    if step.record() is not None and storage.pull(step.folder / datasets.FILE_NAME):
        return datasets.load(step.folder), step
    values = to_dict(config)
    memory_bytes, scored_tokens = values.pop("memory_bytes"), values.pop("max_valid_tokens")
    text, scored = config_hash(values), config_hash(values, scored_tokens)
    memory = config_hash(values, memory_bytes) if memory_bytes else ""
    stand_in = Dataset(
        source=config.source, train_shards=(), valid_shards=(), tokenizer="", vocab_size=config.vocab_size,
        train_tokens=0, valid_tokens=max(2, scored_tokens), max_valid_tokens=scored_tokens, valid_bytes=0,
        train_documents=0, valid_documents=0, tokenizer_sha256=text, valid_sha256=scored, train_sha256=text,
        text_sha256=text, memory=memory, memory_sha256=memory,
    )  # fmt: skip
    return stand_in, step


def plans_of(study: Study, storage: Storage, seeds: Sequence[int]) -> list[RecordPlan]:
    """Name every step of a study that need not have begun. Raises RecipeError for a variant that changes nothing."""
    texts = {record.name: text_of(storage, record.recipe.data) for record in study.records}
    plans = plan_all(study, texts, {record.name: seeds for record in study.records})
    check_differ(plans)
    return plans


def steps_of(plan: RecordPlan) -> Iterator[Step]:
    """Yield every step of a record."""
    yield plan.data
    yield plan.counts
    for steps in plan.seeds.values():
        yield from steps.all()


def shares(plans: Sequence[RecordPlan]) -> list[Share]:
    """Count the steps of each kind over all records, those that are the same once, and what is left to do."""
    named = Counter(step.kind for plan in plans for step in steps_of(plan))
    different = {step.name: (step, plan.recipe) for plan in reversed(plans) for step in steps_of(plan)}
    found = []
    for kind in KINDS:
        mine = [(step.record(), recipe) for step, recipe in different.values() if step.kind == kind]
        measured = [float(record["seconds"]) for record, _ in mine if record is not None]
        left = [recipe for record, recipe in mine if record is None]
        seconds, source = expected(kind, left, measured)
        total = None if None in seconds else sum(each for each in seconds if each is not None)
        gpus = sum((each or 0.0) * gpus_of(kind, recipe) for each, recipe in zip(seconds, left, strict=True))
        found.append(Share(kind, named[kind], len(mine), len(measured), total, gpus, source if left else ""))
    return found


def expected(kind: str, left: Sequence[Recipe], measured: Sequence[float]) -> tuple[list[float | None], str]:
    """Return the seconds of each step that is left, by its recipe, and where they are from: steps of the kind that are
    done, else what the recipe allows; None for a kind that it sets no limit for."""
    if measured:
        return [sum(measured) / len(measured)] * len(left), f"mean of the {len(measured)} done"
    if kind == "train":
        timed = all(not recipe.train.steps for recipe in left)
        return [budget_of(recipe) for recipe in left], (
            "train.budget_seconds" if timed else "limits.train_seconds where steps are set, at most"
        )
    if kind == "evaluate":
        return [recipe.limits.evaluate_seconds for recipe in left], "limits.evaluate_seconds, at most"
    return [None] * len(left), "no limit of its own"


def budget_of(recipe: Recipe) -> float:
    """Return the seconds that a training gets, or with fixed steps may take."""
    return recipe.limits.train_seconds if recipe.train.steps else recipe.train.budget_seconds


def gpus_of(kind: str, recipe: Recipe) -> float:
    """Count the GPUs that a step of this kind holds."""
    compute = recipe.compute
    ranks = {"train": compute.workers, "evaluate": compute.evaluate_workers, "score": 1, "quantize": 1}
    return ranks.get(kind, 0) * compute.gpus_per_worker


def print_study_plan(study: Study, storage: Storage, seeds: Sequence[int], console: Console) -> None:
    """Print the records, their steps by kind, and the seconds and GPU-hours that are left."""
    try:
        plans = plans_of(study, storage, seeds)
    except OSError as error:
        raise RecipeError(f"--out {storage.where(storage.root)} cannot be read: {error}") from None

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"\nstudy {study.name}: {len(plans)} records of {len(seeds)} seeds")
    for record in study.records:
        line(f"  {record.variant}: {record.name}")
    found = shares(plans)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for heading in ("step", "named", "different", "done", "to do", "seconds", "from"):
        table.add_column(heading, justify="left" if heading in ("step", "from") else "right")
    for each in found:
        seconds = "?" if each.seconds is None else f"{each.seconds:,.0f}" if each.source else ""
        counts = (each.named, each.different, each.done, each.different - each.done)
        table.add_row(each.kind, *map(str, counts), seconds, each.source)
    console.print(table)
    total = sum(each.seconds or 0.0 for each in found)
    unknown = [each.kind for each in found if each.seconds is None]
    more = f", and {', '.join(unknown)}" if unknown else ""
    line(f"one after another: {total:,.0f} s{more}; {sum(each.gpu_seconds for each in found) / 3600:.2f} GPU-hours")
