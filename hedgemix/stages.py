"""What each step does once it has its machine: plain functions from files to files, no Ray.

train -> weights.pt, moments.pt;  score: bits per byte of those weights;  quantize -> artifact.hmx;
counts: n-gram index of the validation text;  evaluate: the score, from the artifact and the tokens alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hedgemix.artifact import format as artifact
from hedgemix.config import LimitsConfig, Recipe, RecipeError
from hedgemix.data import dataset as datasets
from hedgemix.data.bpb import bits_per_byte
from hedgemix.data.dataset import Dataset
from hedgemix.evaluate.evaluator import EvaluateResult, evaluate_artifact, score_model
from hedgemix.evaluate.resume import Restart
from hedgemix.experts import ngram_index
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.quantizer import quantize_model
from hedgemix.runtime.clock import no_notice
from hedgemix.runtime.files import Log, OnFileWritten, load_tensors, no_copy, silent
from hedgemix.runtime.layout import MOMENTS, TRACE, WEIGHTS
from hedgemix.train.trainer import TrainResult, train

ARTIFACT = "artifact.hmx"
INDEX = "index"
PAGE_BYTES = 4096


@dataclass(frozen=True)
class TrainStageResult(TrainResult):
    """Holds what training gave, and on what."""

    hardware: str
    """What rank 0 ran on, and with how many GPUs or threads."""


@dataclass(frozen=True)
class ScoreResult:
    """Holds the score of the weights before quantization."""

    nats: float
    """Of the whole scored text, under the averaged weights at full precision."""
    bpb_full: float
    """The same in bits per byte."""


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """Tells how the artifact was made, and its size."""

    theta: float | None = None
    """What sets all quantization steps together; larger means coarser. The reference's export has none."""
    expected_loss_nats: float | None = None
    """Nats a token that quantization is expected to add; none for the reference's export."""
    tries: int | None = None
    """Thetas tried until the artifact fitted; none for the reference's export."""
    gptq_seconds: float
    """GPTQ and rounding, all tries."""
    largest_damping: float
    """Largest damping GPTQ needed, as a share of a Hessian's mean diagonal."""
    artifact_bytes: int
    """Size of the artifact file."""
    bits_per_weight: float
    """All bits of the artifact, over the parameters."""
    artifact_sha256: str
    """Of the artifact file, in hex."""


@dataclass(frozen=True)
class CountsResult:
    """Tells what was indexed."""

    tokens: int
    """Of the text whose n-grams were indexed."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Holds what surrounds a training or an evaluation, and changes no number of it."""

    log: Log = silent
    """Takes progress records, dicts of JSON values."""
    profile: bool = False
    """Write profile.json.gz and profile.txt of a few training steps, or of a chunk, into the stage's folder."""
    on_file_written: OnFileWritten = no_copy
    """Told of every file that a restart needs."""
    preempted: Callable[[], bool] = no_notice
    """Asked often: whether this machine is about to be taken away. A checkpoint is left when it first says so."""


def train_stage(
    *,
    recipe: Recipe,
    dataset: Dataset,
    seed: int,
    folder: Path,
    options: RunOptions = RunOptions(),
    fractions: Sequence[float] | None = None,
) -> TrainStageResult:
    """Train one seed from or into `folder`; every rank calls this. See `train` for `fractions` and what is raised."""
    device = pick_device(recipe)
    result = train(
        recipe,
        dataset,
        seed,
        folder,
        device,
        log=options.log,
        profile=folder if options.profile else None,
        kept=options.on_file_written,
        notice=options.preempted,
        fractions=fractions,
    )
    return TrainStageResult(**asdict(result), hardware=hardware(device))


def score_stage(*, recipe: Recipe, dataset: Dataset, train_folder: Path, log: Log = silent) -> ScoreResult:
    """Score the weights of a training, as they are, on the validation text."""
    device = pick_device(recipe)
    model = load_weights(recipe, dataset, train_folder)
    nats = score_model(model.to(device), datasets.valid_stream(dataset), recipe.evaluate, log=log)
    return ScoreResult(nats, bits_per_byte(nats, dataset.valid_bytes))


def load_weights(recipe: Recipe, dataset: Dataset, train_folder: Path) -> Model:
    """Load the averaged weights of a training, on the CPU."""
    bos_id = datasets.bos_id(dataset) if recipe.model.within_documents else None
    model = Model(recipe.model, dataset.vocab_size, recipe.train.sequence_tokens, draw=False, bos_id=bos_id)
    model.load_state_dict(load_tensors(train_folder / WEIGHTS))
    return model


def quantize_stage(
    *, recipe: Recipe, dataset: Dataset, seed: int, train_folder: Path, folder: Path, room_bytes: int
) -> QuantizeResult:
    """Quantize the weights of a training into an artifact of at most `room_bytes` in `folder`; raises RecipeError when
    that cannot be."""
    device = pick_device(recipe)
    model = load_weights(recipe, dataset, train_folder)
    moments = Moments(**load_tensors(train_folder / MOMENTS, device))
    header = {
        "recipe": recipe.recipe,
        "seed": seed,
        "model": asdict(recipe.model),
        "vocab_size": dataset.vocab_size,
        "context_tokens": recipe.train.sequence_tokens,
    }
    rest: dict[str, Any] = {
        "tokenizer": Path(dataset.tokenizer).read_bytes(),
        "zstd_level": recipe.quantize.zstd_level,
        "memory": datasets.read_memory(dataset),
    }
    tensors, report = quantize_model(
        model.to(device),
        moments,
        recipe.quantize,
        room_bytes,
        lambda tensors: len(artifact.pack(header, tensors=tensors, **rest)),
    )
    path = folder / ARTIFACT
    size = artifact.write(path, header, tensors=tensors, **rest)
    return QuantizeResult(
        **report,
        artifact_bytes=size,
        bits_per_weight=8 * size / parameter_count(model),
        artifact_sha256=artifact.read(path).sha256,  # reads back what was written: a bad file stops here
    )


def counts_stage(*, recipe: Recipe, dataset: Dataset, folder: Path) -> CountsResult:
    """Index the n-grams of the validation text, behind those of the memory, in `folder`."""
    stream = datasets.valid_stream(dataset)
    mixer = recipe.evaluate.mixer
    ngram_index.build(
        stream,
        mixer.orders,
        dataset.vocab_size,
        mixer.match_lengths,
        folder / INDEX,
        memory_M=datasets.memory_tokens(dataset),
    )
    return CountsResult(len(stream))


def evaluate_stage(
    *,
    recipe: Recipe,
    dataset: Dataset,
    artifact_path: Path,
    index_folder: Path,
    folder: Path,
    options: RunOptions = RunOptions(),
) -> EvaluateResult:
    """Score the validation text with an artifact and the index of the text's n-grams; every rank calls this. Goes on
    from what `folder` holds of it. Raises RuntimeError when not all of the text was scored."""
    result = evaluate_artifact(
        artifact_path,
        datasets.valid_stream(dataset),
        index_folder,
        recipe.evaluate,
        pick_device(recipe),
        trace=folder / TRACE,
        log=options.log,
        profile=folder if options.profile else None,
        start=Restart(
            folder, recipe.compute.checkpoint_seconds, notice=options.preempted, kept=options.on_file_written
        ),
    )
    if (result.scored_tokens, result.scored_bytes) != (dataset.valid_tokens - 1, dataset.valid_bytes):
        raise RuntimeError(
            f"scored {result.scored_tokens} tokens and {result.scored_bytes} bytes of a text of "
            f"{dataset.valid_tokens - 1} and {dataset.valid_bytes}"
        )
    return result


def excesses(limits: LimitsConfig, total_bytes: int, train_seconds: float, evaluate_seconds: float) -> list[str]:
    """List what is over its limit, one line each."""
    measured = (
        ("bytes", total_bytes, limits.total_bytes),
        ("training seconds", train_seconds, limits.train_seconds),
        ("evaluation seconds", evaluate_seconds, limits.evaluate_seconds),
    )
    return [f"{round(used, 1):,} {name}, the recipe allows {top:,}" for name, used, top in measured if not used <= top]


def check_data(recipe: Recipe, dataset: Dataset) -> None:
    """Raise RecipeError for a loaded dataset that names others' files, or is too short for a step, a window or the
    calibration, or has no BOS for a model within documents."""
    datasets.check_places(dataset, recipe.data)
    datasets.check(dataset, recipe.train.batch_tokens + 1, recipe.evaluate.window_tokens + 1)
    if recipe.model.within_documents:
        datasets.bos_id(dataset)
    calibration = recipe.train.calibration_sequences * recipe.train.sequence_tokens
    if dataset.train_tokens <= calibration:
        raise RecipeError(
            f"calibration takes {calibration:,} training tokens and there are {dataset.train_tokens:,}; lower "
            "train.calibration_sequences or give more text"
        )


def artifact_room(recipe: Recipe, code_bytes: int) -> int:
    """Compute the most bytes of the artifact: `quantize.target_bytes`, or what the limit leaves beside the code.

    The code counts in whole pages, so that a few bytes more of code or settings do not ask for another artifact.
    """
    pages = -(-code_bytes // PAGE_BYTES)
    return recipe.quantize.target_bytes or recipe.limits.total_bytes - pages * PAGE_BYTES


def pick_device(recipe: Recipe) -> torch.device:
    """Choose this process's GPU when the recipe asks for one, else the CPU. Raises RecipeError when torch sees no
    GPU."""
    if recipe.compute.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RecipeError("compute.gpus_per_worker asks for GPUs and torch sees none on this node; check its driver")
    return torch.device("cuda", torch.cuda.current_device())


def hardware(device: torch.device) -> str:
    """Name the GPUs that this process sees with their number, or the CPU with torch's threads."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
