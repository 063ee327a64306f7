"""A small record, end to end: trained on the clock, quantized, evaluated, audited; one GPU, so no record's figure."""

from __future__ import annotations

import base64
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.scoring import final_nats
from benchmarks.gpu.sections import Job
from benchmarks.gpu.smoke import emptied, evaluated, shortened
from benchmarks.suite.timing import once
from hedgemix import stages
from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.audit import sandbox, streamed
from hedgemix.audit.replay import Source
from hedgemix.config import EvaluateConfig, Recipe, TTTConfig, to_dict
from hedgemix.data import dataset as datasets
from hedgemix.data.dataset import Dataset
from hedgemix.evaluate.evaluator import score_model
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.standalone import script

STAGES = ("quantized", "mixed", "ttt", "final", "hedge", "logistic", "published")
LOG, TRACE = "log.jsonl", "trace.jsonl"

COMMITTED_TOKENS = 128
"""Rows of the GPU's evaluation held against the one-token predictor's: the model, a token at a time on a CPU."""


def folder(job: Job) -> Path:
    return job.work / "record"


def train_recipe(job: Job) -> Recipe:
    recipe = job.sizes.train
    return replace(recipe, train=replace(recipe.train, budget_seconds=job.train_seconds))


def train(job: Job) -> None:
    """On the clock, from the text's training documents and the given shards."""
    recipe, data = train_recipe(job), job.text.wait()
    job.tell("training tokens", data.train_tokens)
    job.tell("held-out tokens", data.valid_tokens)
    where = emptied(folder(job)) / "train"
    try:
        result = stages.train_stage(
            recipe=recipe, dataset=data, seed=1, folder=where, options=stages.RunOptions(log=say)
        )
    finally:
        if (where / LOG).exists():
            shutil.copyfile(where / LOG, job.out / LOG)
    job.tell("before the clock", result.warmup_seconds, "s", note="build, compile, 20 steps")
    job.tell("steps", result.steps)
    job.tell("ms a step", result.ms_per_step, "ms", note=f"{recipe.train.batch_tokens:,} tokens")
    job.tell("tokens", result.tokens / 1e6, "M")
    job.tell("loss", result.train_loss_nats, "nats", note="mean of the last tenth of the steps")
    job.tell("calibration", result.calibrate_seconds, "s")
    job.tell("peak memory", result.peak_memory_bytes / 2**30, "GiB")
    job.tell("budget used", result.train_seconds, "s", most=job.train_seconds + 1)


def say(record: dict[str, Any]) -> None:
    """One in twenty of the log's lines."""
    if record.get("step", 0) % 200 == 0:
        print(f"    {json.dumps(record)}", flush=True)


def quantize(job: Job) -> None:
    """To the size that the limit leaves beside the code; and what the weights scored before."""
    recipe, data = train_recipe(job), job.text.wait()
    code = script.n_bytes(recipe)
    limits = replace(recipe.limits, total_bytes=job.sizes.room_bytes)
    room = stages.artifact_room(replace(recipe, limits=limits), code)
    seconds, report = once(
        lambda: stages.quantize_stage(
            recipe=recipe, dataset=data, seed=1, train_folder=folder(job) / "train", folder=folder(job), room_bytes=room
        )
    )
    shutil.copyfile(folder(job) / stages.ARTIFACT, job.out / stages.ARTIFACT)
    job.tell("code", code, "bytes")
    job.tell("artifact", report.artifact_bytes, "bytes", most=room)
    job.tell("bits a weight", report.bits_per_weight)
    job.tell("quantization", seconds, "s", note=f"tries: {report.tries}")
    few = shortened(data, job.sizes.full_tokens)
    seconds, full = once(lambda: stages.score_stage(recipe=recipe, dataset=few, train_folder=folder(job) / "train"))
    job.tell("full weights", full.bpb_full, "bpb", note=f"{few.valid_tokens - 1:,} held-out tokens, {seconds:.1f} s")


def evaluate(job: Job) -> None:
    """One pass over the held-out text, with the recipe's test-time training and mixture: every stage's bits."""
    recipe, data = train_recipe(job), shortened(job.text.wait(), job.sizes.evaluated_tokens)
    seconds = once(lambda: stages.counts_stage(recipe=recipe, dataset=data, folder=folder(job)))[0]
    job.tell("index", seconds, "s", note=f"{data.valid_tokens:,} tokens")
    where = emptied(folder(job) / "evaluate")
    try:
        result = evaluated(recipe, data, folder(job) / stages.ARTIFACT, folder(job), where)
    finally:
        if (where / TRACE).exists():
            shutil.copyfile(where / TRACE, job.out / TRACE)
    for stage in STAGES:
        job.tell(stage, getattr(result, f"bpb_{stage}"), "bpb")
    for phase in ("scoring", "mixing", "ttt"):
        each = getattr(result, f"{phase}_seconds")
        job.tell(f"{phase} seconds", each, "s", note=f"{1e6 * each / result.scored_tokens:.2f} us a token")
    job.tell("evaluation seconds", result.evaluate_seconds, "s")
    job.peak("evaluation")


def variants(config: EvaluateConfig) -> dict[str, EvaluateConfig]:
    """Other settings of the evaluation, beside the recipe's."""
    learned = TTTConfig(
        kind="weights",
        rate=2e-4,
        batch_sequences=config.ttt.batch_sequences,
        sequence_tokens=config.ttt.sequence_tokens,
    )
    quarter = config.mixer.block_tokens // 4
    return {
        "recipe": config,
        f"blocks of {quarter}": replace(config, mixer=replace(config.mixer, block_tokens=quarter)),
        "every weight learns, 1 epoch at 2e-4": replace(config, ttt=learned),
        "no neural cache": replace(config, cache=replace(config.cache, enabled=False)),
        "no fast head": replace(config, ttt=replace(config.ttt, enabled=False)),
    }


def vary(job: Job) -> None:
    """The beginning of the text again, with other settings; and by sliding windows."""
    recipe, data = train_recipe(job), shortened(job.text.wait(), job.sizes.varied_tokens)
    counts = emptied(folder(job) / "varied")
    stages.counts_stage(recipe=recipe, dataset=data, folder=counts)
    for name, config in variants(recipe.evaluate).items():
        where = emptied(counts / "evaluate")
        other = replace(recipe, evaluate=config)
        result = evaluated(other, data, folder(job) / stages.ARTIFACT, counts, where)
        seconds = result.evaluate_seconds
        note = f"quantized {result.bpb_quantized:.4f}, mixed {result.bpb_mixed:.4f}, {seconds:.1f} s"
        job.tell(f"final, {name}", result.bpb_final, "bpb", note=note)
    orders(job, data)


def orders(job: Job, data: Dataset) -> None:
    """The artifact's bits of the same tokens by streaming and by sliding windows, nothing mixed."""
    few = shortened(data, job.sizes.ordered_tokens)
    model = load_model(artifact.read(folder(job) / stages.ARTIFACT)).to(job.device).requires_grad_(False)
    config = job.sizes.train.evaluate
    stride = 2 * config.stride_tokens
    for order in ("streaming", "sliding"):
        stream = datasets.valid_stream(few)
        settings = replace(config, order=order, stride_tokens=stride)
        seconds, nats = once(lambda stream=stream, settings=settings: score_model(model, stream, settings))
        note = f"{few.valid_tokens - 1:,} tokens, {seconds:.2f} s" + (
            f", stride {stride}" if order == "sliding" else ""
        )
        job.tell(order, nats / math.log(2) / few.valid_bytes, "bpb", note=note)


def audit(job: Job) -> None:
    """The evaluation's beginning again in a process that can open two files and start no compiler."""
    data, path = job.text.wait(), folder(job) / stages.ARTIFACT
    tokens = min(job.sizes.audited_tokens + 1, data.valid_tokens)
    config = replace(job.sizes.train.evaluate, chunk_tokens=job.sizes.audited_tokens // 2)
    source = Source(
        artifact=str(path), shards=list(data.valid_shards), limit=data.max_valid_tokens, tokens=tokens,
        schedule_tokens=tokens, config=to_dict(config), claim="final", device=job.device.type,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    heard: dict[str, Any] = {}
    charges: list[np.ndarray] = []

    def hear(record: dict[str, Any]) -> None:
        if "charges" in record:
            charges.append(np.frombuffer(base64.b64decode(record["charges"]), "<f8"))
        heard.update(record)

    arguments = {"source": asdict(source), "marks": [tokens]}
    readable = [path, *map(Path, data.valid_shards)]
    try:
        outcome = sandbox.run("hedgemix.audit.replay:testify", arguments, readable, hear)
    except sandbox.WorkError as error:
        job.tell("refused", "; ".join(error.refused[:5]) or "nothing", note=str(error)[:300])
        raise
    confined = outcome.confined
    job.tell("refused", "; ".join(confined.refused[:5]) or "nothing", note=f"Landlock {confined.landlock}")
    replay = heard["replay"]
    job.tell("start of the closed process", outcome.start_seconds, "s")
    job.tell("replay", replay["seconds"], "s", note=f"{tokens - 1:,} tokens")
    first = Piece(1, min(tokens, COMMITTED_TOKENS + 1))
    vocab_size = artifact.read(path).header["vocab_size"]
    work = "hedgemix.audit.commitment:commit"
    committed, _, seconds = streamed.commit(work, source, [first], [path], vocab_size, lambda fraction: None)
    off_B = np.abs(np.concatenate(charges)[: first.stop - 1] - committed.nats_N[1 : first.stop])
    job.tell("rows committed on the CPU", seconds, "s", note=f"{first.stop - 1:,} tokens")
    job.tell("largest distance of a row's sum from 1", committed.largest_off, "", most=1e-5)
    job.tell("charges off the committed rows, largest", float(off_B.max()), "nats", note=f"mean {off_B.mean():.2g}")
    text = datasets.valid_stream(data).read(0, tokens)
    own = final_nats(artifact.read(path), text, config, job.device)
    job.tell(
        "audit against evaluation",
        abs(replay["nats"] / own - 1),
        "of the nats",
        note="the audit's own tolerance is 1e-6",
    )


def replay(job: Job) -> None:
    """The training's first steps again, from what its clock decided, in the kernels of a clocked run."""
    lines = [json.loads(line) for line in (folder(job) / "train" / LOG).read_text().splitlines()]
    first = lines[: job.sizes.replayed_steps]
    where = emptied(folder(job) / "replay")
    recipe = train_recipe(job)
    fractions = [line["fraction"] for line in first]
    seconds, _ = once(
        lambda: stages.train_stage(recipe=recipe, dataset=job.text.wait(), seed=1, folder=where, fractions=fractions)
    )
    again = [json.loads(line)["loss_nats"] for line in (where / LOG).read_text().splitlines()]
    apart = max(abs(a - line["loss_nats"]) for a, line in zip(again, first, strict=True))
    job.tell(
        "loss of the first steps: difference", apart, "nats", note=f"{len(again)} steps, {seconds:.0f} s with compiling"
    )
