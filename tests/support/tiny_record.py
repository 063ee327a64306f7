"""A record small enough for a test, run as a user runs it: the command in a process of its own; or, where no test is
about that process or the start of Ray, in the tests' own process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from support import text_data

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "pipeline" / "record.py"), "laptop"]
OPTIONS = """
--data.source text --data.vocab-size 512 --data.valid-fraction 0.1 --data.max-valid-tokens 4000
--data.memory-bytes 20000
--model.layers 2 --model.width 64 --model.heads 2 --model.kv-heads 2 --model.mlp-hidden 128
--model.bigram-buckets 256 --model.bigram-width 32 --model.value-embedding-width 32
--model.input-mix --model.residual-scale
--train.steps 12 --train.batch-tokens 512 --train.sequence-tokens 64 --train.microbatch-sequences 8
--train.calibration-sequences 8 --train.warmup-steps 1 --train.log-every-steps 2
--evaluate.window-tokens 64 --evaluate.overlap-tokens 64 --evaluate.segment-tokens 512 --evaluate.chunk-tokens 1024
--evaluate.ttt.sequence-tokens 64 --compute.workers 1 --compute.cpus-per-worker 1 --compute.max-restarts 0 --no-report
"""
TINY = OPTIONS.split()
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "secret/of+the+environment",
    "HF_TOKEN": "hf_secretofthehub",
    "WANDB_API_KEY": "0123456789secretofthetracker",
}
"""In the environment of the undisturbed record, and nowhere else after it."""


def text_file(folder: Path) -> Path:
    """Real text: 300 docstrings, one JSON line each."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in text_data.documents()))
    return path


def arguments(text: Path, out: Path, *options: str) -> list[str]:
    return [*TINY, "--data.paths", str(text), "--out", str(out), *options]


def start(options: list[str], cwd: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in a process group of its own, its output as one text; `environment` is added to this process's."""
    return subprocess.Popen(
        [*COMMAND, *options],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def run(options: list[str], cwd: Path, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output."""
    process = start(options, cwd, environment)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def run_here(options: list[str]) -> tuple[int, str]:
    """Exit code and output of the command in this process, on the Ray of fixture `ray_session`: its workers have
    imported torch for the record before."""
    from pipeline import record

    told = io.StringIO()
    started = patch.object(record, "ray_started", lambda console: contextlib.nullcontext())
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), started:
        return record.main(["laptop", *options]), told.getvalue()
