"""A training step: how long, where it goes, and the kernels that it is made of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.sections import Job
from benchmarks.gpu.smoke import LIMITS
from benchmarks.gpu.timing import Profile, Stopwatch, milliseconds
from hedgemix.config import TrainConfig
from hedgemix.data import dataset as datasets
from hedgemix.data.dataloader import Batches
from hedgemix.model.attention import banded_attention
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.train.optim import Muon
from hedgemix.train.schedule import step_kind
from hedgemix.train.trainer import Run, deterministic
from pipeline.forecast import operations
from pipeline.forecast.gpu_plan import Rates

PROFILE = "profile.txt"


def training(job: Job) -> None:
    """Compiled steps of one GPU's share of the record's batch with a float32 residual stream, eager ones, and compiled
    ones with a bfloat16 stream: last, since it compiles a second time."""
    recipe, sizes = job.sizes.recipe, job.sizes
    config = replace(recipe.train, warmup_steps=0)
    deterministic(config, job.device)  # by the clock: nothing is asked of the kernels
    run = begun(job, config, "float32")
    job.tell("parameters", parameter_count(run.model))
    step, losses = timed_steps(job, run)
    spent = operations.train_operations(recipe.model, config, recipe.data.vocab_size)
    spent += operations.muon_operations(operations.matrix_shapes(recipe.model), config.newton_schulz_steps)
    job.tell("operations a step", spent)
    job.tell("share of 989 TFLOP/s", 100 * spent / (median(step) / 1000) / Rates.peak, "%")
    if (job.work / LIMITS).exists():
        best = json.loads((job.work / LIMITS).read_text())[config.dtype]
        job.tell("share of the best product here", 100 * spent / (median(step) / 1000) / best, "%")
    job.peak("compiled steps")
    for name, spent_ms in parts(run, job, sizes.repeats).items():
        job.tell(f"step: {name}", spent_ms, "ms")
    profiled(run, job)
    run.read.close()
    del run
    eager(job, config)
    run = begun(job, config, "bfloat16")
    _, others = timed_steps(job, run, ", bfloat16 stream")
    job.peak("compiled steps, bfloat16 stream")
    apart = [abs(other - loss) for loss, other in zip(losses, others, strict=True)]
    note = f"the largest; losses {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
    job.tell("loss, bfloat16 stream against float32: difference", max(apart), "nats", note=note)
    run.read.close()


def timed_steps(job: Job, run: Run, of: str = "") -> tuple[list[float], list[float]]:
    """Milliseconds of steps after two that compile, and the losses of all of them, in nats a token."""
    began = time.monotonic()
    losses = [run.train_step(0.1)]
    float(losses[0])
    job.tell(f"first step, compiling{of}", time.monotonic() - began, "s")
    losses.append(run.train_step(0.1))
    float(losses[1])
    watch = Stopwatch(job.device)
    for _ in range(job.sizes.steps):
        losses.append(run.train_step(0.1))
        watch.mark()
    step = watch.milliseconds()
    job.tell(f"ms a step{of}", median(step), "ms", note=f"least {min(step):.1f}, most {max(step):.1f} of {len(step)}")
    return step, [float(loss) for loss in losses]


def begun(job: Job, config: TrainConfig, residual: Literal["float32", "bfloat16"] | None = None) -> Run:
    """A new model's run, the training text being the given shards' and the text's. residual: type of its residual
    stream, the recipe's if not given."""
    recipe = job.sizes.recipe
    shape = replace(recipe.model, residual_dtype=residual or recipe.model.residual_dtype)
    torch.manual_seed(1)
    model = Model(shape, recipe.data.vocab_size, config.sequence_tokens).to(job.device)
    stream = datasets.train_stream(job.text.wait())
    batches = Batches(stream, config.sequence_tokens, config.batch_tokens // config.sequence_tokens, seed=1)
    return Run(model, config, batches, job.device)


def parts(run: Run, job: Job, repeats: int) -> dict[str, float]:
    """Median milliseconds of what `Run.train_step` does one after the other."""
    rate, momentum = 1.0, run.config.muon_momentum
    work: dict[str, Callable[[], Any]] = {
        "forward and backward": partial(run.backward, run.step, step_kind(run.config, run.loops, 1.0)),
        "reduce and clip": partial(run.gradient.reduce, run.config.gradient_clip),
        "optimizers": partial(run.optimizers.step, rate, momentum),
        "average": run.ema.update,
    }
    watch = Stopwatch(job.device)
    for _ in range(repeats):
        for each in work.values():
            each()
            watch.mark()
    spent = watch.milliseconds()
    return {name: median(spent[number :: len(work)]) for number, name in enumerate(work)}


def profiled(run: Run, job: Job) -> None:
    """Three steps: milliseconds of a step by kind of kernel, and the table of all of them as a file."""
    steps = 3
    found = Profile(lambda: [run.train_step(0.1) for _ in range(steps)], job.device)
    total = sum(found.kinds().values())
    for kind, spent in found.kinds().items():
        job.tell(f"profile: {kind}", spent / steps, "ms", note=f"{spent / total:.0%}, profiled")
    (job.out / PROFILE).write_text(found.text() + "\n")


def eager(job: Job, config: TrainConfig) -> None:
    """The same steps without the compiler, in microbatches that fit."""
    sequences = min(config.microbatch_sequences, job.sizes.smoke_sequences)
    run = begun(job, replace(config, compile=False, microbatch_sequences=sequences))
    spent = milliseconds(lambda: run.train_step(0.1), job.device, job.sizes.eager_steps)
    job.tell("eager, ms a step", spent, "ms", note=f"{sequences} sequences at once")
    job.peak("eager steps")
    run.read.close()


def kernels(job: Job) -> None:
    """Attention by each of torch's kernels, the widest product, banded attention, Muon."""
    model, config, device = job.sizes.recipe.model, job.sizes.recipe.train, job.device
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    sequences, T, E = config.batch_tokens // config.sequence_tokens, config.sequence_tokens, model.width // model.heads
    q, k, v = (
        torch.randn(sequences, model.heads, T, E, device=device, dtype=half, requires_grad=True) for _ in range(3)
    )
    dy = torch.randn_like(q)

    def attend() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), dy)

    # Two products forward and five backward, over the half of the keys that are allowed.
    spent = 7 * 2 * sequences * model.heads * T * T * E / 2
    wanted = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for backend in wanted if device.type == "cuda" else (SDPBackend.MATH,):
        with sdpa_kernel(backend):
            took = milliseconds(attend, device, job.sizes.repeats)
        rate = f"{spent / took / 1e9:,.0f} TFLOP/s"
        job.tell(f"attention, {backend.name.lower()}", took, "ms", note=f"forward and backward, {rate}")
    with strict():
        took = milliseconds(attend, device, job.sizes.repeats)
    job.tell("attention, strict mode", took, "ms", note="forward and backward")
    rows, columns, inner = config.batch_tokens, model.mlp_hidden, model.width
    a, b = torch.randn(rows, inner, device=device, dtype=half), torch.randn(inner, columns, device=device, dtype=half)
    took = milliseconds(lambda: a @ b, device, job.sizes.repeats)
    rate = f"{2 * rows * columns * inner / took / 1e9:,.0f} TFLOP/s"
    job.tell("up-projection", took, "ms", note=f"{rows:,} x {inner} x {columns}, {rate}")
    banded(job, half)
    shapes = operations.matrix_shapes(model)
    weights = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    muon = Muon(weights, config)
    took = milliseconds(lambda: muon.step(0.02, 0.95), device, job.sizes.repeats)
    rate = f"{operations.muon_operations(shapes, config.newton_schulz_steps) / took / 1e9:,.0f} TFLOP/s"
    job.tell("Muon, all matrices", took, "ms", note=rate)


def banded(job: Job, dtype: torch.dtype) -> None:
    """One layer's attention of a scored segment: by a mask, as the library does, and by a kernel that knows windows."""
    model, config = job.sizes.recipe.model, job.sizes.recipe.evaluate
    segment, band, E = config.segment_tokens, config.window_tokens, model.width // model.heads
    keys = segment + config.overlap_tokens
    q, k, v = (torch.randn(1, model.heads, keys, E, device=job.device, dtype=dtype) for _ in range(3))
    with torch.inference_mode():
        job.tell(
            "banded attention, mask",
            milliseconds(lambda: banded_attention(q, k, v, band), job.device, job.sizes.repeats),
            "ms",
        )
        if job.device.type == "cpu":
            return  # torch's flash attention knows windows on a GPU only

        def window() -> Tensor:
            given = [x.transpose(1, 2) for x in (q, k, v)]
            found = torch.ops.aten._flash_attention_forward(
                *given, None, None, keys, keys, 0.0, True, False, window_size_left=band - 1, window_size_right=0
            )
            return found[0].transpose(1, 2)

        job.tell("banded attention, window", milliseconds(window, job.device, job.sizes.repeats), "ms")
        apart = float((window() - banded_attention(q, k, v, band)).abs().max())
        job.tell("window against mask", apart, "", most=2e-2, note="outputs in bfloat16")


@contextmanager
def strict(wanted: bool = True) -> Iterator[None]:
    """torch's deterministic kernels, as an audit asks for them: where there is none, the usual one."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
