"""The command: train, quantize and evaluate every seed of a recipe, and write and print one results table.

    python pipeline/record.py                      the recipe for this machine: laptop, or single_gpu with a GPU
    python pipeline/record.py RECIPE --help        every field of a recipe, with its default
    python pipeline/record.py RECIPE --plan        what it would ask for and do, without doing it
    python pipeline/record.py RECIPE --vary FIELD VALUE...   a record of each value of a field too: docs/studies.md
    python pipeline/record.py --status DIR         how far each record of a runs folder is, from any machine

The same command again does only what is missing. Exit code: 0 every seed is done, 1 one is not, 2 something is wrong
with the recipe, the data or the machine, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # for the moment that the next import takes
    # The script's folder leaves the path, and Ray's workers' with it, which they take over from here: in it any module
    # of ours would hide a library's of the same name.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]
    from pipeline.execution.stopping import exit_on_signals

    exit_on_signals()
    from hedgemix.runtime.surroundings import settle

    settle()

import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

if __name__ == "__main__":  # before the imports below, which take seconds and start threads
    if any(option.partition("=")[0] == "--status" for option in sys.argv[1:]):
        from hedgemix import options as command_line
        from pipeline.monitor import status_view

        code = command_line.run(lambda: status_view.main(sys.argv[1:]))
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

from hedgemix import options as command_line
from hedgemix import recipes, stages
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
)
from hedgemix.data import dataset as datasets
from hedgemix.data import docstrings
from hedgemix.data.dataset import Dataset
from hedgemix.data.reading import encodable
from hedgemix.data.text_set import EncodeParts
from hedgemix.experts.registry import EXPERTS
from hedgemix.model.linear import QAT_LEVELS
from hedgemix.runtime.files import FIXES, told
from hedgemix.runtime.layout import RECIPE
from hedgemix.validate import check_read, check_recipe
from pipeline.analysis.console import print_results
from pipeline.execution import encode
from pipeline.execution.driver import drive
from pipeline.execution.resources import on_cluster
from pipeline.execution.stopping import CODE, STOPPED, raise_on_signals
from pipeline.execution.watchdog import RayLost
from pipeline.plan import print_plan
from pipeline.results.provenance import origin
from pipeline.results.schema import Row
from pipeline.results.settings import keep_recipe
from pipeline.results.table import check_ours, read_rows, renew, table_path
from pipeline.steps.graph import RecordPlan, data_step
from pipeline.steps.recovery import clocked, set_aside
from pipeline.steps.step import DamagedStepError, Made, Step, fetch, perform, save_outputs
from pipeline.storage.store import Storage, open_storage
from pipeline.study.console import show_study
from pipeline.study.definition import Study, StudyRecord, alone, default_name, hold_records, naming, of_variants
from pipeline.study.rounds import check_differ, plan_all, run_rounds
from pipeline.study.seeds import Seeds
from pipeline.study.study_plan import print_study_plan, storage_of
from pipeline.study.variants import Variant, read_variants
from pipeline.tracking.follower import check_trackers

LONGEST_STUDY = 80
"""Characters of a study's name, which begins the names of its records."""
FIELD_VALUES = tyro.conf.arg(metavar="FIELD VALUE...")


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
    """Print what the record, or the study, would ask for, and stop."""
    vary: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, FIELD_VALUES] = ()
    """A field of the recipe and values that it takes one at a time, each in a record of its own, all of them a study
    with the recipe as its base; once a field. Items of one value stand between commas."""
    cross: bool = False
    """Combine all values of all --vary instead."""
    variants: str = ""
    """A file of TOML with variants: [[variant]] tables of a name and fields."""
    study: str = ""
    """Name of the study, and of its base's record (default: as of a record)."""
    until: float | Literal["decided"] | None = None
    """Add seeds to the variants that need them, until the 95 % interval of the difference to the base, in bits per
    byte, is this narrow to each side; or until it is decided whether it is better or worse."""
    max_seeds: int = 10
    """With --until: most seeds of a variant."""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    plain: dict[str, Any] = {"highlight": False, "markup": False}  # a name may hold [brackets]
    console, errors = Console(**plain), Console(stderr=True, **plain)
    try:
        command_line.check_arguments(arguments)
        recipe, options = parse(arguments)
        check_recipe(recipe, QAT_LEVELS, EXPERTS)
        variants = variants_of(recipe, options)
        if options.plan:
            print_plan(recipe, options.seeds, console)
            if variants:
                storage = storage_of(options.out)
                study = name_records(storage, recipe, variants, options)
                print_study_plan(study, storage, options.seeds, console)
            return 0
        return run(recipe, variants, options, console)
    except RecipeError as error:
        errors.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return 2
    except (OSError, RayError) as error:
        if isinstance(error, BrokenPipeError) and command_line.output_is_unread():
            return command_line.READER_GONE
        place = isinstance(error, OSError) and error.errno in FIXES
        line = told(error) if isinstance(error, OSError) and place else f"{type(error).__name__}: {error}"
        errors.print(f"error: {line}", style="bold red", markup=False, soft_wrap=True)
        return 2 if place else 1
    except RayLost as lost:
        errors.print(str(lost), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        with suppress(OSError):  # of a terminal that is closed
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
    options = command_line.parse(
        Options,
        arguments[named:],
        f"pipeline/record.py {name}",
        default=Options(**parts),
        description=f"{__doc__ or ''}\nRecipe {name}: {recipes.RECIPES[name].__doc__ or ''} Others: "
        + ", ".join(other for other in recipes.RECIPES if other != name),
    )
    if len(set(options.seeds)) != len(options.seeds) or not options.seeds:
        raise RecipeError(f"--seeds {options.seeds}: name at least one seed, and each once")
    if wrong := [seed for seed in options.seeds if not 0 <= seed < 1 << 63]:
        raise RecipeError(f"--seeds {wrong[0]}: a seed is a number from 0 to {(1 << 63) - 1}")
    if not encodable(options.out):
        raise RecipeError(f"--out {options.out!r} is not UTF-8, which the table could not name; choose another folder")
    check_read(options.data, parts["data"])
    for option in ("record", "study"):
        given: str = getattr(options, option)
        if any(character in given for character in "/\\") or given.startswith((".", "_")) or not given.isprintable():
            raise RecipeError(f"--{option} {given!r} names a file; leave out slashes, controls and a leading . or _")
    return Recipe(recipe=name, **{part: getattr(options, part) for part in parts}), options


def default_recipe() -> str:
    """Name the recipe for this machine: single_gpu with a GPU, else laptop."""
    import torch

    return "single_gpu" if torch.cuda.is_available() else "laptop"


def variants_of(recipe: Recipe, options: Options) -> list[Variant]:
    """Read the variants that the options name, none without --vary and --variants. Raises RecipeError with all that is
    wrong with them, and for options that only a study has."""
    if not options.vary and not options.variants:
        given = {"--cross": options.cross, "--study": options.study, "--until": options.until is not None}
        if needless := [option for option, value in given.items() if value]:
            raise RecipeError(f"{needless[0]} is of a study; name its variants with --vary or --variants")
        return []
    if options.record:
        raise RecipeError("--record names one record, and a study has several; name it with --study")
    if len(options.study) > LONGEST_STUDY:
        raise RecipeError(f"--study has {len(options.study)} characters; take at most {LONGEST_STUDY}")
    if isinstance(options.until, float) and not 0 < options.until < math.inf:
        raise RecipeError(f"--until {options.until:g} is no width; give bits per byte above 0, or decided")
    if options.until is None and options.max_seeds != Options.max_seeds:
        raise RecipeError("--max-seeds is read with --until alone; name a rule, or leave it out")
    if options.until is not None and options.max_seeds < len(options.seeds):
        raise RecipeError(f"--max-seeds {options.max_seeds} is less than the {len(options.seeds)} of --seeds")
    default = recipes.RECIPES[recipe.recipe]().data

    def check_variant(variant: Recipe) -> None:
        check_recipe(variant, QAT_LEVELS, EXPERTS)
        check_read(variant.data, default)

    return read_variants(recipe, options.vary, options.cross, options.variants, check_variant)


def run(recipe: Recipe, variants: list[Variant], options: Options, console: Console) -> int:
    """Run a record, or a study of the recipe and its variants, from its locks to its report; returns the exit code: 0
    when every seed is done, else 1. Raises RecipeError, OSError and RayError."""
    raise_on_signals()  # until here a signal ends the process at once
    storage = open_storage(options.out, tell=lambda line: console.print(line, markup=False, soft_wrap=True))
    check_trackers(options.track, storage)
    study = name_records(storage, recipe, variants, options)
    name = study.base.name
    with ExitStack() as held:
        locks = hold_records(held, storage, study, console)
        for record in study.records:
            check_ours(storage, record.name)
        keep_recipes(storage, study, study.records[:1])
        if renewed := renew(storage):
            console.print(f"tables of an older version now have today's columns: {', '.join(renewed)}", markup=False)
        with ExitStack() as until_driven:
            start_ray = cache(lambda: until_driven.enter_context(ray_started(console)))
            texts = prepare_all(study, storage, console, encode.once_started(start_ray) if on_cluster() else None)
            check_differ(plan_all(study, texts, {record.name: options.seeds for record in study.records}))
            keep_recipes(storage, study, study.variants)
            seeds = Seeds(study, options.seeds, options.until, options.max_seeds)

            def run_missing(plans: Sequence[RecordPlan]) -> dict[str, list[Row]]:
                start_ray()
                return drive(plans, console, profile=options.profile, locks=locks, track=options.track)

            rows = run_rounds(study, texts, seeds, run_missing, locks, console)
        if study.name:
            show_study(storage, name, options.report, console)
            return exit_code(rows)
        print_results(rows[name], storage.where(table_path(storage, name)), console)
        if options.report:
            write_report(storage, name, console)
    return exit_code(rows)


def name_records(storage: Storage, recipe: Recipe, variants: list[Variant], options: Options) -> Study:
    """Name the record of the recipe, and those of its variants. Raises RecipeError for a name that is taken."""
    name = options.study or options.record or default_name(recipe)
    return of_variants(storage, name, recipe, variants) if variants else alone(recipe, name)


def keep_recipes(storage: Storage, study: Study, records: Sequence[StudyRecord]) -> None:
    """Keep the recipes of these records of the study, as `keep_recipe` does. Raises RecipeError."""
    for record in records:
        try:
            keep_recipe(storage, storage.record_folder(record.name) / RECIPE, record.recipe, record.name)
        except RecipeError as error:
            raise RecipeError(str(error).replace("--record", "--study") if study.name else str(error)) from None


def exit_code(rows: dict[str, list[Row]]) -> int:
    """Return 0 when every seed of these records is done, else 1."""
    return 1 if any(row.status != "done" for each in rows.values() for row in each) else 0


def prepare_all(
    study: Study, storage: Storage, console: Console, encode_parts: EncodeParts | None = None
) -> dict[str, tuple[Dataset, Step]]:
    """Make the text of every record, by its name, each that differs once, as `prepare` does. Raises RecipeError, also
    when a variant asks for more text than there is."""
    made: dict[str, tuple[Dataset, Step]] = {}
    texts, steps = {}, {record.name: data_step(storage, record.recipe.data) for record in study.records}
    for record in study.records:
        data = record.recipe.data
        if data.source == "docs" and steps[record.name].record() is None:
            with naming(record):
                docstrings.find(data.packages)  # before another's text is made, which takes a while
    for record in study.records:
        recipe, step = record.recipe, steps[record.name]
        if step.record() is None:
            check_ray()
            check_gpus(recipe)
        with naming(record):
            if step.name not in made:
                made[step.name] = prepare(recipe, storage, console, encode_parts)
            stages.check_data(recipe, made[step.name][0])
        texts[record.name] = made[step.name]
    return texts


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


def prepare(
    recipe: Recipe, storage: Storage, console: Console, encode_parts: EncodeParts | None = None
) -> tuple[Dataset, Step]:
    """Make the dataset the recipe names, once a runs folder, and check it against what one step and one window take.
    encode_parts: what encodes its text instead of this machine's cores. Raises RecipeError."""
    step = data_step(storage, recipe.data)

    def work() -> Made:
        with clocked(step):
            dataset = datasets.prepare(
                recipe.data, step.folder, lambda line: console.print(f"data: {line}"), encode_parts
            )
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
    code = command_line.run(lambda: main(sys.argv[1:]))
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # as for --status above; Ray is shut down by now
