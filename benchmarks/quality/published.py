"""What a sharper model does to the published rule, and to a code: the reason why the rule's number is no score.

    python benchmarks/quality/published.py runs/RECORD.parquet [--seed N] [--tokens N]

The neural logits of the artifact are divided by T before everything else. A sharp row is a bad prediction: its loss
grows. The published rule's "entropy expert" gives whatever occurs the probability exp(-H), which goes to 1 as the
entropy H goes to 0, so the number that the rule reports goes to 0. Prints a markdown table, in bits per byte of the
chunks that the rule scores with all its experts (before 10,000 counted tokens it is the neural model). Test-time
training is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.audit.claim import Claim, claims
from hedgemix.config import RecipeError
from hedgemix.data import dataset as datasets
from hedgemix.data.bpb import bits_per_byte
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.scoring_order import Piece

TEMPERATURES = (1.0, 0.5, 0.25, 0.1, 0.03)
WARM_TOKENS = 10_000
"""What the rule counts before its experts join."""
HEADER = "| T | published rule | its mean mass | neural model | valid mixture |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Options:
    table: Annotated[Path, tyro.conf.Positional]
    """The record's parquet file."""
    seed: int | None = None
    """Which row (default: the first that is done)."""
    tokens: int = 32_768
    """Tokens scored, from the start."""


class Sharpened(Evaluation):
    """An evaluation whose neural rows were divided by a temperature."""

    temperature = 1.0

    def rows(self, chunk: Piece) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
        for piece, rows in super().rows(chunk):
            yield piece, {name: (row / self.temperature).log_softmax(-1) for name, row in rows.items()}


def measure(claim: Claim, tokens_N: np.ndarray, temperature: float) -> dict[str, float]:
    """Bits per byte of the published rule, the neural model and the mixture, and the rule's mean mass."""
    config = claim.recipe.evaluate
    config = replace(config, ttt=replace(config.ttt, enabled=False))
    work = Sharpened.begin(artifact.read(claim.artifact), tokens_N, config, torch.device("cpu"))
    work.temperature = temperature
    nats, size, mass, tokens = dict.fromkeys(work.nats, 0.0), 0, 0.0, 0
    for number, chunk in enumerate(work.chunks):
        joined, before, mass_before = work.published.counted >= WARM_TOKENS, dict(work.nats), work.mass
        line = work.run_chunk(number, chunk)
        if joined:
            nats = {name: total + work.nats[name] - before[name] for name, total in nats.items()}
            size, tokens, mass = size + line["bytes"], tokens + line["tokens"], mass + work.mass - mass_before
    if not size:
        raise RecipeError(f"in {len(tokens_N):,} tokens no chunk begins after {WARM_TOKENS:,}: give more --tokens")
    names = {"published": "published", "neural": "quantized", "mixture": "mixed"}
    return {**{name: bits_per_byte(nats[key], size) for name, key in names.items()}, "mass": mass / tokens}


def main(options: Options) -> None:
    claim = claims(options.table, () if options.seed is None else (options.seed,))[0]
    stream = datasets.valid_stream(claim.dataset)
    tokens_N = stream.read(0, min(options.tokens, len(stream)))
    print(HEADER, flush=True)
    for temperature in TEMPERATURES:
        bits = measure(claim, tokens_N, temperature)
        figures = (f"{bits['published']:.4f}", f"{bits['mass']:.1f}", f"{bits['neural']:.4f}", f"{bits['mixture']:.4f}")
        print(f"| {temperature:g} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
