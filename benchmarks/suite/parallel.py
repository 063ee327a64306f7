"""One process beside two over gloo, on the CPU, one thread each: what a second rank brings and what it costs.

Both processes are started once. Rank 0 works alone while the other waits for its call, then both work together, in
turns; so the pairs are as close in time as elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.suite.setup import Agreement, Bench, Costs, Row, sizes
from benchmarks.suite.stages import scored
from benchmarks.suite.timing import once, summary
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.model.transformer import parameter_count
from hedgemix.runtime.files import read_json, write_json
from hedgemix.train.trainer import Run
from pipeline.forecast import operations

CPU = torch.device("cpu")
SEGMENTS = 4
"""Of the evaluation: so many segments, shared out."""


def ranks(bench: Bench) -> Iterator[Row]:
    if bench.device.type != "cpu":
        bench = replace(bench, device=CPU, sizes=sizes(CPU, quick=False))
    bench.text(bench.sizes.short)
    with TemporaryDirectory() as scratch:
        mp.spawn(work, (bench.sizes, bench.limits, bench.folder, Path(scratch)), nprocs=2)
        found = read_json(Path(scratch) / "found.json")
    recipe, steps = bench.sizes.short, bench.sizes.rank_steps
    config, train, vocab_size = recipe.evaluate, recipe.train, recipe.data.vocab_size
    muon = operations.muon_operations(operations.matrix_shapes(recipe.model), train.newton_schulz_steps)
    per_step = operations.train_operations(recipe.model, train, vocab_size) + muon
    tokens = SEGMENTS * config.segment_tokens
    spent = operations.streaming_operations(
        recipe.model, vocab_size, tokens, config.window_tokens, config.segment_tokens, config.overlap_tokens
    )
    costs = {
        "training": Costs("tokens", steps * train.batch_tokens, steps * per_step,
                          steps * operations.step_bytes(parameter_count(bench.fresh(recipe)))),
        "streaming": Costs("tokens", tokens, spent, 8 * tokens * vocab_size),
    }  # fmt: skip
    for what, cost in costs.items():
        one, two = found[what]["one"], found[what]["two"]
        apart = max(abs(a - b) for a, b in zip(one["values"], two["values"], strict=True))
        yield bench.row(
            ("ranks", f"{what}, 2 processes", f"{cost.units:,} tokens", "1 process"),
            summary(one["seconds"], two["seconds"]),
            cost,
            Agreement("norm of the weights" if what == "training" else "nats a token", apart, 1e-3),
            note="one thread a process",
        )


def work(rank: int, chosen: Any, limits: Any, folder: Path, scratch: Path) -> None:
    torch.set_num_threads(1)
    bench = Bench(CPU, chosen, limits, folder, log=lambda _: None)
    found: dict[str, Any] = {what: {n: {"seconds": [], "values": []} for n in ("one", "two")} for what in JOBS}
    for turn in range(-1, chosen.repeats):
        for side in ("one", "two") if turn % 2 else ("two", "one"):
            if side == "one" and rank:
                continue
            if side == "two":
                meeting = f"file://{scratch}/meeting{turn}"
                dist.init_process_group(
                    "gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=10)
                )
            for what, prepare in JOBS.items():
                job = prepare(bench)
                if side == "two":
                    dist.barrier()
                seconds, value = once(job)
                if turn >= 0:
                    found[what][side]["seconds"].append(seconds)
                    found[what][side]["values"].append(value)
            if side == "two":
                dist.destroy_process_group()
    if rank == 0:
        write_json(scratch / "found.json", found)


def train_job(bench: Bench) -> Any:
    recipe = bench.sizes.short
    run = Run(bench.fresh(recipe), recipe.train, bench.batches(recipe), CPU)

    def steps() -> float:
        for _ in range(bench.sizes.rank_steps):
            run.train_step(0.1)
        return float(torch.cat([weight.detach().flatten() for weight in run.model.parameters()]).double().norm())

    return steps


def score_job(bench: Bench) -> Any:
    recipe = bench.sizes.short
    size, model, tokens_N = recipe.evaluate.segment_tokens, bench.fresh(recipe), bench.valid_tokens(recipe)
    chunk = Piece(size, (SEGMENTS + 1) * size)
    return lambda: float(scored(model, tokens_N, chunk, recipe.evaluate).mean())


JOBS = {"training": train_job, "streaming": score_job}
