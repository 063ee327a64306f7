"""Seconds and memory of the counts and of an evaluation, by length of the text and by orders: synthetic text, no files.

    python benchmarks/quality/memory.py [--index 1000000 4000000] [--evaluation 100000 200000] [--orders-tokens 200000]

Each point is measured in a process of its own, with one thread. `anonymous_bytes` is the most that /proc/self/status
called RssAnon while the work ran, less what it was before: memory that only the process's end gives back, without the
pages of mapped files. Prints one line of JSON a point. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro

from hedgemix.config import EvaluateConfig, MixerConfig, ModelConfig, TTTConfig
from hedgemix.data import bpb
from hedgemix.data.device_text import Text
from hedgemix.data.shards import TokenStream, write_shard
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.experts import ngram_index
from hedgemix.experts.ngram import NgramRows
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.model.transformer import Model

VOCAB = 1024
ORDERS = MixerConfig().orders
MODEL = ModelConfig(
    layers=1, width=32, heads=1, kv_heads=1, mlp_hidden=32, bigram_buckets=256, bigram_width=16,
    value_embedding_layers=1, value_embedding_width=16,
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    index: tuple[int, ...] = (1_000_000, 4_000_000)
    """Lengths of texts to count."""
    evaluation: tuple[int, ...] = (50_000, 100_000)
    """Lengths of texts to score."""
    orders_tokens: int = 50_000
    """Length of the text to mix with more and more orders."""


def text(path: Path, tokens: int, seed: int = 0) -> TokenStream:
    """Zipf-like tokens, each drawn from those that go with the token before it, and one part in eight a repetition of
    up to 64 earlier tokens; written in pieces, as a shard."""
    generator, piece = np.random.default_rng(seed), 1 << 18
    paths, shift = [], generator.integers(0, VOCAB, VOCAB)
    for number, start in enumerate(range(0, tokens, piece)):
        size = min(piece, tokens - start)
        drawn = generator.zipf(1.2, size) % VOCAB
        drawn[1::2] = (drawn[1::2] % 32 + shift[drawn[: size - size % 2 : 2]][: size // 2]) % VOCAB
        for _ in range(size // 512):
            length = int(generator.integers(8, 65))
            if size > 2 * length:
                at = int(generator.integers(length, size - length))
                source = int(generator.integers(0, at - length + 1))
                drawn[at : at + length] = drawn[source : source + length]
        paths.append(path / f"text{number}.bin")
        write_shard(paths[-1], drawn)
    return TokenStream(paths)


def index_curve(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Counting texts of these lengths, orders 1 to 6 and all match lengths: tokens, seconds, anonymous_bytes,
    disk_bytes, pairs of each order."""
    return [_apart("index", tokens) for tokens in lengths]


def evaluation_curve(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Scoring and mixing texts of these lengths with an untrained model of one narrow layer, no test-time training:
    tokens, seconds, anonymous_bytes, and the seconds of each phase."""
    return [_apart("evaluation", tokens) for tokens in lengths]


def order_curve(tokens: int) -> list[dict[str, Any]]:
    """Seconds of the mixture, and of its n-gram rows alone, with the orders 1 .. n for n from 1 to 6."""
    return [_apart("orders", tokens, n) for n in range(1, 1 + len(ORDERS))]


def markdown(
    index: Sequence[int] = (1_000_000, 4_000_000, 16_000_000),
    evaluation: Sequence[int] = (50_000, 100_000, 200_000),
    orders_tokens: int = 50_000,
) -> str:
    """The three curves as one table, a point a line; memory is anonymous, beyond what the process had."""
    out = ["| work | tokens | seconds | microseconds a token | anonymous MB |", "|---|---|---|---|---|"]
    points = [("n-gram index", point) for point in index_curve(index)]
    points += [("evaluation, tiny model", point) for point in evaluation_curve(evaluation)]
    points += [(f"mixing, orders 1 to {n}", point) for n, point in enumerate(order_curve(orders_tokens), start=1)]
    for name, point in points:
        seconds, tokens = point.get("seconds", point.get("mixing_seconds")), point["tokens"]
        memory = f"{point['anonymous_bytes'] / 1e6:,.0f}" if "anonymous_bytes" in point else ""
        out.append(f"| {name} | {tokens:,} | {seconds:.2f} | {1e6 * seconds / tokens:.1f} | {memory} |")
    return "\n".join(out)


def _apart(work: str, tokens: int, *more: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", work, str(tokens), *map(str, more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Watch(threading.Thread):
    """The most anonymous memory of this process while the block runs, and its seconds."""

    def __enter__(self) -> Watch:
        self.before = self.most = anonymous_bytes()
        self.done, self.began = threading.Event(), time.monotonic()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.monotonic() - self.began
        self.most = max(self.most, anonymous_bytes())
        self.done.set()
        self.join()

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, anonymous_bytes())

    def told(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "anonymous_bytes": self.most - self.before}


def anonymous_bytes() -> int:
    """Of this process, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(work: str, tokens: int, *more: int) -> dict[str, Any]:
    """One point, in this process."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        stream = text(folder, tokens)
        if work == "index":
            return {"tokens": tokens, **_index(stream, folder / "index", MixerConfig())}
        if work == "evaluation":
            return {"tokens": tokens, **_evaluation(stream, folder / "index")}
        return {"tokens": tokens, **_orders(stream, folder / "index", ORDERS[: more[0]])}


def _index(stream: TokenStream, folder: Path, mixer: MixerConfig) -> dict[str, Any]:
    with Watch() as watch:
        ngram_index.build(stream, mixer.orders, VOCAB, mixer.match_lengths, folder)
    pairs = {str(n): len(table.token_P) for n, table in ngram_index.load(folder).tables.items()}
    return {**watch.told(), "disk_bytes": sum(path.stat().st_size for path in folder.iterdir()), "pairs": pairs}


def _evaluation(stream: TokenStream, folder: Path) -> dict[str, Any]:
    config = EvaluateConfig(
        window_tokens=128, segment_tokens=2048, overlap_tokens=128, chunk_tokens=16_384, dtype="float32",
        ttt=TTTConfig(enabled=False),
    )  # fmt: skip
    ngram_index.build(stream, config.mixer.orders, VOCAB, config.mixer.match_lengths, folder)
    ones = bpb.ByteTables(np.ones(VOCAB, np.int16), *np.zeros((4, VOCAB), bool))
    model = Model(MODEL, VOCAB, 128)
    with Watch() as watch:
        work = Evaluation(model, Text(stream, torch.device("cpu")), ones, ngram_index.load(folder), config)
        for number, chunk in enumerate(work.chunks):
            work.run_chunk(number, chunk)
    return {**watch.told(), **{f"{name}_seconds": value for name, value in work.seconds.items()}}


def _orders(stream: TokenStream, folder: Path, orders: tuple[int, ...]) -> dict[str, Any]:
    config = replace(MixerConfig(), orders=orders, match_lengths=())
    ngram_index.build(stream, orders, VOCAB, (), folder)
    index = ngram_index.load(folder)
    ngrams, rows_seconds = NgramRows(index, MixerConfig().discount), 0.0
    for start in range(0, len(stream), 512):
        stop, began = min(start + 512, len(stream)), time.monotonic()
        ngrams.rows(start, stop)
        ngrams.advance(stop)
        rows_seconds += time.monotonic() - began
    mixer, rows_BV = BatchMixer(config, VOCAB, index), torch.zeros(512, VOCAB)
    with Watch() as watch:
        for start in range(1, len(stream), 512):
            stop = min(start + 512, len(stream))
            mixer.score({"neural": rows_BV[: stop - start]}, start, stop)
    return {"orders": list(orders), **watch.told(), "rows_seconds": rows_seconds}


def main(options: Options) -> None:
    for name, points in (
        ("index", lambda: index_curve(options.index)),
        ("evaluation", lambda: evaluation_curve(options.evaluation)),
        ("orders", lambda: order_curve(options.orders_tokens)),
    ):
        for point in points():
            print(json.dumps({"curve": name, **point}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main(tyro.cli(Options, description=__doc__))
