"""What each step does once it has its machine: plain functions from files to files, no Ray.

train -> weights.pt, moments.pt;  score: bits per byte of those weights;  quantize -> artifact.hmx;
counts: n-gram index of the validation text;  evaluate: the score, from the artifact and the tokens alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hedgemix import artifact, ngram
from hedgemix import dataset as datasets
from hedgemix.bpb import bits_per_byte
from hedgemix.calibrate import Moments
from hedgemix.checkpoint import Kept
from hedgemix.config import LimitsConfig, Recipe, RecipeError
from hedgemix.dataset import Dataset
from hedgemix.evaluate import evaluate_artifact, score_model
from hedgemix.files import Log, load_tensors
from hedgemix.model import Model, parameter_count
from hedgemix.quantize import quantize_model
from hedgemix.restart import Restart
from hedgemix.train import train

ARTIFACT = "artifact.hmx"
INDEX = "index"
PAGE_BYTES = 4096


def train_stage(
    recipe: Recipe,
    dataset: Dataset,
    seed: int,
    folder: Path,
    log: Log,
    profile: Path | None,
    kept: Kept,
    notice: Callable[[], bool],
    fractions: Sequence[float] | None = None,
) -> dict[str, Any]:
    device = pick_device(recipe)
    result = train(
        recipe, dataset, seed, folder, device, log=log, profile=profile, kept=kept, notice=notice, fractions=fractions
    )
    return {**asdict(result), "hardware": hardware(device)}


def score_stage(recipe: Recipe, dataset: Dataset, train_folder: Path, log: Log) -> dict[str, Any]:
    device = pick_device(recipe)
    model = Model(recipe.model, dataset.vocab_size, recipe.train.sequence_tokens, draw=False)
    model.load_state_dict(load_tensors(train_folder / "weights.pt"))
    score = score_model(model.to(device), datasets.valid_stream(dataset), recipe.evaluate, log=log)
    return {"nats": score, "bpb_full": bits_per_byte(score, dataset.valid_bytes)}


def quantize_stage(
    recipe: Recipe, dataset: Dataset, seed: int, train_folder: Path, folder: Path, room: int
) -> dict[str, Any]:
    device = pick_device(recipe)
    model = Model(recipe.model, dataset.vocab_size, recipe.train.sequence_tokens, draw=False)
    model.load_state_dict(load_tensors(train_folder / "weights.pt"))
    moments = Moments(**load_tensors(train_folder / "moments.pt", device))
    header = {
        "recipe": recipe.recipe,
        "seed": seed,
        "model": asdict(recipe.model),
        "vocab_size": dataset.vocab_size,
        "context_tokens": recipe.train.sequence_tokens,
    }
    pack = partial(artifact.pack, header, Path(dataset.tokenizer).read_bytes(), zstd_level=recipe.quantize.zstd_level)
    tensors, report = quantize_model(
        model.to(device),
        moments,
        recipe.quantize,
        room,
        lambda tensors: len(pack(tensors=tensors)),
    )
    path = folder / ARTIFACT
    size = artifact.write(path, header, Path(dataset.tokenizer).read_bytes(), tensors, recipe.quantize.zstd_level)
    return {
        **report,
        "artifact_bytes": size,
        "bits_per_weight": 8 * size / parameter_count(model),
        "artifact_sha256": artifact.read(path).sha256,  # reads back what was written: a bad file stops here
    }


def counts_stage(recipe: Recipe, dataset: Dataset, folder: Path) -> dict[str, Any]:
    stream = datasets.valid_stream(dataset)
    mixer = recipe.evaluate.mixer
    ngram.build_index(stream, mixer.orders, dataset.vocab_size, mixer.match_lengths, folder / INDEX)
    return {"tokens": len(stream)}


def evaluate_stage(
    recipe: Recipe,
    dataset: Dataset,
    artifact_path: Path,
    counts_folder: Path,
    folder: Path,
    log: Log,
    profile: bool,
    kept: Kept,
    notice: Callable[[], bool],
) -> dict[str, Any]:
    result = evaluate_artifact(
        artifact_path,
        datasets.valid_stream(dataset),
        counts_folder,
        recipe.evaluate,
        pick_device(recipe),
        trace=folder / "trace.jsonl",
        log=log,
        profile=folder if profile else None,
        start=Restart(folder, recipe.compute.checkpoint_seconds, notice=notice, kept=kept),
    )
    if (result.scored_tokens, result.scored_bytes) != (dataset.valid_tokens - 1, dataset.valid_bytes):
        raise RuntimeError(
            f"scored {result.scored_tokens} tokens and {result.scored_bytes} bytes of a text of "
            f"{dataset.valid_tokens - 1} and {dataset.valid_bytes}"
        )
    return asdict(result)


def excesses(limits: LimitsConfig, total_bytes: int, train_seconds: float, evaluate_seconds: float) -> list[str]:
    """What is over its limit, one line each."""
    measured = (
        ("bytes", total_bytes, limits.total_bytes),
        ("training seconds", train_seconds, limits.train_seconds),
        ("evaluation seconds", evaluate_seconds, limits.evaluate_seconds),
    )
    return [f"{round(used, 1):,} {name}, the recipe allows {top:,}" for name, used, top in measured if not used <= top]


def check_data(recipe: Recipe, dataset: Dataset) -> None:
    """Raise RecipeError for a loaded dataset that names others' files, or is too short for a step, a window or the
    calibration."""
    datasets.check_places(dataset, recipe.data)
    datasets.check(dataset, recipe.train.batch_tokens + 1, recipe.evaluate.window_tokens + 1)
    calibration = recipe.train.calibration_sequences * recipe.train.sequence_tokens
    if dataset.train_tokens <= calibration:
        raise RecipeError(
            f"calibration takes {calibration:,} training tokens and there are {dataset.train_tokens:,}; lower "
            "train.calibration_sequences or give more text"
        )


def artifact_room(recipe: Recipe, code_bytes: int) -> int:
    """Most bytes of the artifact: `quantize.target_bytes`, or what the limit leaves beside the code.

    The code counts in whole pages, so that a few bytes more of code or settings do not ask for another artifact.
    """
    pages = -(-code_bytes // PAGE_BYTES)
    return recipe.quantize.target_bytes or recipe.limits.total_bytes - pages * PAGE_BYTES


def pick_device(recipe: Recipe) -> torch.device:
    """This process's GPU when the recipe asks for one, else the CPU."""
    if recipe.compute.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RecipeError("compute.gpus_per_worker asks for GPUs and torch sees none on this node; check its driver")
    return torch.device("cuda", torch.cuda.current_device())


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
