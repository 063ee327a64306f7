"""What variants of a recipe are worth at equal time: each is trained on the CPU for as long as the others.

    python -m benchmarks.quality.equal_time laptop prose.txt.zst web.jsonl --variants parts.toml --out bench/parts

First the CPU milliseconds of a step are measured: all kinds of step (with the loop of layers and without, each length
of sequence) of all variants, step by step in turns, one thread. Steps that differ in rates and start values, or in a
text whose documents they do not ask for, are one piece of work. As many steps as fit into --seconds make a run, at the
fractions of it that a clock would have shown. A run trains as a record does, exports as a record does into what the
recipe's limit leaves beside code and memory, and scores a text's end, which was held out, by the artifact that was read
back. The memory itself is left out: the network does not read it, and with --mixed the mixture begins without it.

A line of JSON a run goes to runs.jsonl in --out; a run that has its line is not run again, nor is work measured twice.
Prints a markdown table a text, paired by seed, with Student's interval of the differences to --base, and after every
variant leaves it in table.md.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.quality.held_out_end import dataset_of
from hedgemix import stages
from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.config import Recipe, RecipeError, config_hash
from hedgemix.data import bpb
from hedgemix.data import dataset as datasets
from hedgemix.data.dataset import Dataset
from hedgemix.evaluate.evaluator import score_model
from hedgemix.experts.registry import EXPERTS
from hedgemix.model.linear import QAT_LEVELS
from hedgemix.recipes import RECIPES
from hedgemix.standalone import script
from hedgemix.train import trainer
from hedgemix.train.schedule import StepKind, step_kind
from hedgemix.validate import check_recipe
from pipeline.analysis.significance import summary
from pipeline.study import fields
from pipeline.study.variants import BASE, Variant, read_variants

NO_WORK = {"zero_outputs", "growth_fractions", "steps"}
"""Fields of model and training, beside their floats, that change nothing of what a step of one kind computes."""
SCORES = {"bpb": "artifact", "bpb_full": "before export", "bpb_mixed": "mixture"}
GRID = 10_000
"""Points of a run at which its kind of step is looked up."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    recipe: tyro.conf.Positional[str]
    """A recipe's name; its texts are those named here."""
    texts: tyro.conf.Positional[tuple[Path, ...]]
    """Files or folders of documents, a text each, as data.paths takes them."""
    out: Path
    """Folder for runs' lines, measured steps and tokenized texts."""
    variants: str = ""
    """A TOML file of [[variant]] tables."""
    change: tuple[tuple[str, str], ...] = ()
    """FIELD VALUE, any number of pairs: change the recipe first, for all variants."""
    base: str = BASE
    """What differences are to: the recipe, or a variant's name."""
    seeds: tuple[int, ...] = (1337, 42, 7)
    seconds: float = 40.0
    """CPU seconds of training steps, at their measured cost, of a run."""
    held_bytes: int = 200_000
    """Of each text's end, in whole documents."""
    rounds: int = 60
    """Turns in which steps are measured, one of each work a turn."""
    mixed: bool = False
    """Score the recipe's mixture too."""


@dataclass(frozen=True)
class Task:
    """A variant on one text."""

    name: str
    recipe: Recipe
    text: str
    dataset: Dataset

    @property
    def kinds(self) -> dict[StepKind, float]:
        """Of step, and the first fraction of a run that has each."""
        loops, found = bool(self.recipe.model.looped_layers), dict[StepKind, float]()
        for fraction in (np.arange(GRID) / GRID).tolist():
            found.setdefault(step_kind(self.recipe.train, loops, fraction), fraction)
        return found

    def work(self, kind: StepKind) -> str:
        """What a step computes, as a name. Floats are rates, fractions and start values: they change none of it."""
        parts = asdict(self.recipe.model) | asdict(self.recipe.train)
        kept = {name: v for name, v in parts.items() if not isinstance(v, float | None) and name not in NO_WORK}
        text = self.text if self.recipe.model.within_documents else ""
        return json.dumps([text, self.recipe.data.vocab_size, kind, kept])


def measure(options: Options) -> Iterator[str]:
    """Run what has no line yet, a variant after the other on all texts and seeds; yield the tables after each. Raises
    RecipeError for variants or texts that cannot work."""
    chosen = variants_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    runs, costs = options.out / "runs.jsonl", Costs(options.out / "costs.json", options.rounds)
    todo = [
        Task(each.name, each.recipe, path.name, dataset_of(path, each.recipe.data, options.held_bytes, options.out))
        for each in chosen
        for path in options.texts
    ]
    costs.measure(todo)
    known = {line["key"]: line for line in map(json.loads, runs.read_text().splitlines())} if runs.exists() else {}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {path.name: {} for path in options.texts}
    for task in todo:
        for seed in options.seeds:
            parts = asdict(task.recipe), task.dataset.train_sha256, task.dataset.valid_sha256
            key = config_hash(*parts, seed, options.seconds, options.mixed)
            if key not in known:
                about = {"key": key, "text": task.text, "variant": task.name, "seed": seed}
                known[key] = about | run(task, seed, costs.of(task), options)
                with runs.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
                print(json.dumps(known[key]), file=sys.stderr, flush=True)
            found[task.text].setdefault(task.name, []).append(known[key])
        if task.text == options.texts[-1].name and options.base in found[task.text]:
            yield "\n\n".join(f"{text}\n\n{markdown(lines, options.base)}" for text, lines in found.items())


def variants_of(options: Options) -> list[Variant]:
    """The recipe, under the name BASE, and its variants; raises RecipeError for any that cannot work."""
    if options.recipe not in RECIPES:
        raise RecipeError(f"there is no recipe {options.recipe!r}; choose from {', '.join(RECIPES)}")
    changes = {fields.full_name(name): value for name, value in options.change}
    values = {name: fields.parse_value(name, value) for name, value in changes.items()}
    recipe = fields.with_values(RECIPES[options.recipe](), values)
    alone = replace(recipe.compute, workers=1, evaluate_workers=1, gpus_per_worker=0, checkpoint_seconds=1e9)
    recipe = replace(recipe, compute=alone)

    def check(each: Recipe) -> None:
        check_recipe(each, QAT_LEVELS, EXPERTS)

    check(recipe)
    found = [Variant(BASE, {}, recipe)]
    found += read_variants(recipe, (), False, options.variants, check) if options.variants else []
    names = [each.name for each in found]
    if options.base not in names:
        raise RecipeError(f"--base {options.base!r} is none of the variants; choose from {', '.join(names)}")
    return found


class Costs:
    """CPU milliseconds of a step by its work, kept in a file. What is measured later goes by its ratio to the first
    task's work in the same turns, so that how busy the machine was is not in it."""

    def __init__(self, path: Path, rounds: int) -> None:
        self.path, self.rounds = path, rounds
        self.ms: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, task: Task) -> dict[StepKind, float]:
        return {kind: self.ms[task.work(kind)] for kind in task.kinds}

    def measure(self, tasks: Sequence[Task]) -> None:
        """Measure what is not known of the tasks yet, in turns with the first one's first kind of step."""
        places = dict[str, tuple[Task, float]]()
        for task in tasks:
            for kind, fraction in task.kinds.items():
                places.setdefault(task.work(kind), (task, fraction))
        first, missing = next(iter(places)), [key for key in places if key not in self.ms]
        if missing:
            found = in_turns({key: places[key] for key in dict.fromkeys([first, *missing])}, self.rounds)
            base = self.ms.get(first, statistics.fmean(found[first]))
            self.ms |= {key: base * sum(found[key]) / sum(found[first]) for key in missing}
            self.path.write_text(json.dumps(self.ms, indent=1))


def in_turns(places: dict[str, tuple[Task, float]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of a step a round, of runs of these tasks at these fractions; the order turns."""
    found: dict[str, list[float]] = {key: [] for key in places}
    with ExitStack() as stack:
        runs = {key: trainer.build(task.recipe, task.dataset, 0, CPU) for key, (task, _) in places.items()}
        for each in runs.values():
            stack.enter_context(closing(each.read))
        for number in range(rounds + 1):
            start = number % len(runs)
            for key in [*runs, *runs][start : start + len(runs)]:
                began = time.process_time()
                runs[key].train_step(places[key][1])
                if number:  # the first is to warm up
                    found[key].append(1000 * (time.process_time() - began))
    return found


def schedule(task: Task, ms: dict[StepKind, float], seconds: float) -> list[float]:
    """The fraction of the run at which each of its steps begins, by a clock that moves by what its kind takes."""
    fractions, elapsed_ms, loops = list[float](), 0.0, bool(task.recipe.model.looped_layers)
    while elapsed_ms < 1000 * seconds:
        fractions.append(elapsed_ms / (1000 * seconds))
        elapsed_ms += ms[step_kind(task.recipe.train, loops, fractions[-1])]
    return fractions


def run(task: Task, seed: int, ms: dict[StepKind, float], options: Options) -> dict[str, Any]:
    """Train, export and score one seed; what its line says of it."""
    recipe, dataset = task.recipe, task.dataset
    room_bytes = stages.artifact_room(recipe, script.n_bytes(recipe)) - recipe.data.memory_bytes
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given: dict[str, Any] = {"recipe": recipe, "dataset": dataset, "folder": folder}
        began = time.process_time()
        trained = trainer.train(**given, seed=seed, device=CPU, fractions=schedule(task, ms, options.seconds))
        seconds = time.process_time() - began
        full = stages.score_stage(recipe=recipe, dataset=dataset, train_folder=folder)
        exported = stages.quantize_stage(**given, seed=seed, train_folder=folder, room_bytes=room_bytes)
        path = folder / stages.ARTIFACT
        nats = score_model(load_model(artifact.read(path)), datasets.valid_stream(dataset), recipe.evaluate)
        scores = {"bpb": bpb.bits_per_byte(nats, dataset.valid_bytes), "bpb_full": full.bpb_full}
        if options.mixed:
            stages.counts_stage(**given)
            mixed = stages.evaluate_stage(**given, artifact_path=path, index_folder=folder / stages.INDEX)
            scores["bpb_mixed"] = mixed.bpb_final
    assert dataset.train_bytes is not None
    read_bytes = trained.steps * recipe.train.batch_tokens * dataset.train_bytes / dataset.train_tokens
    numbers = {"steps": trained.steps, "ms": 1000 * options.seconds / trained.steps}
    beside = {"artifact_bytes": exported.artifact_bytes, "train_cpu_seconds": seconds, "load": os.getloadavg()[0]}
    return {**scores, **numbers, "text_bytes_per_second": read_bytes / options.seconds, **beside}


def markdown(lines: dict[str, list[dict[str, Any]]], base: str) -> str:
    """The table of one text: means over seeds, and differences to the base by seed."""
    shown = [score for score in SCORES if score in lines[base][0]]
    head = " | ".join(f"{SCORES[score]} | to {base} (95 %)" for score in shown)
    out = [
        f"| variant | {head} | better seeds | ms a step | steps | text, bytes a CPU second |",
        f"|---|{'---:|' * (2 * len(shown) + 4)}",
    ]
    for name, mine in lines.items():
        by = {score: [one[score] - its[score] for one, its in zip(mine, lines[base], strict=True)] for score in shown}
        means = {number: statistics.fmean(one[number] for one in mine) for number in mine[0] if number not in TEXTS}
        cells = [f"**{name}**" if name == base else name]
        for score in shown:
            cells += [f"{means[score]:.4f}", told(by[score]) if name != base else ""]
        cells.append(f"{sum(each < 0 for each in by['bpb'])} of {len(mine)}" if name != base else "")
        cells += [f"{means['ms']:.1f}", f"{means['steps']:,.0f}", f"{means['text_bytes_per_second']:,.0f}"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


TEXTS = ("key", "text", "variant")
"""Of a line, what is no number."""


def told(by: Sequence[float]) -> str:
    """A mean, with Student's interval where there are two values or more."""
    found = summary(by)
    return f"{found.mean:+.4f}" + (f" ({found.low:+.4f} to {found.high:+.4f})" if found.count > 1 else "")


def main(options: Options) -> None:
    torch.set_num_threads(1)
    tables = ""
    try:
        for tables in measure(options):
            (options.out / "table.md").write_text(tables + "\n")
    except RecipeError as error:
        sys.exit(f"error: {error}")
    print(tables)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
