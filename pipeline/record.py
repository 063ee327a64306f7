"""The command: train, quantize and evaluate every seed of a recipe, and write and print one results table.

    python pipeline/record.py                      the recipe for this machine: laptop, or single_gpu with a GPU
    python pipeline/record.py RECIPE --help        every field of a recipe, with its default
    python pipeline/record.py RECIPE --plan        what it would ask for and do, without doing it

The same command again does only what is missing. Exit code: 0 every seed done, 1 a seed failed, 2 nothing was started
because something is wrong with the recipe, the data or the machine.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Read by Ray when it is imported. The first is how often Ray Train looks at its workers (its default, 2 s, is the
# least a job takes to notice anything).
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import tyro
from rich.console import Console

from hedgemix import dataset as datasets
from hedgemix import recipes
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
from hedgemix.dataset import Dataset
from hedgemix.files import write_json
from pipeline import driver, report, results, runs
from pipeline.rows import build_row

OBJECT_STORE_BYTES = 256 * 2**20
"""Of our own Ray; tasks hand each other paths, so it needs little."""


@dataclass(frozen=True)
class Options:
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    quantize: QuantizeConfig
    evaluate: EvaluateConfig
    compute: ComputeConfig
    limits: LimitsConfig
    seeds: tuple[int, ...] = (1337, 42, 7)
    """One training run, and one row of the table, each."""
    out: Path = field(default_factory=lambda: Path("runs"))
    """The runs folder; on a cluster an absolute path on storage that every node shares."""
    record: str = ""
    """Name of the record, and of its parquet file (default: the recipe's name and its configuration's hash)."""
    plan: bool = False
    """Print what the record would ask for, and stop."""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        recipe, options = parse(arguments)
        recipes.validate(recipe)
        if options.plan:
            report.print_plan(recipe, options.seeds, console)
            return 0
        return run(recipe, options, console)
    except RecipeError as error:
        errors.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from here")
        return 130


def parse(arguments: list[str]) -> tuple[Recipe, Options]:
    """The recipe named first (or the one for this machine), with every field overridable by an option."""
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
    if any(character in options.record for character in "/\\") or options.record.startswith((".", "_")):
        raise RecipeError(f"--record {options.record!r} names a file; leave out slashes and a leading . or _")
    return Recipe(recipe=name, **{part: getattr(options, part) for part in parts}), options


def default_recipe() -> str:
    import torch

    return "single_gpu" if torch.cuda.is_available() else "laptop"


def run(recipe: Recipe, options: Options, console: Console) -> int:
    out = runs_folder(options.out)
    record = options.record or f"{recipe.recipe}-{config_hash(recipe)[:8]}"
    folder = runs.record_folder(out, record)
    with runs.locked(folder):
        write_json(folder / "recipe.json", to_dict(recipe))
        dataset = prepare(recipe, out, console)
        steps = [runs.seed_steps(out, recipe, dataset, seed) for seed in options.seeds]
        if all(each.done() for each in steps):
            rows = [build_row(record, recipe, dataset, each, None) for each in steps]
            results.write(out, rows)
            console.print(f"record {record}: all {len(rows)} seeds were done before; nothing to do")
        else:
            start_ray(console)
            try:
                rows = driver.drive(record, recipe, dataset, out, options.seeds, console)
            finally:
                ray.shutdown()
        report.print_results(rows, results.table_path(out, record), console)
    return 1 if any(row.status != "done" for row in rows) else 0


def runs_folder(out: Path) -> Path:
    """Absolute, and refused where it would vanish with a job's working directory."""
    unpacked = "working_dir_files" in Path.cwd().parts
    if unpacked and not out.is_absolute():
        raise RecipeError(
            f"--out {out} is relative, and a job's working directory is removed after it; give an absolute path on "
            "storage that all nodes share"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {out} cannot be made: {error.strerror}") from None
    return out.resolve()


def prepare(recipe: Recipe, out: Path, console: Console) -> Dataset:
    """The dataset the recipe names, made once a runs folder, and checked against what one step and one window take."""
    step = runs.data_step(out, recipe.data)

    def work() -> dict[str, object]:
        dataset = datasets.prepare(recipe.data, step.folder, log=lambda line: console.print(f"data: {line}"))
        datasets.save(dataset, step.folder)
        return {"valid_tokens": dataset.valid_tokens}

    runs.perform(step, work)
    dataset = datasets.load(step.folder)
    calibration = recipe.train.calibration_sequences * recipe.train.sequence_tokens
    datasets.check(dataset, max(recipe.train.batch_tokens, calibration) + 1, recipe.evaluate.window_tokens + 1)
    return dataset


def start_ray(console: Console) -> None:
    """Join the cluster this runs on, else start Ray on this machine alone."""
    if driver.on_cluster():
        ray.init(log_to_driver=False, logging_level="ERROR")
        return
    console.print("starting Ray on this machine")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
