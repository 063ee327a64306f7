"""What each part of the score is worth: a finished record's validation text, scored with parts left out.

    python benchmarks/quality/ablation.py runs/RECORD.parquet [--device cpu] [--out ablation.md]

For every finished seed the artifact scores the text once with its frozen weights and once with test-time training;
each variant of the mixture takes those same rows. Mixing seconds are a line's own, forward seconds (with the training
between passes) those of its rows. A line that another line's run gives has no mixing seconds. Prints and writes a
markdown table: mean and sample deviation over seeds, and the mean difference to the neural model. The lines "its
record" repeat what the record's own evaluation found, with the settings and the code of its day.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.config import EvaluateConfig, MixerConfig, Recipe, from_dict
from hedgemix.data import bpb, dataset, tokenizer
from hedgemix.data.dataset import Dataset
from hedgemix.evaluate.evaluator import target_nats
from hedgemix.evaluate.scoring_order import FEATURES, chunk_rows, chunks
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import ngram_index
from hedgemix.experts.feature_experts import CACHE, HEAD, start_experts
from hedgemix.experts.ngram_index import NgramIndex
from hedgemix.experts.registry import EXPERTS
from hedgemix.mixers import hedge
from hedgemix.mixers.batch_mixer import BatchMixer
from pipeline.results.table import mean_and_deviation
from pipeline.steps import graph
from pipeline.storage.store import Storage

MIXER = MixerConfig()
"""The default under test; a record's own mixer settings are not used."""


@dataclass(frozen=True)
class Options:
    table: tyro.conf.Positional[Path]
    """A record's parquet file."""
    data: Path | None = None
    """Folder of the record's dataset.json (default: the one its runs folder keeps)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seeds: tuple[int, ...] = ()
    """Only these (default: every finished one)."""
    tokens: int = 0
    """Score only the text's first so many tokens (0: all)."""
    out: Path | None = None
    """Also write the table here."""


DEFAULT = "ensemble, neural cache and fast head"


@dataclass(frozen=True)
class Line:
    """One variant: which rows it mixes, with what, and which mixture of that is its score."""

    label: str
    mixer: MixerConfig
    kind: str
    rows: str = "frozen"
    given: tuple[str, ...] = ()
    """Experts over the rows' features that are mixed besides."""

    @property
    def key(self) -> tuple[MixerConfig, str, tuple[str, ...]]:
        """What lines have in common that one mixer scores."""
        return self.mixer, self.rows, self.given


def lines(ttt: bool) -> list[Line]:
    """All variants that mix."""
    orders = MIXER.orders
    found = [
        Line("ensemble: " + (f"orders 1 to {n}" if n > 1 else "order 1"), _cut(orders[:n]), "ensemble")
        for n in range(1, 1 + len(orders))
    ]
    found += [
        Line("ensemble: all orders and the match", MIXER, "ensemble"),
        Line("Hedge over the experts", MIXER, "hedge"),
    ]
    found += [Line(f"ensemble and {name}", replace(MIXER, experts=(name,)), "ensemble") for name in EXPERTS]
    found += [
        Line("ensemble and the neural cache", MIXER, "ensemble", given=(CACHE,)),
        Line("ensemble and the fast head", MIXER, "ensemble", given=(HEAD,)),
        Line(DEFAULT, MIXER, "ensemble", given=(CACHE, HEAD)),
    ]
    found += [
        Line(
            f"ensemble, neural cache, fast head and {name}",
            replace(MIXER, experts=(name,)),
            "ensemble",
            given=(CACHE, HEAD),
        )
        for name in EXPERTS
    ]
    for gate in ("none", "entropy", "order"):
        linear = (gate, *(other for other in MIXER.linear_gates if other != gate))
        alone = replace(MIXER, linear_gates=linear, gates=(gate,), memory_tokens=MIXER.memory_tokens[:1])
        found += [Line(f"linear mixer, gate {gate}", alone, "linear")]
        found += [Line(f"logistic mixer, gate {gate}", alone, "logistic")]
    found += [
        Line("ensemble without linear mixers", replace(MIXER, linear_gates=()), "ensemble"),
        Line("ensemble without the bias", replace(MIXER, bias_rate=0.0), "ensemble"),
        Line("ensemble with pure Hedge, share 0", replace(MIXER, hedge_share=0.0), "ensemble"),
    ]
    if ttt:
        found.append(Line("ensemble over trained weights", MIXER, "ensemble", "adapted"))
    return found


def _cut(orders: tuple[int, ...]) -> MixerConfig:
    return replace(MIXER, orders=orders, match_lengths=())


def main(options: Options) -> None:
    table = pd.read_parquet(options.table)
    table = table[(table.status == "done") & (table.seed.isin(options.seeds) if options.seeds else True)]
    if not len(table):
        sys.exit(f"error: {options.table} has no finished row of these seeds")
    recipe = from_dict(Recipe, json.loads(table.iloc[0].config))
    folder = options.data or graph.data_step(Storage("", options.table.resolve().parent), recipe.data).folder
    text = dataset.load(folder)
    stream = dataset.valid_stream(text)
    tokens = stream.read(0, min(len(stream), options.tokens or len(stream)))
    print(f"{len(tokens):,} tokens; counting", file=sys.stderr, flush=True)
    index = ngram_index.build(tokens, MIXER.orders, text.vocab_size, MIXER.match_lengths)
    found = []
    for row in table.to_dict("records"):
        lines_of = score(Path(row["artifact_path"]), tokens, index, recipe.evaluate, torch.device(options.device))
        if len(tokens) == len(stream):
            kept = {"its record, mixed": row["bpb_mixed"], "its record, final": row["bpb_final"]}
            lines_of |= {label: Score(bits) for label, bits in kept.items()}
        found.append(lines_of)
        print(f"seed {row['seed']}: {time.process_time():.0f} s so far", file=sys.stderr, flush=True)
        report = markdown(text, tokens, recipe, table.seed.tolist()[: len(found)], found)
        if options.out:  # after every seed, so that a run that is cut leaves the finished ones
            options.out.write_text(report + "\n")
    print(report)


@dataclass
class Score:
    """Of one line and seed; seconds are None where another line's run, or the record's table, gave the score."""

    bpb: float
    forward: float | None = None
    mixing: float | None = None


def score(
    path: Path, tokens: np.ndarray, index: NgramIndex, config: EvaluateConfig, device: torch.device
) -> dict[str, Score]:
    """Every line's score with one artifact."""
    found = artifact.read(path)
    model = load_model(found).to(device)
    sizes = bpb.token_bytes(bpb.byte_tables(tokenizer.load(found.tokenizer)), tokens[:-1], tokens[1:])
    tokens_N = torch.from_numpy(tokens.astype(np.int64)).to(device)
    watch = Watch(device)
    todo, mixers = lines(config.ttt.trains_weights), dict[tuple[MixerConfig, str, tuple[str, ...]], BatchMixer]()
    for line in todo:
        if line.key not in mixers:
            own = select(index, line.mixer)
            mixers[line.key] = BatchMixer(line.mixer, model.vocab_size, own, device, given=line.given)
    nll: dict[tuple[MixerConfig, str, tuple[str, ...]], dict[str, list[Tensor]]] = {key: {} for key in mixers}
    everything = replace(
        config, cache=replace(config.cache, enabled=True), ttt=replace(config.ttt, enabled=True, kind="head")
    )
    experts_over = start_experts(everything, model, device)
    assert experts_over
    neural = dict.fromkeys(("frozen", "adapted", "sliding"), 0.0)
    parts = chunks(len(tokens), config.chunk_tokens)
    adapter = Adapter(model, config.ttt, len(parts), config.dtype) if config.ttt.trains_weights else None
    weights = torch.from_numpy(np.concatenate([[0], sizes])).float().to(device)
    weights = weights if config.ttt.byte_weighted else torch.ones_like(weights)
    for number, chunk in enumerate(parts):
        models = {"frozen": model} | ({"adapted": adapter.scorer} if adapter else {})
        for name, scorer in models.items():
            streaming = replace(config, order="streaming")
            source = chunk_rows({name: scorer}, tokens_N, chunk, streaming, "frozen")
            while (item := watch(name, partial(next, source, None))) is not None:
                piece, rows = item
                neural[name] += target_nats(rows[name], tokens_N[piece.start : piece.stop])
                said_of = {}
                if FEATURES in rows:
                    here = rows[name], rows[FEATURES], tokens_N[piece.start : piece.stop]
                    said_of = watch("experts", partial(experts_over.rows, *here))
                for key in (key for key in mixers if key[1] == name):
                    given = {"neural": rows[name]} | {expert: said_of[expert] for expert in key[2]}
                    said = watch(
                        key, lambda key=key, given=given, at=piece: mixers[key].score(given, at.start, at.stop)
                    )
                    for kind, values in said.nll["neural"].items():
                        nll[key].setdefault(kind, []).append(values)
        source = chunk_rows({"sliding": model}, tokens_N, chunk, replace(config, order="sliding"))
        while (item := watch("sliding", partial(next, source, None))) is not None:
            neural["sliding"] += target_nats(item[1]["sliding"], tokens_N[item[0].start : item[0].stop])
        if adapter and number + 1 < len(parts):
            watch("adapted", partial(adapter.learn, tokens_N, weights, chunk))
    n_bytes = int(sizes.sum())

    def rate(nats: float) -> float:
        return bpb.bits_per_byte(nats, n_bytes)

    plain = MIXER, "frozen", ()
    own = nll[plain]
    experts = -torch.stack([torch.cat(own[name]) for name in mixers[plain].experts], 1)[:, None]
    uniform = torch.full(experts.shape[1:], -np.log(experts.shape[2]), dtype=torch.float64, device=device)
    pure = -float(hedge.fixed_share(experts, uniform, 0.0)[0].sum())
    out = {
        "neural, sliding windows": Score(rate(neural["sliding"]), watch.seconds["sliding"]),
        "neural, streaming": Score(rate(neural["frozen"]), watch.seconds["frozen"]),
        "neural with test-time training": Score(rate(neural["adapted"]), watch.seconds.get("adapted", 0.0)),
        "pure Hedge over the experts, share 0": Score(rate(pure), watch.seconds["frozen"]),
    }
    for line in todo:
        key = line.key
        nats = sum(float(part.sum()) for part in nll[key][line.kind])
        first = next(other for other in todo if other.key == key) is line
        out[line.label] = Score(rate(nats), watch.seconds[line.rows], watch.seconds[key] if first else None)
    return out if config.ttt.trains_weights else {k: v for k, v in out.items() if k != "neural with test-time training"}


def select(index: NgramIndex, config: MixerConfig) -> NgramIndex:
    """The part of an index that a mixer of fewer experts reads."""
    tables = {n: table for n, table in index.tables.items() if n in config.orders}
    matches = index.match if config.match_lengths else ngram_index.build(index.tokens_N, (1,), index.vocab_size).match
    return replace(index, orders=config.orders, tables=tables, match=matches)


class Watch:
    """Seconds by name, to the end of a device's work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[Any, float]()

    def __call__(self, name: Any, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        value = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        return value


def markdown(
    text: Dataset, tokens: np.ndarray, recipe: Recipe, seeds: list[int], found: list[dict[str, Score]]
) -> str:  # fmt: skip
    """The table, over the seeds."""
    where = f"recipe {recipe.recipe}, {recipe.data.source}, seeds {', '.join(map(str, seeds))}"
    order = f"{recipe.evaluate.window_tokens} tokens of context, stride {recipe.evaluate.stride_tokens} when sliding"
    out = [
        f"{len(tokens) - 1:,} validation tokens ({text.valid_sha256[:12]}); {where}; {order}.",
        "",
        "| variant | bits per byte | std | to neural | mixing s | forward s |",
        "|---|---|---|---|---|---|",
    ]
    base = np.array([seed["neural, streaming"].bpb for seed in found])
    for label in found[0]:
        each = [seed[label] for seed in found]
        mean, deviation = mean_and_deviation([one.bpb for one in each])
        change = float(np.mean([one.bpb for one in each] - base))
        mixing, forward = (seconds([getattr(one, name) for one in each]) for name in ("mixing", "forward"))
        name = f"**{label} (the default)**" if label == DEFAULT else label
        out.append(f"| {name} | {mean:.4f} | {deviation:.4f} | {change:+.4f} | {mixing} | {forward} |")
    return "\n".join(out)


def seconds(each: list[float | None]) -> str:
    known = [value for value in each if value is not None]
    return f"{np.mean(known):.1f}" if known else ""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
