"""One seed from its data to its score without a cluster: by the processes that torchrun started, or by this one.

A train_gpt.py runs this (see `script`). The stages are the pipeline's, so the numbers are too. Under --out: data,
train, score, quantize, counts and evaluate, each with result.json, written last; the same command goes on where it was
stopped, with the seconds it had used.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from hedgemix import stages
from hedgemix.config import ComputeConfig, Recipe, RecipeError, from_dict, to_dict
from hedgemix.data import dataset as datasets
from hedgemix.evaluate.evaluator import EvaluateResult
from hedgemix.runtime import collectives
from hedgemix.runtime.cpus import available_cpus
from hedgemix.runtime.files import Log, read_json, silent, told, write_json
from hedgemix.runtime.layout import RECIPE, RESULT
from hedgemix.stages import CountsResult, QuantizeResult, RunOptions, ScoreResult, TrainStageResult
from hedgemix.train.step_log import DivergedError

FIRST_SEED = 1337
PATIENCE = timedelta(hours=2)
"""How long processes wait for the one that prepares data, quantizes and scores."""
TEXTS = ("train_sha256", "valid_sha256", "tokenizer_sha256")


Result = TypeVar("Result", bound=Any)


class Results(NamedTuple):
    """Holds what the stages of one seed give."""

    train: TrainStageResult
    score: ScoreResult
    quantize: QuantizeResult
    evaluate: EvaluateResult


def main(values: dict[str, Any], sources: Mapping[str, str], code_bytes: int, arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0 within the recipe's limits, 1 over one, 2 for a mistake.

    values: the recipe as JSON; sources: the library's, by module; code_bytes: what counts beside the artifact.
    """
    options = parse(arguments)
    try:
        if options.unpack:
            unpack(options.unpack, sources, values)
            return 0
        if not 0 <= (options.seed or 0) < 1 << 63:
            raise RecipeError(f"--seed {options.seed}: give one from 0 to 2**63 - 1")
        recipe = placed(from_dict(Recipe, values), options)
        return run(recipe, options, code_bytes)
    except (RecipeError, DivergedError, OSError) as error:
        print(f"error: {told(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of train_gpt.py; exits with 2 for options that it does not have."""
    parser = argparse.ArgumentParser(description="Train, quantize and score one seed of the recipe in this file.")
    add = parser.add_argument
    add("--seed", type=int, help=f"of the weights and the order of the text (default: the log's, else {FIRST_SEED})")
    add("--out", type=Path, help="folder for all that is made (default: seed<SEED>); the same command goes on in it")
    add("--data", nargs="+", help="where the text lies on this machine, instead of the recipe's shards_dir or paths")
    add("--replay", type=Path, metavar="LOG", help="repeat the steps of a train_seed<SEED>.log or log.jsonl exactly")
    add("--cpus", type=float, default=0.0, help="threads of each process (default: the recipe's, else its share)")
    add("--unpack", type=Path, metavar="DIR", help="write the library's source and the recipe there, and stop")
    return parser.parse_args(arguments)


def unpack(folder: Path, sources: Mapping[str, str], values: dict[str, Any]) -> None:
    """Write sources and recipe.json as files in the folder. Raises RecipeError when it holds any."""
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"--unpack {folder} is not empty; name a new folder")
    for name, source in sources.items():
        package = any(other.startswith(name + ".") for other in sources)
        path = folder.joinpath(*name.split("."))
        path = path / "__init__.py" if package else path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    write_json(folder / RECIPE, values)
    print(f"{len(sources)} modules and recipe.json in {folder}")


def placed(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """Put what an option says of this machine into the recipe. Raises RecipeError for --data where packages are
    read."""
    data, compute = recipe.data, recipe.compute
    if options.cpus:
        compute = replace(compute, cpus_per_worker=options.cpus)
    if options.data and data.source == "shards":
        folder = Path(options.data[0])
        model = folder / Path(data.tokenizer).name
        data = replace(data, shards_dir=str(folder), tokenizer=str(model) if data.tokenizer and model.is_file() else "")
    elif options.data and data.source == "text":
        data = replace(data, paths=tuple(options.data))
    elif options.data:
        raise RecipeError("--data is for shards and text; this recipe reads installed packages (requirements.txt)")
    return replace(recipe, data=data, compute=compute)


def run(recipe: Recipe, options: argparse.Namespace, code_bytes: int) -> int:
    """Run one seed in this process, one of torchrun's; returns the exit code. Raises RecipeError for a number of
    processes that is not the recipe's, and for a seed that is not the log's."""
    processes, rank, compute = world(), int(os.environ.get("RANK", 0)), recipe.compute
    wanted = max(compute.workers, compute.evaluate_workers)
    if processes != wanted:
        raise RecipeError(
            f"the recipe trains with {compute.workers} processes and evaluates with {compute.evaluate_workers}, and "
            f"there are {processes}; start it with torchrun --standalone --nproc_per_node={wanted}"
        )
    logged_run, fractions = replayed(options.replay) if options.replay else ({}, None)
    seed = next((each for each in (options.seed, logged_run.get("seed")) if each is not None), FIRST_SEED)
    if logged_run.get("seed", seed) != seed:
        raise RecipeError(f"--seed {seed}: {options.replay} is of seed {logged_run['seed']}; leave --seed out")
    out = options.out or Path(f"seed{seed}")
    say = print if rank == 0 else lambda line, **_: None
    if compute.gpus_per_worker and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if rank == 0:
        begin(out, {"seed": seed, "recipe": to_dict(recipe), "steps": fingerprint(fractions)})
    results = work(recipe, seed, out, stages.artifact_room(recipe, code_bytes), logged_run, fractions, say)
    return report(recipe, seed, results, code_bytes, out, say) if results else 0


def world() -> int:
    """Return the number of torchrun's processes; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def begin(out: Path, mine: dict[str, Any]) -> None:
    """Write down which run the folder is, or raise RecipeError when it is another: what stands in it is gone on
    with."""
    path = out / "run.json"
    if path.is_file() and read_json(path) != mine:
        raise RecipeError(f"{out} holds another run ({path}); name another --out")
    write_json(path, mine)


def work(
    recipe: Recipe,
    seed: int,
    out: Path,
    room: int,
    logged_run: Mapping[str, Any],
    fractions: list[float] | None,
    say: Callable[..., None],
) -> Results | None:
    """Do all stages, each on the ranks it takes; returns their results on rank 0."""
    train = train_on_ranks(recipe, seed, out, logged_run, fractions, say)
    made = score_and_quantize(recipe, seed, out, room, say) if int(os.environ.get("RANK", 0)) == 0 else None
    evaluate = evaluate_on_ranks(recipe, out, say)
    return Results(train, *made, evaluate) if train and made and evaluate else None


def train_on_ranks(
    recipe: Recipe,
    seed: int,
    out: Path,
    logged_run: Mapping[str, Any],
    fractions: list[float] | None,
    say: Callable[..., None],
) -> TrainStageResult | None:
    """Make the data on rank 0, then train on as many ranks as that takes; None on the others."""
    compute, folder = recipe.compute, out / "train"
    use_share_of_cpus(compute, compute.workers)
    with group("train", compute.workers, compute.gpus_per_worker) as mine:
        if not mine:
            return None
        if collectives.rank() == 0:
            prepare(recipe, out / "data", logged_run, say)
        collectives.barrier()
        dataset, options = datasets.load(out / "data"), RunOptions(log=shown("train", say))
        result = standing(
            folder,
            TrainStageResult,
            lambda: stages.train_stage(
                recipe=recipe, dataset=dataset, seed=seed, folder=folder, options=options, fractions=fractions
            ),
        )
        forget_training(recipe)
    return result


def score_and_quantize(
    recipe: Recipe, seed: int, out: Path, room: int, say: Callable[..., None]
) -> tuple[ScoreResult, QuantizeResult]:
    """Do what stands between training and evaluation, the index of n-grams too, in this process."""
    train, folder, counts = out / "train", out / "quantize", out / "counts"
    dataset = datasets.load(out / "data")
    score = standing(
        out / "score",
        ScoreResult,
        lambda: stages.score_stage(recipe=recipe, dataset=dataset, train_folder=train, log=shown("score", say)),
    )
    say("quantize", flush=True)
    quantize = standing(
        folder,
        QuantizeResult,
        lambda: stages.quantize_stage(
            recipe=recipe, dataset=dataset, seed=seed, train_folder=train, folder=folder, room_bytes=room
        ),
    )
    say(f"quantize: {quantize.artifact_bytes:,} bytes", flush=True)
    standing(counts, CountsResult, lambda: stages.counts_stage(recipe=recipe, dataset=dataset, folder=counts))
    return score, quantize


def evaluate_on_ranks(recipe: Recipe, out: Path, say: Callable[..., None]) -> EvaluateResult | None:
    """Evaluate on as many ranks as that takes; None on the others."""
    compute, folder = recipe.compute, out / "evaluate"
    use_share_of_cpus(compute, compute.evaluate_workers)
    with group("evaluate", compute.evaluate_workers, compute.gpus_per_worker) as mine:
        if not mine:
            return None
        collectives.barrier()
        dataset, options = datasets.load(out / "data"), RunOptions(log=shown("evaluate", say))
        return standing(
            folder,
            EvaluateResult,
            lambda: stages.evaluate_stage(
                recipe=recipe,
                dataset=dataset,
                artifact_path=out / "quantize" / stages.ARTIFACT,
                index_folder=out / "counts" / stages.INDEX,
                folder=folder,
                options=options,
            ),
        )


def use_share_of_cpus(compute: ComputeConfig, workers: int) -> None:
    """Use the recipe's threads, or this process's share of the machine's among so many."""
    torch.set_num_threads(max(1, int(compute.cpus_per_worker or available_cpus() // workers)))


@contextlib.contextmanager
def group(name: str, size: int, gpus_per_worker: float) -> Iterator[bool]:
    """Make the first `size` of torchrun's processes the ranks of one job; yields whether this process is one of them.

    Those of the next job that are not in this one wait there for rank 0.
    """
    if int(os.environ.get("RANK", 0)) >= size:
        yield False
        return
    if size > 1:
        store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
        backend, mine = collectives.backend(gpus_per_worker), dist.PrefixStore(name, store)
        dist.init_process_group(backend, store=mine, rank=rank, world_size=size, timeout=PATIENCE)
    yield True
    if size > 1:
        dist.destroy_process_group()


def standing(folder: Path, kind: type[Result], work: Callable[[], Result]) -> Result:
    """Read the result that an earlier start left in the folder, or do the work, whose result rank 0 then leaves
    there."""
    path = folder / RESULT
    there = path.is_file()
    collectives.barrier()  # every rank has looked before rank 0 can write it
    if there:
        return from_dict(kind, read_json(path))
    result = work()
    if collectives.rank() == 0:
        write_json(path, asdict(result))
    return result


def prepare(recipe: Recipe, folder: Path, logged_run: Mapping[str, Any], say: Callable[..., None]) -> None:
    """Make the dataset, or find it in the folder, and check it against the recipe and against the log to be replayed.
    Raises RecipeError."""
    if not (folder / datasets.FILE_NAME).is_file():
        dataset = datasets.prepare(recipe.data, folder, log=lambda line: say(f"data: {line}", flush=True))
        datasets.save(dataset, folder)
    dataset = datasets.load(folder)
    stages.check_data(recipe, dataset)
    for name in TEXTS:
        say(f"data: {name} {getattr(dataset, name)}", flush=True)
        if name in logged_run and logged_run[name] != getattr(dataset, name):
            raise RecipeError(
                f"the log's run had another text ({name} {logged_run[name][:16]}…); "
                + (
                    "install the packages of requirements.txt"
                    if recipe.data.source == "docs"
                    else "give its files to --data"
                )
            )


def forget_training(recipe: Recipe) -> None:
    """Undo what training chose for its process; the pipeline's later stages run in others, and give these numbers."""
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    if recipe.train.compile:
        torch.compiler.reset()
    if recipe.compute.gpus_per_worker:
        torch.cuda.empty_cache()


def replayed(path: Path) -> tuple[dict[str, Any], list[float]]:
    """Read what a log says of its run, and the share of the run that was over at each step. Raises RecipeError."""
    logged_run, fractions = dict[str, Any](), list[float]()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line) if line.startswith("{") else {}
        except ValueError:
            raise RecipeError(f"--replay {path}: a line is no JSON: {line[:60]!r}") from None
        logged_run |= record.get("run", {})
        if "fraction" in record and "step" in record:
            fractions.append(float(record["fraction"]))
            if record["step"] != len(fractions):
                raise RecipeError(f"--replay {path}: step {len(fractions)} is missing; give the whole log")
    if not fractions:
        raise RecipeError(f"--replay {path} has no steps; give a train_seed<SEED>.log or a log.jsonl of training")
    return logged_run, fractions


def fingerprint(fractions: list[float] | None) -> str:
    """Hash the steps to be replayed, SHA-256 in hex; empty without."""
    return hashlib.sha256(json.dumps(fractions).encode()).hexdigest() if fractions else ""


def shown(stage: str, say: Callable[..., None]) -> Log:
    """Make the function that prints a stage's progress as lines, on rank 0."""
    if int(os.environ.get("RANK", 0)) != 0:
        return silent

    def log(record: dict[str, Any]) -> None:
        parts = [f"{stage}:"]
        for name, text in (
            ("step", "step {:,}"), ("fraction", "{:.1%}"), ("loss_nats", "loss {:.4f} nats"), ("bpb", "{:.4f} bpb"),
            ("elapsed_seconds", "{:.1f} s"), ("tokens_per_second", "{:,.0f} tokens/s"),
        ):  # fmt: skip
            if name in record:
                parts.append(text.format(record[name]))
        say("  ".join(parts), flush=True)

    return log


def report(recipe: Recipe, seed: int, results: Results, code_bytes: int, out: Path, say: Callable[..., None]) -> int:
    """Print and keep the result; the exit code."""
    train, score, quantize, evaluate = results
    total, limits = quantize.artifact_bytes + code_bytes, recipe.limits
    over = stages.excesses(limits, total, train.train_seconds, evaluate.evaluate_seconds)
    say(f"bpb_full: {score.bpb_full!r}")
    for name in ("bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final"):
        if getattr(evaluate, name) is not None:
            say(f"{name}: {getattr(evaluate, name)!r}")
    say(f"bytes: artifact {quantize.artifact_bytes:,} + code {code_bytes:,} = {total:,} of {limits.total_bytes:,}")
    say(
        f"seconds: training {train.train_seconds:.1f} of {limits.train_seconds:g} ({train.steps:,} steps), "
        f"evaluation {evaluate.evaluate_seconds:.1f} of {limits.evaluate_seconds:g}"
    )
    for line in over:
        say(f"over a limit: {line}")
    say(f"artifact_sha256: {quantize.artifact_sha256}")
    say(f"seed:{seed} val_loss:{evaluate.nats_per_token!r} val_bpb:{evaluate.bpb_final!r}", flush=True)
    found = {name: value for result in results for name, value in asdict(result).items()}
    told = {"seed": seed, **found, "code_bytes": code_bytes, "total_bytes": total, "over": over}
    write_json(out / RESULT, told)
    return 1 if over else 0
