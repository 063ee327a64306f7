"""A seed without Ray: its stages, from and into the pipeline's own folders, by processes as torchrun starts them.

torchrun --nproc-per-node 2 -m benchmarks.plain.launch --stages train ...
python -m benchmarks.plain.launch --stages quantize score counts ...
torchrun --nproc-per-node 2 -m benchmarks.plain.launch --stages evaluate ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from hedgemix import stages
from hedgemix.config import Recipe, from_dict
from hedgemix.data import dataset as datasets
from hedgemix.runtime import collectives
from hedgemix.runtime.files import read_json
from pipeline.steps import graph
from pipeline.steps.step import Made, Step, perform, save_outputs
from pipeline.storage.store import Storage


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
    data, seed = graph.data_step(Storage("", options.runs), recipe.data), options.seed
    dataset = datasets.load(data.folder)
    plan = graph.plan_record("plain", recipe, dataset, data, (seed,))
    steps, counts, room = plan.seeds[seed], plan.counts, plan.room_bytes
    trained, exported, folder = steps.train.folder, steps.quantize.folder, steps.evaluate.folder
    places: Any = {"artifact_path": exported / stages.ARTIFACT, "index_folder": counts.folder / stages.INDEX}
    given: Any = {"recipe": recipe, "dataset": dataset}
    work: dict[str, tuple[Step, Callable[[], dict[str, Any]]]] = {
        "train": (steps.train, lambda: asdict(stages.train_stage(**given, seed=seed, folder=trained))),
        "quantize": (
            steps.quantize,
            lambda: asdict(
                stages.quantize_stage(**given, seed=seed, train_folder=trained, folder=exported, room_bytes=room)
            ),
        ),
        "score": (steps.score, lambda: asdict(stages.score_stage(**given, train_folder=trained))),
        "counts": (counts, lambda: asdict(stages.counts_stage(**given, folder=counts.folder))),
        "evaluate": (
            steps.evaluate,
            lambda: asdict(stages.evaluate_stage(**given, **places, folder=folder)) | {"code_bytes": plan.code_bytes},
        ),
    }
    for name in options.stages:
        step, stage = work[name]
        step.folder.mkdir(parents=True, exist_ok=True)
        if collectives.rank() == 0:
            perform(step, partial(made, step, stage), {})
        else:
            stage()
    if dist.is_initialized():
        dist.destroy_process_group()


def made(step: Step, stage: Callable[[], dict[str, Any]]) -> Made:
    return save_outputs(step, stage())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
