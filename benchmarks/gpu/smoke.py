"""What the device is, whether every stage runs on it, and whether it computes what a CPU does."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.sections import Job
from benchmarks.gpu.sizes import seeded
from benchmarks.suite import machine
from benchmarks.suite.timing import once
from hedgemix import stages
from hedgemix.artifact import tensors
from hedgemix.config import Recipe
from hedgemix.data import bpb, tokenizer
from hedgemix.data import dataset as datasets
from hedgemix.data.dataset import Dataset
from hedgemix.evaluate.evaluator import EvaluateResult
from hedgemix.evaluate.scoring_order import Piece, piece_rows
from hedgemix.experts import ngram_index
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.model.transformer import Model
from hedgemix.quantize import gptq

LIMITS = "limits.json"
DIFFERENT_CODES = 1e-3
"""Share of GPTQ's codes that another device may round the other way: float32 sums end next to a half."""


def environment(job: Job) -> None:
    """Names, versions, and what the device does at best. `Text.start` has begun to tokenize."""
    about = machine.describe(job.device)
    for name in ("gpu", "gpu_gib", "cpu", "cores", "memory_gib", "load", "torch", "python"):
        job.tell(name, about[name])
    job.tell("numpy", np.__version__)
    job.tell("attention", chosen_attention(job, masked=False))
    job.tell("attention with a mask", chosen_attention(job, masked=True))
    if job.device.type == "cuda":
        job.tell("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        job.tell("driver, clock, power", subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    limits = machine.measure(job.device, quick=job.sizes.tiny)
    (job.work / LIMITS).write_text(json.dumps(asdict(limits)))
    job.tell("copy", limits.bandwidth / 1e12, "TB/s")
    job.tell("product, float32", limits.float32 / 1e12, "TFLOP/s")
    job.tell("product, bfloat16", limits.bfloat16 / 1e12, "TFLOP/s")


def chosen_attention(job: Job, masked: bool) -> str:
    """The kernel that torch takes for training's shapes, or with a mask, as scoring has one."""
    model, dtype = job.sizes.recipe.model, getattr(torch, job.sizes.recipe.train.dtype)
    q = torch.zeros(2, model.heads, 256, model.width // model.heads, device=job.device, dtype=dtype, requires_grad=True)
    mask = torch.ones(256, 256, device=job.device, dtype=torch.bool).tril() if masked else None
    number = torch._fused_sdp_choice(q, q, q, attn_mask=mask, is_causal=not masked)
    names = {int(value): name for name, value in torch.nn.attention.SDPBackend.__members__.items()}
    return names[number].lower()


def smoke(job: Job) -> None:
    """Every stage once, eager, at the recipe's size: training steps, calibration, quantization, index, evaluation."""
    sizes, folder = job.sizes, emptied(job.work / "smoke")
    recipe, data = smoke_recipe(job), job.text.given()
    data = shortened(data, sizes.smoke_tokens)
    seconds, trained = once(
        lambda: stages.train_stage(recipe=recipe, dataset=data, seed=1, folder=folder / "train")
    )  # fmt: skip
    job.tell("2 steps and calibration", seconds, "s")
    job.tell("loss after 2 steps", trained.train_loss_nats, "nats")
    job.peak("2 steps and calibration")
    torch.use_deterministic_algorithms(
        False
    )  # fixed steps ask for it; the stages that follow have processes of their own
    room = stages.artifact_room(recipe, 0)
    seconds, report = once(
        lambda: stages.quantize_stage(
            recipe=recipe, dataset=data, seed=1, train_folder=folder / "train", folder=folder, room_bytes=room
        )
    )
    job.tell("quantization", seconds, "s", note=f"tries: {report.tries}")
    job.tell("artifact", report.artifact_bytes, "bytes", most=recipe.limits.total_bytes)
    job.peak("quantization")
    job.tell("index", once(lambda: stages.counts_stage(recipe=recipe, dataset=data, folder=folder))[0], "s")
    seconds, result = once(lambda: evaluated(recipe, data, folder / stages.ARTIFACT, folder, folder / "evaluate"))
    job.tell("evaluation", seconds, "s", note=f"{result.scored_tokens:,} tokens, 2 chunks")
    job.tell("bits per byte, final", result.bpb_final)
    job.peak("evaluation")


def smoke_recipe(job: Job) -> Recipe:
    recipe, sequences = job.sizes.recipe, job.sizes.smoke_sequences
    train = replace(
        recipe.train, steps=2, warmup_steps=0, compile=False, microbatch_sequences=sequences,
        batch_tokens=sequences * recipe.train.sequence_tokens,
    )  # fmt: skip
    evaluate = replace(recipe.evaluate, chunk_tokens=job.sizes.smoke_tokens // 2)
    return replace(recipe, train=train, evaluate=evaluate)


def evaluated(recipe: Recipe, data: Dataset, artifact: Path, counts: Path, folder: Path) -> EvaluateResult:
    """The evaluation's stage, begun anew. Its trace is in the folder."""
    return stages.evaluate_stage(
        recipe=recipe, dataset=data, artifact_path=artifact, index_folder=counts / stages.INDEX, folder=folder
    )


def emptied(folder: Path) -> Path:
    """A folder without what an earlier call left: stages would go on from there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def shortened(data: Dataset, tokens: int) -> Dataset:
    """The data set with only the first so many tokens of its validation text; `Dataset` has its bytes."""
    tokens = min(tokens, data.valid_tokens)
    tables = bpb.byte_tables(tokenizer.load(data.tokenizer))
    cut = replace(data, max_valid_tokens=tokens, valid_tokens=tokens)
    return replace(cut, valid_bytes=bpb.count_bytes(tables, datasets.valid_stream(cut).read(0, tokens)))


def agreement(job: Job) -> None:
    """The same numbers from the CPU: rows of the model, the mixture's nats, GPTQ's codes."""
    sizes = job.sizes
    torch.set_float32_matmul_precision("highest")
    recipe = sizes.recipe
    torch.manual_seed(5)
    model = Model(recipe.model, recipe.data.vocab_size, recipe.train.sequence_tokens).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))  # no part of a new model's zeros
    tokens = datasets.valid_stream(job.text.given()).read(0, sizes.compared_mixed_tokens + 1)
    text_N, piece = torch.from_numpy(tokens.astype(np.int64)), Piece(1, sizes.compared_tokens + 1)
    evaluate = replace(recipe.evaluate, dtype="float32", order="streaming")
    cpu = piece_rows(model, text_N, piece, evaluate)
    here = piece_rows(model.to(job.device), text_N.to(job.device), piece, evaluate).cpu()
    job.tell("rows, device against CPU", float((cpu - here).abs().max()), "nats", most=1e-5, note="float32 products")
    job.tell("mixture, device against CPU", mixed_difference(job, tokens), "nats", most=1e-5)
    job.tell("GPTQ codes that differ", codes_that_differ(job), "of all", most=DIFFERENT_CODES)


def mixed_difference(job: Job, tokens: np.ndarray) -> float:
    """The largest difference of any target's nats under any mixture of two row sets."""
    config, vocab_size = job.sizes.recipe.evaluate.mixer, job.sizes.recipe.data.vocab_size
    index = ngram_index.build(tokens, config.orders, vocab_size, config.match_lengths)
    generator = seeded(6)
    rows = {name: 2 * torch.randn(len(tokens) - 1, vocab_size, generator=generator) for name in ("frozen", "adapted")}

    def nats(device: torch.device) -> Tensor:
        mixer = BatchMixer(config, vocab_size, index, device, names=tuple(rows))
        scores = mixer.score({name: each.to(device) for name, each in rows.items()}, 1, len(tokens))
        return torch.stack([each.cpu() for kinds in scores.nll.values() for each in kinds.values()])

    return float((nats(torch.device("cpu")) - nats(job.device)).abs().max())


def codes_that_differ(job: Job) -> float:
    """Share of one up-projection's codes, for steps that give codes of a few bits."""
    model, generator = job.sizes.recipe.model, seeded(7)
    rows, columns = model.mlp_hidden, model.width
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) * torch.logspace(0, -1, columns)
    hessian = inputs.mT @ inputs / len(inputs)
    row, column = (tensors.steps(torch.full((size,), index)) for size, index in ((rows, -64), (columns, 0)))

    def codes(device: torch.device) -> Tensor:
        back, _, _ = gptq.factor(hessian.to(device, copy=True), 0.01, "w")  # damped in place
        given = weight.to(device)[None], back[None], row.to(device)[None], column.to(device)[None]
        return gptq.round_to_steps(*given, block_columns=128)[0].cpu()

    return float((codes(torch.device("cpu")) != codes(job.device)).float().mean())
