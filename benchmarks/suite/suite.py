"""Every stage of hedgemix beside a named plain baseline, in one process, in turns.

    make bench                                      # everything, on this machine; bench/results.md and .parquet
    python -m benchmarks.suite.suite --only quantization  # one stage
    python -m benchmarks.suite.suite --device cuda        # the sizes of recipe record

Each side is warmed up, then both run in the order a b b a; seconds are medians. "faster" is the ratio of the medians
with the least and largest ratio of the pairs, and how many there were. The limit is what this machine's measured rates
of matrix products and memory would need for the stage's operations and bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.quality import memory
from benchmarks.suite import export, launches, machine, parallel, report, stages
from benchmarks.suite.setup import Bench, Row, sizes
from benchmarks.suite.timing import once
from hedgemix import recipes
from hedgemix.experts import ngram_index
from pipeline.forecast import gpu_plan

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "training": stages.training,
    "sliding": stages.sliding,
    "streaming": stages.streaming,
    "mixing": stages.mixing,
    "quantization": export.quantization,
    "coding": export.coding,
    "optimizer": export.optimizer,
    "ranks": parallel.ranks,
}


@dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = ()
    """These stages, without curves and plan (default: everything): training, sliding, streaming, mixing, quantization,
    coding, optimizer, ranks."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    quick: bool = False
    """Tiny sizes, for the test; the figures mean nothing."""
    out: Path = Path("bench")
    """Folder of results.parquet, results.md and the text that models are trained on."""
    update_docs: bool = False
    """Also write the tables into README.md and docs/performance.md."""


def main(options: Options) -> list[Row]:
    unknown = sorted(set(options.only) - set(STAGES))
    if unknown:
        sys.exit(f"error: no stage {unknown[0]!r}; choose from {', '.join(STAGES)}")
    if options.update_docs and (options.only or options.quick):
        sys.exit("error: --update-docs takes the figures of a whole run; leave out --only and --quick")
    began, device = time.monotonic(), torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    about = machine.describe(device)
    bench = Bench(device, sizes(device, options.quick), machine.measure(device, options.quick), options.out, log=say)
    rows: list[Row] = []
    for name in options.only or STAGES:
        for row in STAGES[name](bench):
            rows.append(row)
            say(f"{time.monotonic() - began:5.0f} s  {row.stage}: {row.what}, {row.ratio:.2f}x {row.baseline}")
    planned, grown = "", ""
    if not options.only:
        planned = plan_part(rows, bench, options.quick)
        say("cost as work grows")
        grown = memory.markdown((200_000,), (20_000,), 20_000) if options.quick else memory.markdown()
    head = report.machine_text(about, bench.limits, (time.monotonic() - began) / 60)
    text = f"{head}\n\n{report.table(rows)}\n"
    text += f"\n## As work grows\n\n{grown}\n\n## Recipe record on 8 GPUs\n\n{planned}\n" if grown else ""
    report.save(rows, about, bench.limits, options.out)
    (options.out / "results.md").write_text(text)
    print(text)
    if options.update_docs:
        report.update(ROOT / "README.md", "table", f"{report.table(rows, report.SHORT)}\n\n{head}")
        report.update(ROOT / "docs" / "performance.md", "table", f"{head}\n\n{report.table(rows)}")
        report.update(ROOT / "docs" / "performance.md", "curves", grown)
        report.update(ROOT / "docs" / "performance.md", "plan", planned)
    return rows


def plan_part(rows: list[Row], bench: Bench, quick: bool) -> str:
    """The plan's text."""
    recipe, cuda = recipes.record(), bench.device.type == "cuda"
    mixer, count = recipe.evaluate.mixer, 5_000 if quick else 500_000
    tokens = np.random.default_rng(0).zipf(1.2, count).clip(max=recipe.data.vocab_size) - 1
    seconds, _ = once(
        lambda: ngram_index.build(
            tokens.astype(np.uint16), mixer.orders, recipe.data.vocab_size, mixer.match_lengths
        )
    )  # fmt: skip
    rates = rates_from(rows, bench.limits, cuda, count / seconds)
    counted = launches.count_launches(recipe.evaluate, recipe.data.vocab_size)
    found = gpu_plan.plan(recipe, rates, counted)
    return report.plan_text(found, rates, gpu_plan.weakest(recipe, rates, counted), cuda)


def rates_from(rows: Iterable[Row], limits: machine.Limits, cuda: bool, indexing: float) -> gpu_plan.Rates:
    """The defaults, with what was measured in their place: all on a GPU, the CPU's own rates everywhere."""
    found: dict[str, Any] = {"indexing": indexing}
    for row in rows:
        if (row.stage, row.what) == ("coding", "encode"):
            found["coding"] = row.units_per_second
        if cuda and row.stage == "training":
            found |= {"peak": limits.bfloat16, "train_share": min(1.0, row.operations / row.seconds / limits.bfloat16)}
        if cuda and row.stage == "streaming":
            found["eager_share"] = min(1.0, row.operations / row.seconds / limits.bfloat16)
    if cuda:
        found["bandwidth"] = limits.bandwidth
    return replace(gpu_plan.Rates(), **found, measured=tuple(found))


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if any(not row.agrees for row in main(tyro.cli(Options, description=__doc__))):
        sys.exit("error: a stage and its baseline disagree; see `largest difference`")
