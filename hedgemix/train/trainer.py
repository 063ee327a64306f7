"""One rank's training of one seed under a wall-clock budget.

Notable: the clock that decides rates and the end is rank 0's, agreed every step, so all ranks stop on the same step.
It counts over restarts: what a lost worker used stays used. The last `reserve_seconds` of the budget are for averaging
the weights and for the calibration that quantization needs; both are done here, on training tokens only.

A folder holds: checkpoints (resume), clock.json (budget used), log.jsonl (one line a step), then weights.pt (the
averaged weights) and moments.pt (calibration).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from hedgemix.config import Recipe, RecipeError, TrainConfig
from hedgemix.data import dataset as datasets
from hedgemix.data.dataloader import Ahead, Batches
from hedgemix.data.dataset import Dataset
from hedgemix.model.documents import fits
from hedgemix.model.layers import autocast
from hedgemix.model.linear import QAT_LEVELS
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.quantize.calibration import calibrate
from hedgemix.runtime import collectives
from hedgemix.runtime.checkpoint import Checkpoints
from hedgemix.runtime.clock import Clock, Due, no_notice
from hedgemix.runtime.files import Log, OnFileWritten, no_copy, save_tensors, silent
from hedgemix.runtime.flat_gradient import FlatGradient
from hedgemix.runtime.layout import CLOCK, LOG, MOMENTS, WEIGHTS
from hedgemix.runtime.profiler import tracing
from hedgemix.train.optim import EMA, Optimizers
from hedgemix.train.schedule import StepKind, elapsed_fraction, muon_momentum, rate_factor, step_kind, step_kinds
from hedgemix.train.step_log import ADVICE, DivergedError, StepLog
from hedgemix.validate import check_train


@dataclass(frozen=True)
class TrainResult:
    """Holds what the training of one seed gives."""

    parameters: int
    """Trained weights of the model."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens over all steps that count (work lost to a restart is not counted)."""
    train_loss_nats: float
    """Mean loss per token of the last tenth of the steps."""
    train_seconds: float
    """Budget used: loop, EMA and calibration, over all restarts."""
    loop_seconds: float
    """Part of train_seconds in the training loop, checkpoints included."""
    calibrate_seconds: float
    """Part of train_seconds after the loop: averaging and calibration."""
    warmup_seconds: float
    """Before the clock: building, compiling, warm-up steps (of the last start)."""
    ms_per_step: float
    """Milliseconds of the training loop per step."""
    restarts: int
    """Starts of the training after the first."""
    checkpoint_failures: int
    """Checkpoints of the last start that storage did not take."""
    qat_steps: int
    """Steps of this result that trained through quantization."""
    peak_memory_bytes: int
    """Of rank 0's device; 0 on a CPU."""


def train(
    recipe: Recipe,
    dataset: Dataset,
    seed: int,
    folder: Path,
    device: torch.device,
    *,
    log: Log = silent,
    now: Callable[[], float] = time.monotonic,
    profile: Path | None = None,
    kept: OnFileWritten = no_copy,
    notice: Callable[[], bool] = no_notice,
    fractions: Sequence[float] | None = None,
) -> TrainResult:
    """Train one seed, resuming from `folder` if it was begun there. Every rank calls this; rank 0 writes.

    A checkpoint is written every compute.checkpoint_seconds, and once when rank 0's `notice` (asked every step) turns
    true: this machine is about to be taken away. `kept` is told of every file a restart needs.
    profile: folder for profile.json.gz and profile.txt, rank 0's profile of a few steps; it
    changes no result of a fixed number of steps.
    fractions: take these for each step's share of the run that is over, and end after the last, whatever the clock
    says. Those of another run's log.jsonl repeat it: all that its clock decided is in them.

    Raises RecipeError for a recipe the data cannot serve and DivergedError when the loss is no longer a number.
    """
    config = recipe.train
    check_train(recipe, collectives.world_size(), QAT_LEVELS)
    built = time.monotonic()
    run = build(recipe, dataset, seed, device)
    warmup_seconds = time.monotonic() - built

    checkpoints = Checkpoints(folder, kept=kept)
    agree = collectives.Agreement()
    saved_seconds = run.load(checkpoints, agree)
    clock = Clock(folder / CLOCK, saved_seconds, now, kept)
    steps = StepLog(folder / LOG, run.step, seed, log)
    due = Due(clock, recipe.compute.checkpoint_seconds, notice)
    queue = RunAhead(device)
    traces = tracing(profile if collectives.rank() == 0 else None, "profile", device)
    with closing(run.read), closing(checkpoints), traces as traced:
        while True:
            # Rank 0 decides for all: reading the losses, which comes before a save, is a collective.
            elapsed, save = agree(clock.elapsed(), float(due()))
            if fractions is None:
                fraction = elapsed_fraction(config, run.step, elapsed)
            else:
                fraction = fractions[run.step] if run.step < len(fractions) else 1.0
            if save:
                steps.flush(elapsed)  # raises before a broken state is kept
                run.save(checkpoints, clock.elapsed())
            if fraction >= 1:
                break
            loss = run.train_step(fraction)
            queue.wait()
            traced()
            steps.add(
                loss,
                step=run.step,
                tokens=run.step * run.batch_tokens,
                elapsed_seconds=elapsed,
                fraction=fraction,
                matrix_rate=config.matrix_rate * rate_factor(fraction, config.warmdown_fraction, config.rate_floor),
            )
            if run.step % config.log_every_steps == 0:
                steps.flush(clock.elapsed())
            clock.beat()
    if run.step == 0:
        raise RecipeError("no training step fits train.budget_seconds less train.reserve_seconds; raise the budget")
    steps.flush(clock.elapsed())
    run.save(checkpoints, clock.elapsed())
    synchronise(device)
    loop_seconds = clock.elapsed()

    average_and_calibrate(run, seed, folder)
    checkpoints.close()
    train_seconds = clock.elapsed()
    clock.note()
    return TrainResult(
        parameters=parameter_count(run.model),
        steps=run.step,
        tokens=run.step * run.batch_tokens,
        train_loss_nats=steps.last_tenth(),
        train_seconds=train_seconds,
        loop_seconds=loop_seconds,
        calibrate_seconds=train_seconds - loop_seconds,
        warmup_seconds=warmup_seconds,
        ms_per_step=1000 * loop_seconds / run.step,
        restarts=clock.starts - 1,
        checkpoint_failures=len(checkpoints.failures),
        qat_steps=run.qat_steps,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def build(recipe: Recipe, dataset: Dataset, seed: int, device: torch.device) -> Run:
    """Make the run that a seed begins with, the same on every rank, and warm it up. Raises RecipeError for a training
    text that is shorter than a sequence."""
    config = recipe.train
    deterministic(config, device)
    torch.manual_seed(seed)
    bos_id = datasets.bos_id(dataset) if recipe.model.within_documents else None
    model = Model(recipe.model, dataset.vocab_size, config.sequence_tokens, bos_id=bos_id).to(device)
    for parameter in model.parameters():
        collectives.broadcast(parameter.detach())
    batches = Batches(
        datasets.train_stream(dataset), config.sequence_tokens, config.batch_tokens // config.sequence_tokens, seed
    )
    if not batches.total:
        raise RecipeError(f"train.sequence_tokens {config.sequence_tokens} is longer than the training text; lower it")
    run = Run(model, config, batches, device)
    run.warm_up()
    return run


def average_and_calibrate(run: Run, seed: int, folder: Path) -> None:
    """Put the averages in the weights' place and take the moments that quantization needs; rank 0 writes both to the
    folder. Raises DivergedError for averages that are not finite."""
    run.ema.swap()
    if not all(bool(parameter.isfinite().all()) for parameter in run.model.parameters()):
        raise DivergedError(f"seed {seed}: the averaged weights are not finite after step {run.step}; {ADVICE}")
    moments = calibrate(run.model, run.batches, run.config, run.device)
    if collectives.rank() == 0:
        save_tensors(folder / WEIGHTS, {name: value.cpu() for name, value in run.model.state_dict().items()})
        parts = {part: {name: m.cpu() for name, m in found.items()} for part, found in vars(moments).items()}
        save_tensors(folder / MOMENTS, parts)
    synchronise(run.device)


class Run:
    """Holds what a step moves: weights, optimizers, averages, position."""

    def __init__(self, model: Model, config: TrainConfig, batches: Batches, device: torch.device) -> None:
        self.model, self.config, self.batches, self.device = model, config, batches, device
        self.gradient = FlatGradient(model.parameters())
        self.optimizers = Optimizers(model, config)
        self.ema = EMA(model.parameters(), config.ema_decay)
        # A second length would make torch compile one slower graph for every length.
        dynamic = False if config.growth_fractions else None
        self.loss = torch.compile(model, fullgraph=True, dynamic=dynamic) if config.compile else model
        self.step = self.qat_steps = 0
        self.loops = bool(model.config.looped_layers)
        self.batch_tokens = batches.per_step * config.sequence_tokens
        self.read = Ahead(batches, collectives.rank(), collectives.world_size(), config.microbatch_sequences, device)

    def backward(self, step: int, kind: StepKind) -> Tensor:
        """Accumulate the gradient of one step; returns this rank's part of the mean loss, a 0-d tensor."""
        total = torch.zeros((), device=self.device)
        self.gradient.zero()
        for whole, rows in zip(self.read(step), self.read.rows, strict=True):
            tokens, targets = (x.reshape(len(x) * kind.pieces, -1) for x in whole)
            fitting = fits(rows[:, :-1].reshape(tokens.shape), self.model.bos_id)
            loss_of = self.loss if fitting else self.model
            with autocast(self.config.dtype, self.device):
                loss = loss_of(tokens, targets, kind.qat, kind.looped) / self.batch_tokens
            loss.backward()
            total += loss.detach()
        return total

    def train_step(self, fraction: float) -> Tensor:
        """Take one optimizer step and average the weights; returns this rank's part of the mean loss in nats, a 0-d
        tensor.

        fraction: share of the run that is over, which decides the rates and the kind of step.
        """
        kind = step_kind(self.config, self.loops, fraction)
        rate = rate_factor(fraction, self.config.warmdown_fraction, self.config.rate_floor)
        momentum = muon_momentum(self.config, fraction)
        with record_function("gradient"):
            loss = self.backward(self.step, kind)
        with record_function("reduce and clip"):
            self.gradient.reduce(self.config.gradient_clip)
        with record_function("optimizers"):
            self.optimizers.step(rate, momentum)
        with record_function("average"):
            self.ema.update()
        self.step += 1
        self.qat_steps += kind.qat
        return loss

    def warm_up(self) -> None:
        """Run steps on throw-away state: compiles every graph the run will use and leaves no trace."""
        if not self.config.warmup_steps:
            return
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        random_state = torch.get_rng_state()
        optimizers, kinds = Optimizers(self.model, self.config), step_kinds(self.config, self.loops)
        for step in range(self.config.warmup_steps):
            self.backward(step, kinds[step % len(kinds)])
            self.gradient.reduce(self.config.gradient_clip)
            optimizers.step(1.0, self.config.muon_momentum)
        with torch.no_grad():
            for parameter, weight in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        torch.set_rng_state(random_state)
        synchronise(self.device)

    def save(self, checkpoints: Checkpoints, elapsed_seconds: float) -> None:
        """Write a checkpoint of the run on rank 0. elapsed_seconds: of the budget."""
        if collectives.rank() == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizers": self.optimizers.state_dict(),
                "ema": self.ema.averages,
                "step": self.step,
                "qat_steps": self.qat_steps,
                "next_sequence": self.step * self.batches.per_step,
                "random_state": torch.get_rng_state(),
                "elapsed_seconds": elapsed_seconds,
            }
            checkpoints.save(self.step, state)

    def load(self, checkpoints: Checkpoints, agree: collectives.Agreement) -> float | None:
        """Take up the newest sound checkpoint; returns the budget it had used, in seconds, or None without one."""
        state = checkpoints.load(self.device, agree)
        if state is None:
            return None
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        for average, saved in zip(self.ema.averages, state["ema"], strict=True):
            average.copy_(saved)
        self.step, self.qat_steps = state["step"], state["qat_steps"]
        if state["next_sequence"] != self.step * self.batches.per_step:
            raise RecipeError(
                f"{checkpoints.folder} was written with another train.batch_tokens; remove its folder to start anew"
            )
        torch.set_rng_state(state["random_state"].cpu())
        return state["elapsed_seconds"]


class RunAhead:
    """Lets the host queue one step of GPU work ahead, no more: the clock then tells the GPU's time, without a stop."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.before: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait for the step before the one just queued, on a GPU."""
        if self.cuda:
            if self.before is not None:
                self.before.synchronize()
            self.before = torch.cuda.Event()
            self.before.record()


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all that was queued; a CPU's work is done already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def deterministic(config: TrainConfig, device: torch.device) -> None:
    """Make a fixed number of steps give the same bits again, which on a GPU needs the deterministic kernels."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(bool(config.steps))
        torch.set_float32_matmul_precision("high")
