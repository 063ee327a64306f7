"""A seed without Ray: its stages, from and into the pipeline's own folders, by processes as torchrun starts them.

torchrun --nproc-per-node 2 -m benchmarks.plain.launch --stages train ...
python -m benchmarks.plain.launch --stages quantize score counts ...
torchrun --nproc-per-node 2 -m benchmarks.plain.launch --stages evaluate ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from hedgemix import dataset as datasets
from hedgemix import ranks, script, stages
from hedgemix.checkpoint import nothing
from hedgemix.clock import never
from hedgemix.config import Recipe, from_dict
from hedgemix.files import read_json, silent
from pipeline import runs
from pipeline.steps import Made, Step, keep, perform
from pipeline.store import Storage


@dataclass(frozen=True)
class Options:
    runs: Path
    """The runs folder; its data step is done."""
    recipe: Path
    """A recipe.json whose compute.cpus_per_worker is not 0."""
    seed: int
    stages: tuple[str, ...]


def main(options: Options) -> None:
    recipe = from_dict(Recipe, read_json(options.recipe))
    torch.set_num_threads(max(1, int(recipe.compute.cpus_per_worker)))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    storage = Storage("", options.runs)
    dataset = datasets.load(runs.data_step(storage, recipe.data).folder)
    steps = runs.seed_steps(storage, recipe, dataset, options.seed)
    counts = runs.counts_step(storage, recipe, dataset)
    trained, exported, folder = steps.train.folder, steps.quantize.folder, steps.evaluate.folder
    artifact, index = exported / stages.ARTIFACT, counts.folder / stages.INDEX
    alone = silent, False, nothing, never
    code = script.n_bytes(recipe)
    room = stages.artifact_room(recipe, code)
    work: dict[str, tuple[Step, Callable[[], dict[str, Any]]]] = {
        "train": (
            steps.train,
            lambda: stages.train_stage(recipe, dataset, options.seed, trained, silent, None, nothing, never),
        ),
        "quantize": (
            steps.quantize,
            lambda: stages.quantize_stage(recipe, dataset, options.seed, trained, exported, room),
        ),
        "score": (steps.score, lambda: stages.score_stage(recipe, dataset, trained, silent)),
        "counts": (counts, lambda: stages.counts_stage(recipe, dataset, counts.folder)),
        "evaluate": (
            steps.evaluate,
            lambda: stages.evaluate_stage(recipe, dataset, artifact, index, folder, *alone) | {"code_bytes": code},
        ),
    }
    for name in options.stages:
        step, stage = work[name]
        step.folder.mkdir(parents=True, exist_ok=True)
        if ranks.rank() == 0:
            perform(step, partial(made, step, stage), {})
        else:
            stage()
    if dist.is_initialized():
        dist.destroy_process_group()


def made(step: Step, stage: Callable[[], dict[str, Any]]) -> Made:
    return keep(step, stage())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
