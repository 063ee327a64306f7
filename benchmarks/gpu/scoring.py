"""Scoring, mixing and test-time training: the seconds of an evaluation, and whether its numbers repeat."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.sections import Job
from benchmarks.gpu.sizes import seeded
from benchmarks.gpu.timing import LAUNCHES, WAITS, Profile, milliseconds
from benchmarks.gpu.training import strict
from benchmarks.suite.launches import counted
from benchmarks.suite.timing import once
from hedgemix import stages
from hedgemix.artifact import format as artifact
from hedgemix.config import EvaluateConfig
from hedgemix.data import dataset as datasets
from hedgemix.data.dataloader import Batches
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.scoring_order import Piece, chunk_rows, cut
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import ngram_index
from hedgemix.mixers.batch_mixer import SPAN_TOKENS, BatchMixer, Scores
from hedgemix.model.transformer import Model
from hedgemix.runtime.cuda_graph import CHECKED
from hedgemix.train.trainer import Run, deterministic

ROW_SETS = ("frozen", "adapted")
WARM_PIECES = CHECKED + 2
"""Mixed before the clock starts: the first of a text, which is no whole one, and those that graphs are compared in."""
PROFILED_PIECES = 2


def scoring(job: Job) -> None:
    """Rows of one model for every token: one streaming pass, and sliding windows."""
    sizes, recipe = job.sizes, job.sizes.recipe
    model, config = fresh(job), recipe.evaluate
    text_N = held_out(job, sizes.streamed_tokens + 1)
    streaming, sliding = replace(config, order="streaming"), replace(config, order="sliding")
    rows(model, text_N[: 2 * config.segment_tokens], 1, streaming)  # kernels and plans, not counted
    seconds, _ = once(lambda: rows(model, text_N, 1, streaming))
    job.tell("streaming", (len(text_N) - 1) / seconds, "tokens/s", note=f"{len(text_N) - 1:,} tokens, one model")
    job.peak("streaming")
    begin, stop = config.window_tokens + 1, config.window_tokens + 1 + sizes.slid_tokens
    first = begin + config.stride_tokens * config.batch_windows
    rows(model, text_N[:first], begin, sliding)
    seconds, _ = once(lambda: rows(model, text_N[:stop], begin, sliding))
    name = f"sliding {config.window_tokens}/{config.stride_tokens}"
    job.tell("sliding", sizes.slid_tokens / seconds, "tokens/s", note=f"{name}, {sizes.slid_tokens:,} tokens")
    job.peak("sliding")


def fresh(job: Job) -> Model:
    """A new model: what its rows say does not change how long they take."""
    recipe = job.sizes.recipe
    torch.manual_seed(1)
    return (
        Model(recipe.model, recipe.data.vocab_size, recipe.train.sequence_tokens).to(job.device).requires_grad_(False)
    )


def held_out(job: Job, tokens: int) -> Tensor:
    """The first held-out tokens, int64, on the device."""
    stream = datasets.valid_stream(job.text.wait())
    return torch.from_numpy(stream.read(0, min(tokens, len(stream))).astype(np.int64)).to(job.device)


def rows(model: Model, text_N: Tensor, start: int, config: EvaluateConfig) -> None:
    for _ in chunk_rows({"model": model}, text_N, Piece(start, len(text_N)), config):
        pass


def mixing(job: Job) -> None:
    """All mixtures of two row sets over the held-out text, in blocks of several sizes, with CUDA graphs and without."""
    sizes, recipe, device = job.sizes, job.sizes.recipe, job.device
    config, V, segment = recipe.evaluate.mixer, recipe.data.vocab_size, recipe.evaluate.segment_tokens
    tokens = held_out(job, (WARM_PIECES + PROFILED_PIECES) * segment + sizes.mixed_tokens).cpu().numpy()
    tokens = tokens.astype(np.uint16)
    seconds, index = once(lambda: ngram_index.build(tokens, config.orders, V, config.match_lengths))
    job.tell("index", len(tokens) / seconds, "tokens/s", note="on the CPU")
    pieces = cut(1, len(tokens), segment)
    logits = 2 * torch.randn(len(ROW_SETS), segment, V, generator=seeded(6)).to(device)

    def begin(block: int, graph: bool | None) -> BatchMixer:
        span = min(SPAN_TOKENS["cuda"], segment)  # as an evaluation on a GPU has it
        settings = replace(config, block_tokens=block)
        return BatchMixer(settings, V, index, device, names=ROW_SETS, span_tokens=span, resident=True, graph=graph)

    for block in sizes.blocks:
        found: list[list[Scores]] = []
        for graph, name in ((None, f"blocks of {block}"), (False, f"blocks of {block}, eager")):
            mixer = begin(block, graph)
            work = partial(mixed, mixer, logits)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                work(pieces[:WARM_PIECES])
            some = pieces[WARM_PIECES:-PROFILED_PIECES]
            seconds, scores = once(partial(work, some))
            found.append(scores)
            n_tokens = some[-1].stop - some[0].start
            each = 1e6 * seconds / n_tokens
            job.tell(name, each, "us a token", note=f"{n_tokens:,} tokens, two row sets")
            if graph is None:
                job.tell(f"graphs of {name}", graphs(mixer), note="; ".join(str(each.message) for each in told))
            profiled_mixing(
                job, name, block, partial(work, pieces[-PROFILED_PIECES:]), each * PROFILED_PIECES * segment
            )
            replayed_span(job, name, mixer)
            job.peak(f"mixing, {name}")
        job.tell(f"graph against eager, blocks of {block}: difference", apart(*found), "nats", most=0.0)


def mixed(mixer: BatchMixer, logits: Tensor, pieces: list[Piece]) -> list[Scores]:
    """Score the pieces, each with the same logits (R, B, V)."""
    found = []
    for piece in pieces:
        given = logits[:, : piece.stop - piece.start]
        found.append(mixer.score(dict(zip(ROW_SETS, given, strict=True)), piece.start, piece.stop))
    return found


def graphs(mixer: BatchMixer) -> str:
    """Whether the mixer replays both of its graphs, having compared them with the work as often as it does."""
    (sets,) = mixer.sets
    replays = [sets.spans, sets.call and sets.call[2]]
    if not any(replays):
        return "none made"
    kept = [each is not None and each.replay is not each.work and not each.unchecked for each in replays]
    return "kept" if all(kept) else "given up"


def apart(ours: list[Scores], theirs: list[Scores]) -> float:
    """The largest difference between what two mixers charged any token, in nats; NaN where one of them has it."""
    nats = [
        torch.cat([x for each in of for kinds in each.nll.values() for x in kinds.values()]) for of in (ours, theirs)
    ]
    return float((nats[0] - nats[1]).abs().max())


def profiled_mixing(job: Job, name: str, block: int, work: Callable[[], object], microseconds: float) -> None:
    """Of whole pieces: array operations or launches a block, waits of the host, and how much of the time the device
    works. microseconds: what the work takes without the profiler."""
    blocks = PROFILED_PIECES * job.sizes.recipe.evaluate.segment_tokens / block
    if job.device.type == "cpu":
        job.tell(f"operations a block, {name}", counted(work) / blocks)
        return
    found = Profile(work, job.device)
    launches = found.count(LAUNCHES)
    job.tell(f"launches a block, {name}", launches / blocks)
    job.tell(f"waits a block, {name}", found.count(WAITS) / blocks)
    job.tell(f"us a launch, {name}", microseconds / launches, "us", note="wall clock over launches")
    busy = 1000 * sum(found.kinds().values())
    job.tell(f"device at work, {name}", 100 * busy / microseconds, "%")


def replayed_span(job: Job, name: str, mixer: BatchMixer) -> None:
    """Of what a graph replays, a span's blocks: microseconds from one of its operations to the next. The mixer is of no
    use after it: it learns the same span again and again."""
    work = partial(mixer.sets[0].mix, mixer._blocks(0, mixer.span))
    operations = counted(work)
    spent = milliseconds(mixer.sets[0].spans or work, job.device, job.sizes.repeats)
    note = f"{operations} operations a span, {spent:.3f} ms"
    job.tell(f"us an operation of a span, {name}", 1000 * spent / operations, "us", note=note)


def adapting(job: Job) -> None:
    """A step of test-time training; then, what repeats to the bit and what does not."""
    adapter_step(job)
    repeated_steps(job)
    repeated_evaluations(job)


def adapter_step(job: Job) -> None:
    config = job.sizes.recipe.evaluate
    ttt = config.ttt
    adapter = Adapter(fresh(job), ttt, 2, config.dtype)
    size = ttt.batch_sequences * ttt.sequence_tokens
    text_N = held_out(job, size + 1)
    inputs, targets = (text_N[at : at + size].view(-1, ttt.sequence_tokens) for at in (0, 1))
    weights = torch.ones_like(inputs, dtype=torch.float32)
    spent = milliseconds(lambda: adapter.step(inputs, targets, weights), job.device, job.sizes.repeats)
    job.tell("step of test-time training", spent, "ms", note=f"{size:,} tokens, all on this device")
    job.peak("test-time training")


def repeated_steps(job: Job) -> None:
    """Two eager steps in strict mode, twice from the same seed."""
    recipe, sequences = job.sizes.recipe, job.sizes.smoke_sequences
    config = replace(
        recipe.train, steps=2, compile=False, microbatch_sequences=sequences,
        batch_tokens=sequences * recipe.train.sequence_tokens,
    )  # fmt: skip
    stream = datasets.train_stream(job.text.wait())
    found: list[list[Tensor]] = []
    for _ in range(2):
        deterministic(config, job.device)
        torch.manual_seed(2)
        model = Model(recipe.model, recipe.data.vocab_size, config.sequence_tokens).to(job.device)
        run = Run(model, config, Batches(stream, config.sequence_tokens, sequences, seed=1), job.device)
        began = time.monotonic()
        for _ in range(2):
            float(run.train_step(0.1))
        seconds = time.monotonic() - began
        run.read.close()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.use_deterministic_algorithms(False)
    apart = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    job.tell("2 strict steps, twice: difference", apart, "", most=0.0, note=f"{500 * seconds:.0f} ms a step")


def repeated_evaluations(job: Job) -> None:
    """The smoke test's artifact evaluated twice on the held-out text; test-time training moves it in between."""
    path = job.work / "smoke" / stages.ARTIFACT
    found = artifact.read(path)
    tokens = held_out(job, job.sizes.repeated_tokens + 1).cpu().numpy()
    config = replace(job.sizes.recipe.evaluate, chunk_tokens=job.sizes.repeated_tokens // 2)
    for name, wanted in (("as recorded", False), ("as audited", True)):
        with strict(wanted):
            nats = [final_nats(found, tokens, config, job.device) for _ in range(2)]
        job.tell(f"evaluated twice, {name}: difference", abs(nats[0] / nats[1] - 1), "of the nats")


def final_nats(found: artifact.Artifact, tokens: np.ndarray, config: EvaluateConfig, device: torch.device) -> float:
    work = Evaluation.begin(found, tokens, config, device)
    for number, chunk in enumerate(work.chunks):
        work.run_chunk(number, chunk)
    return work.nats["final"]
