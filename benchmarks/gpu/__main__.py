"""hedgemix on one GPU in two calls of a few minutes, each figure beside what was predicted.

    python -m benchmarks.gpu first  --text FILE... --shards FOLDER --out OUT     # 320 s: does it run, how fast, why
    python -m benchmarks.gpu record --text FILE... --shards FOLDER --out OUT     # 400 s: a small record, end to end
    python -m benchmarks.gpu table OUT/results.jsonl [--update-docs]             # of one or more runs' lines

FILE: text (.txt, .md, .jsonl, .parquet, also .zst or .gz), tokenized in the background; a share of its documents is
held out. FOLDER: shards in FineWeb's format, with the .model that made them. OUT gets at most six small files:
results.jsonl, table.txt, profile.txt from `first`; log.jsonl, trace.jsonl, artifact.hmx from `record`. All else goes
into --work, where `record` finds what `first` tokenized and compiled; without it, it does both itself.

Needs torch 2.11 or 2.13, numpy, sentencepiece, pyarrow (to read text) and zstandard, on Python 3.11 or newer: neither
Ray nor tyro, no network, nothing installed; run it from the repository's root. `--device cpu --tiny` runs every section
in seconds; its figures mean nothing. Exits with 1 when a section did not end, or a difference is larger than is right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
"""Importing torch counts."""
SECONDS = {"first": 320.0, "record": 400.0}
"""Seconds of each call."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = parser.add_subparsers(dest="call", required=True)
    for call, seconds in SECONDS.items():
        add = verbs.add_parser(call).add_argument
        add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="files of text")
        add(
            "--shards",
            type=Path,
            required=True,
            metavar="FOLDER",
            help="folder of *_train_*.bin, *_val_*.bin, one .model",
        )
        add("--tokenizer", type=Path, help="the .model, if not the only one in the folder")
        add("--out", type=Path, required=True, help="folder of the results; lines are added to results.jsonl")
        add(
            "--work",
            type=Path,
            default=Path(tempfile.gettempdir()) / "hedgemix-gpu",
            help="folder kept from call to call",
        )
        add("--device", choices=("cuda", "cpu"), default="cuda")
        add("--tiny", action="store_true", help="sizes of seconds, for the test")
        add("--seconds", type=float, default=seconds, help=f"of the whole call ({seconds:.0f})")
        add("--only", nargs="+", metavar="SECTION", default=[], help="these sections, in their usual order")
        add("--skip", nargs="+", metavar="SECTION", default=[])
        add("--train-seconds", type=float, default=0.0, help="budget of `record`'s training (215)")
    found = verbs.add_parser("table")
    found.add_argument("results", type=Path, nargs="*")
    found.add_argument("--update-docs", action="store_true", help="write it into docs/gpu.md")
    return parser.parse_args(argv)


def main(options: argparse.Namespace) -> bool:
    """Run a call; returns whether every section ended and no difference was too large."""
    if options.call == "table":
        return show(options.results, options.update_docs)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    # Read when torch is imported; `record` then finds what `first` compiled.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(work / "triton"))
    # Asked for by deterministic kernels; read at the first product of a process, and what a Hopper card has anyway.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from benchmarks.gpu import predictions, text
    from benchmarks.gpu.calls import CALLS
    from benchmarks.gpu.sections import Job, Results, run
    from benchmarks.gpu.sizes import sizes
    from hedgemix.config import RecipeError
    from hedgemix.data import tokenizer

    named = {section.name for section in CALLS[options.call]}
    if unknown := [name for name in (*options.only, *options.skip) if name not in named]:
        sys.exit(f"error: {options.call} has no section {unknown[0]!r}; it has {', '.join(sorted(named))}")
    try:
        model = options.tokenizer or text.find_model(options.shards)
        found = sizes(options.device, options.tiny, tokenizer.load(model).vocab_size())
        given = text.find(options.text, options.shards, model, found.valid_fraction, work)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    out = options.out.resolve()
    results = Results(out / "results.jsonl", options.call, card(options.device))
    seconds = options.train_seconds or found.train_seconds
    given.start()
    wanted = [
        section
        for section in CALLS[options.call]
        if section.name not in options.skip and (section.name in options.only or not options.only)
    ]
    stretch = 5.0 if options.tiny else 1.0  # a CPU has other work too
    job = Job(torch.device(options.device), found, given, work, out, results, seconds)
    sound = run(wanted, job, stretch * options.seconds - (time.monotonic() - BEGAN), stretch)
    lines = results.lines()
    over = [line for line in lines if predictions.wrong(line)]
    shown = predictions.table(lines, [options.call])
    with open(out / "table.txt", "a") as file:
        file.write(shown + "\n\n")
    print(shown, flush=True)
    for line in over:
        print(f"error: {line['section']}: {line['name']} is {line['value']:.3g}, at most {line['most']:g} is right")
    return sound and not over


def card(device: str) -> str:
    """The GPU's name; asked of the driver's tool, since nothing here may touch the device before the sections do."""
    if device == "cpu":
        return "no GPU"
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip().partition("\n")[0]
    except OSError:
        return "unknown"


def show(paths: list[Path], update_docs: bool) -> bool:
    """The table of what runs left; into docs/gpu.md, if wanted."""
    from benchmarks.gpu import predictions
    from benchmarks.gpu.calls import documented

    lines: list[dict[str, Any]] = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    print(predictions.table(lines))
    if update_docs:
        from benchmarks.suite.report import update

        update(Path(__file__).resolve().parents[2] / "docs" / "gpu.md", "gpu", documented(lines))
    return True


if __name__ == "__main__":
    sys.exit(0 if main(arguments()) else 1)
