"""The command: train, quantize and evaluate every seed of a recipe, and write and print one results table.

    python pipeline/record.py                      the recipe for this machine: laptop, or single_gpu with a GPU
    python pipeline/record.py RECIPE --help        every field of a recipe, with its default
    python pipeline/record.py RECIPE --plan        what it would ask for and do, without doing it
    python pipeline/record.py --status DIR         how far each record of a runs folder is, from any machine

The same command again does only what is missing. Exit code: 0 every seed is done, 1 one is not, 2 something is wrong
with the recipe, the data or the machine, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The script's folder leaves the path, and Ray's workers' with it, which they take over from here: in it any module
    # of ours would hide a library's of the same name.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]
    from pipeline.execution.stopping import exit_on_signals

    exit_on_signals()
    from hedgemix.runtime.streams import open_closed_streams

    open_closed_streams()

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # before the imports below, which take seconds and start threads
    if any(option.partition("=")[0] == "--status" for option in sys.argv[1:]):
        from pipeline.monitor import status_view

        code = status_view.main(sys.argv[1:])
        sys.stdout.flush()
        # Once Arrow has read a table, a few interpreters in a hundred abort on their way out, with another exit code.
        os._exit(code)
    from pipeline.execution.ray_address import settle_address

    if not settle_address():
        # Ray's processes and ours learn from this that nothing outside may reach a Ray of this machine alone: they
        # then listen on loopback instead of on every address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from pipeline.execution.ray_session import check_ray, ray_started  # first: it sets what Ray reads when it is imported

# isort: split
import tyro
from ray.exceptions import RayError
from rich.console import Console

from hedgemix import recipes, stages
from hedgemix.cli import check_arguments
from hedgemix.config import (
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    LimitsConfig,
    ModelConfig,
    QuantizeConfig,
    Recipe,
    RecipeError,
    TrainConfig,
    config_hash,
    to_dict,
)
from hedgemix.data import dataset as datasets
from hedgemix.data.dataset import Dataset
from hedgemix.data.reading import encodable
from hedgemix.experts.registry import EXPERTS
from hedgemix.model.transformer import QAT_LEVELS
from hedgemix.runtime.files import FIXES, told
from hedgemix.runtime.layout import LOCK, RECIPE
from hedgemix.validate import check_read, check_recipe
from pipeline.analysis.console import print_results
from pipeline.execution.driver import drive
from pipeline.execution.resources import on_cluster
from pipeline.execution.stopping import CODE, STOPPED, raise_on_signals
from pipeline.plan import print_plan
from pipeline.results.provenance import origin
from pipeline.results.row import build_row
from pipeline.results.schema import Row
from pipeline.results.table import check_ours, read_rows, renew, table_path, write_rows
from pipeline.steps.graph import RecordPlan, data_step, keep_steps, plan_record
from pipeline.steps.recovery import clocked, set_aside
from pipeline.steps.step import DamagedStepError, Made, Step, check, fetch, perform, save_outputs
from pipeline.storage.lock import hold
from pipeline.storage.store import Storage, open_storage
from pipeline.tracking.follower import check_trackers


@dataclass(frozen=True)
class Options:
    """Holds the options of the command: a recipe's parts, and what belongs to the run alone."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    quantize: QuantizeConfig
    evaluate: EvaluateConfig
    compute: ComputeConfig
    limits: LimitsConfig
    seeds: tuple[int, ...] = (1337, 42, 7)
    """One training run, and one row of the table, each."""
    out: str = "runs"
    """The runs folder; on a cluster an absolute path on storage that every node shares, or s3://bucket/prefix or
    gs://bucket/prefix."""
    record: str = ""
    """Name of the record, and of its parquet file (default: the recipe's name and its configuration's hash)."""
    profile: bool = False
    """Write torch profiles (profile.json.gz, profile.txt) of a few training steps, and of a chunk of the evaluation,
    into the folders of the steps that run now; these few take longer."""
    report: bool = True
    """Write the record's report (report.html, report.md) at the end; `hedgemix report` does it at any time."""
    track: tuple[Literal["tensorboard", "mlflow", "wandb", "none"], ...] = ("tensorboard",)
    """Where the numbers of a running record go, one or more; docs/watching.md."""
    plan: bool = False
    """Print what the record would ask for, and stop."""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    plain: dict[str, Any] = {"highlight": False, "markup": False}  # a name may hold [brackets]
    console, errors = Console(**plain), Console(stderr=True, **plain)
    try:
        raise_on_signals()
        check_arguments(arguments)
        recipe, options = parse(arguments)
        check_recipe(recipe, QAT_LEVELS, EXPERTS)
        if options.plan:
            print_plan(recipe, options.seeds, console)
            return 0
        return run(recipe, options, console)
    except RecipeError as error:
        errors.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return 2
    except (OSError, RayError) as error:
        place = isinstance(error, OSError) and error.errno in FIXES
        line = told(error) if isinstance(error, OSError) and place else f"{type(error).__name__}: {error}"
        errors.print(f"error: {line}", style="bold red", markup=False, soft_wrap=True)
        return 2 if place else 1
    except KeyboardInterrupt:
        errors.print(STOPPED)
        return CODE


def parse(arguments: list[str]) -> tuple[Recipe, Options]:
    """Parse the recipe named first (or the one for this machine), with every field overridable by an option. Raises
    RecipeError for an unknown recipe, no seeds or one named twice, a record's name that leads out of its folder, and
    places and fields that nothing can be done with."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else default_recipe()
    if name not in recipes.RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; choose one of {', '.join(recipes.RECIPES)}")
    parts = {part: value for part, value in vars(recipes.RECIPES[name]()).items() if part != "recipe"}
    options = tyro.cli(
        Options,
        default=Options(**parts),
        args=arguments[named:],
        prog=f"pipeline/record.py {name}",
        description=f"{__doc__}\nRecipe {name}: {recipes.RECIPES[name].__doc__} Others: "
        + ", ".join(other for other in recipes.RECIPES if other != name),
    )
    if len(set(options.seeds)) != len(options.seeds) or not options.seeds:
        raise RecipeError(f"--seeds {options.seeds}: name at least one seed, and each once")
    if wrong := [seed for seed in options.seeds if not 0 <= seed < 1 << 63]:
        raise RecipeError(f"--seeds {wrong[0]}: a seed is a number from 0 to {(1 << 63) - 1}")
    if not encodable(options.out):
        raise RecipeError(f"--out {options.out!r} is not UTF-8, which the table could not name; choose another folder")
    check_read(options.data, parts["data"])
    record = options.record
    if any(character in record for character in "/\\") or record.startswith((".", "_")) or not record.isprintable():
        raise RecipeError(f"--record {record!r} names a file; leave out slashes, controls and a leading . or _")
    return Recipe(recipe=name, **{part: getattr(options, part) for part in parts}), options


def default_recipe() -> str:
    """Name the recipe for this machine: single_gpu with a GPU, else laptop."""
    import torch

    return "single_gpu" if torch.cuda.is_available() else "laptop"


def run(recipe: Recipe, options: Options, console: Console) -> int:
    """Run the record from its lock to its report; returns the exit code: 0 when every seed is done, else 1. Raises
    RecipeError, OSError and RayError."""
    storage = open_storage(options.out)
    check_trackers(options.track, storage)
    record = options.record or f"{recipe.recipe}-{config_hash(recipe)[:8]}"
    folder = storage.record_folder(record)
    waiting = "another driver holds this record; waiting to see whether it lives"
    with hold(storage, folder / LOCK, lambda: console.print(waiting)) as lost:
        check_ours(storage, record)
        keep_recipe(storage, folder / RECIPE, recipe, record)
        if renewed := renew(storage):
            console.print(f"tables of an older version now have today's columns: {', '.join(renewed)}", markup=False)
        if data_step(storage, recipe.data).record() is None:
            check_ray()
            check_gpus(recipe)
        dataset, data = prepare(recipe, storage, console)
        plan = plan_record(record, recipe, dataset, data, options.seeds)
        keep_steps(plan)
        rows = finished(plan)
        if rows:
            write_rows(storage, rows)
            console.print(f"record {record}: all {len(rows)} seeds were done before; nothing to do")
        else:
            with ray_started(console):
                rows = drive(plan, console, profile=options.profile, lost_record=lost, track=options.track)
        print_results(rows, storage.where(table_path(storage, record)), console)
        if options.report:
            write_report(storage, record, console)
    return 1 if any(row.status != "done" for row in rows) else 0


def check_gpus(recipe: Recipe) -> None:
    """Raise RecipeError when the recipe asks for GPUs and this machine, alone, has none: before its text is made."""
    import torch

    if recipe.compute.gpus_per_worker and not on_cluster() and not torch.cuda.is_available():
        raise RecipeError(
            f"compute.gpus_per_worker is {recipe.compute.gpus_per_worker:g} and torch sees no GPU on this machine; set "
            "it to 0, check the driver, or name a cluster in RAY_ADDRESS"
        )


def write_report(storage: Storage, record: str, console: Console) -> None:
    """Write the report for people; nothing that goes wrong here fails a record."""
    from pipeline.analysis.records import Record
    from pipeline.report import build as report  # matplotlib takes a second to import, which work should not wait for

    try:
        rows = read_rows(storage, table_path(storage, record))
        path = report.write(Record(record, storage, rows))
        console.print(f"report: {storage.where(path)}", markup=False, soft_wrap=True)
    except Exception as error:
        console.print(f"no report: {type(error).__name__}: {error}", markup=False, soft_wrap=True)


def finished(plan: RecordPlan) -> list[Row]:
    """Build the rows of a record whose every seed is done and whose artifacts are what was written; else none."""
    standing = {seed: steps.records() for seed, steps in plan.seeds.items()}
    if not all(len(standing[seed]) == len(steps.all()) for seed, steps in plan.seeds.items()):
        return []
    try:
        for seed, steps in plan.seeds.items():
            check(steps.quantize, stages.ARTIFACT, standing[seed]["quantize"]["files"].get(stages.ARTIFACT))
    except DamagedStepError:
        return []
    counted = plan.counts.record()
    return [build_row(plan, seed, standing[seed], counted, None) for seed in plan.seeds]


def keep_recipe(storage: Storage, path: Path, recipe: Recipe, record: str) -> None:
    """Write the recipe where the record lies, or raise RecipeError when it was begun with another: one record is one
    recipe, its table compares seeds, not settings."""
    try:
        begun = json.loads(storage.read_bytes(path) or b"")
    except ValueError:  # new, or damaged: nothing else is lost with it
        storage.write_bytes(path, (json.dumps(to_dict(recipe), indent=1) + "\n").encode())
        return
    if begun != to_dict(recipe):
        where = storage.where(path)
        raise RecipeError(f"record {record} was begun with other settings ({where}); give this one another --record")


def prepare(recipe: Recipe, storage: Storage, console: Console) -> tuple[Dataset, Step]:
    """Make the dataset the recipe names, once a runs folder, and check it against what one step and one window take.
    Raises RecipeError."""
    step = data_step(storage, recipe.data)

    def work() -> Made:
        with clocked(step):
            dataset = datasets.prepare(recipe.data, step.folder, log=lambda line: console.print(f"data: {line}"))
            datasets.save(dataset, step.folder)
            return save_outputs(step, {"valid_tokens": dataset.valid_tokens})

    perform(step, work, origin())
    try:
        fetch(step)
    except DamagedStepError as damaged:
        console.print(f"damaged, made again: {damaged}", markup=False, soft_wrap=True)
        set_aside(step)
        perform(step, work, origin())
    dataset = datasets.load(step.folder)
    stages.check_data(recipe, dataset)
    return dataset, step


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as for --status above; Ray is shut down by now
