"""What exports cost and lose: a finished record's weights quantized in several ways, written, read back and scored.

    python benchmarks/quality/quantization.py runs/RECORD.parquet [--seeds N ...] [--device cpu] [--out quantization.md]

Every line is a real file: its bytes are the file's, its loss that of the tensors read from it, on the first validation
tokens in full windows of the training context, in float32. Prints and writes a markdown table: mean and sample
deviation over seeds.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor

from benchmarks.quality.row_steps import row_step_tensors
from hedgemix.artifact import format as artifact
from hedgemix.config import QuantizeConfig, Recipe, from_dict
from hedgemix.data import dataset
from hedgemix.data.dataset import Dataset
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.quantizer import Tensors, quantize_model
from hedgemix.runtime.files import load_tensors
from pipeline.results.table import mean_and_deviation
from pipeline.steps import graph
from pipeline.storage.store import Storage

NO_LIMIT = 2**62
PUBLISHED = QuantizeConfig(method="reference", scale_floor=1 / 15, prune_fraction=0.03, zstd_level=22)
FREE = QuantizeConfig(method="reference")
STEPPED = QuantizeConfig()
FINE = replace(STEPPED, loss_nats=1e-6)
"""Where the search for a size begins."""
ROW_SCALES = (0.25, 0.5, 1.0)
"""Steps over those of the field's entries, for one step a row."""


@dataclass(frozen=True)
class Options:
    table: tyro.conf.Positional[Path]
    """A record's parquet file; the folders of its training steps lie beside it."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seeds: tuple[int, ...] = ()
    """Only these (default: every finished one)."""
    tokens: int = 32_768
    """Validation tokens scored."""
    out: Path | None = None
    """Also write the table here."""


@dataclass(frozen=True)
class Line:
    """One file of one seed."""

    n_bytes: int
    bits: float
    """A parameter, the whole file over all of them."""
    loss: float
    """Nats a token above the trained weights'."""
    kl: float
    """Nats a token from the trained weights' distribution: the same in the mean, with less noise."""
    expected: float
    """What the export said it would be (nan where it does not)."""
    encode: float
    decode: float


class Seed:
    """A trained model, and what its exports are compared with."""

    def __init__(self, recipe: Recipe, text: Dataset, folder: Path, options: Options) -> None:
        self.recipe, self.device = recipe, torch.device(options.device)
        self.context = recipe.train.sequence_tokens
        self.model = Model(recipe.model, text.vocab_size, self.context, draw=False)
        self.model.load_state_dict(load_tensors(folder / "weights.pt"))
        self.model = self.model.to(self.device).requires_grad_(False)
        self.moments = Moments(**load_tensors(folder / "moments.pt", self.device))
        stream = dataset.valid_stream(text)
        windows = min(options.tokens, len(stream) - 1) // self.context
        tokens = torch.from_numpy(stream.read(0, windows * self.context + 1).astype(np.int64)).to(self.device)
        self.inputs, self.targets = tokens[:-1].view(windows, -1), tokens[1:].view(windows, -1)
        header = {"model": asdict(recipe.model), "vocab_size": text.vocab_size, "context_tokens": self.context}
        self.pack = partial(artifact.pack, header, Path(text.tokenizer).read_bytes())
        self.exact = [rows.cpu() for rows in self.rows(self.model)]

    def rows(self, model: Model) -> Iterator[Tensor]:
        """Logarithmic probabilities (B, T, V), a few windows at a time."""
        with torch.inference_mode():
            for inputs in self.inputs.split(max(1, 2048 // self.context)):
                yield model.logits(model.features(inputs)).float().log_softmax(-1)

    def line(self, config: QuantizeConfig, target_bytes: int, path: Path) -> Line:
        return self.written(
            lambda: quantize_model(
                self.model,
                self.moments,
                config,
                target_bytes,
                lambda tensors: len(self.pack(tensors=tensors, zstd_level=config.zstd_level)),
            ),
            config,
            path,
        )

    def row_steps(self, scale: float, path: Path) -> Line:
        return self.written(lambda: (row_step_tensors(self.model, self.moments, STEPPED, scale), {}), STEPPED, path)

    def written(
        self, quantize: Callable[[], tuple[Tensors, dict[str, Any]]], config: QuantizeConfig, path: Path
    ) -> Line:
        began = time.monotonic()
        tensors, report = quantize()
        path.write_bytes(self.pack(tensors=tensors, zstd_level=config.zstd_level))
        written = time.monotonic()
        found = artifact.read(path)
        decode = time.monotonic() - written
        model = Model(self.recipe.model, self.model.vocab_size, self.context, draw=False)
        model.load_state_dict(found.tensors)
        loss = kl = 0.0
        parts = self.targets.split(max(1, 2048 // self.context))
        for exact, rows, targets in zip(self.exact, self.rows(model.to(self.device)), parts, strict=True):
            difference = exact.to(self.device) - rows
            kl += float((exact.to(self.device).exp() * difference).sum())
            loss += float(difference.gather(2, targets[..., None]).sum())
        count, parameters = self.targets.numel(), parameter_count(self.model)
        expected = report.get("expected_loss_nats", float("nan"))
        bits = 8 * found.n_bytes / parameters
        return Line(found.n_bytes, bits, loss / count, kl / count, expected, written - began, decode)


def lines(seed: Seed, folder: Path) -> dict[str, Line]:
    """All exports of a seed."""
    path = folder / "artifact.hmx"
    published = seed.line(PUBLISHED, NO_LIMIT, path)
    equal = seed.line(replace(STEPPED, loss_nats=published.kl), NO_LIMIT, path)
    corrected = published.kl**2 / equal.kl  # once more, where the expectation was off
    beside = {}
    for scale in ROW_SCALES:
        label = f"one step a row, {scale:g} of the field's"
        beside[label] = line = seed.row_steps(scale, path)
        beside[f"steps, the bytes of {label}"] = seed.line(FINE, line.n_bytes, path)
    return {
        "reference, as published": published,
        "reference without floor and pruning": seed.line(FREE, NO_LIMIT, path),
        f"steps, loss {STEPPED.loss_nats:g} (the default)": seed.line(STEPPED, NO_LIMIT, path),
        "steps, the published export's bytes": seed.line(FINE, published.n_bytes, path),
        "steps, half its bytes": seed.line(FINE, published.n_bytes // 2, path),
        "steps, a third of its bytes": seed.line(FINE, published.n_bytes // 3, path),
        "steps, its KL": seed.line(replace(STEPPED, loss_nats=corrected), NO_LIMIT, path),
        **beside,
    }


def saved_bits(found: dict[str, Line]) -> dict[str, float]:
    """Bits a weight that steps by row and column save against one step a row at its KL, on the line of bits over log KL
    through our files; nan where theirs lies outside."""
    ours = sorted((math.log(line.kl), line.bits) for label, line in found.items() if label.startswith("steps"))
    kl, bits = zip(*ours, strict=True)
    theirs = {label: line for label, line in found.items() if label.startswith("one step a row")}
    return {
        label: line.bits - float(np.interp(math.log(line.kl), kl, bits, math.nan, math.nan))
        for label, line in theirs.items()
    }


def main(options: Options) -> None:
    table = pd.read_parquet(options.table)
    table = table[(table.status == "done") & (table.seed.isin(options.seeds) if options.seeds else True)]
    if not len(table):
        sys.exit(f"error: {options.table} has no finished row of these seeds")
    recipe = from_dict(Recipe, json.loads(table.iloc[0].config))
    text = dataset.load(Path(table.iloc[0].dataset_path))
    found, storage = [], Storage("", options.table.resolve().parent)
    for number in table.seed.tolist():
        folder = graph.seed_steps(storage, recipe, text, number, room_bytes=0).train.folder  # training reads no room
        if not (folder / "moments.pt").exists():
            sys.exit(f"error: {folder} has no moments.pt; run the record again with this version")
        with tempfile.TemporaryDirectory() as scratch:
            found.append(lines(Seed(recipe, text, folder, options), Path(scratch)))
        print(f"seed {number}: {time.process_time():.0f} s so far", file=sys.stderr, flush=True)
    report = markdown(recipe, table.seed.tolist(), options, found)
    print(report)
    if options.out:
        options.out.write_text(report + "\n")


def markdown(recipe: Recipe, seeds: list[int], options: Options, found: list[dict[str, Line]]) -> str:
    """The table, over the seeds; losses in thousandths of a nat."""
    out = [
        f"Recipe {recipe.recipe}, seeds {', '.join(map(str, seeds))}; first {options.tokens:,} validation tokens; "
        f"{options.device}, {torch.get_num_threads()} threads. Losses in 10^-3 nats a token.",
        "",
        "| export | bytes | std | bits a weight | loss | std | KL | std | expected | encode s | decode s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label in found[0]:
        each = [seed[label] for seed in found]
        size, size_std = mean_and_deviation([float(one.n_bytes) for one in each])
        loss, loss_std = mean_and_deviation([1000 * one.loss for one in each])
        kl, kl_std = mean_and_deviation([1000 * one.kl for one in each])
        bits, expected, encode, decode = (
            float(np.mean([getattr(one, name) for one in each])) for name in ("bits", "expected", "encode", "decode")
        )
        said = "" if np.isnan(expected) else f"{1000 * expected:.3f}"
        out.append(
            f"| {label} | {size:,.0f} | {size_std:,.0f} | {bits:.3f} | {loss:.3f} | {loss_std:.3f} | {kl:.3f} | "
            f"{kl_std:.3f} | {said} | {encode:.1f} | {decode:.2f} |"
        )
    out += ["", "Bits a weight that steps by row and column save at the KL of one step a row:", ""]
    each_seed = [saved_bits(lines) for lines in found]
    for label in each_seed[0]:
        saved, std = mean_and_deviation([bits[label] for bits in each_seed])
        out.append(f"- {label}: {saved:.2f} (std {std:.2f})")
    return "\n".join(out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
