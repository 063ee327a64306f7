"""log.jsonl, a line a training step, and the end of a training whose loss is no longer a number."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hedgemix.runtime import collectives
from hedgemix.runtime.files import Log

ADVICE = "lower train.matrix_rate, train.embedding_rate or train.vector_rate, or set train.gradient_clip"


class DivergedError(RuntimeError):
    """Says that the loss, or a weight, became NaN or infinite."""


class StepLog:
    """Writes one line a step to log.jsonl; losses stay on the device until `flush`, the loop's only wait for it."""

    def __init__(self, path: Path, step: int, seed: int, log: Log) -> None:
        """Take up the lines of the steps up to `step`; every rank calls this. log: takes the newest line at a flush."""
        self.path, self.seed, self.log = path, seed, log
        self.waiting: list[tuple[dict[str, Any], Tensor]] = []
        self.unwritten: list[dict[str, Any]] = []
        kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.lines = [record for line in kept if (record := parse(line)) and record["step"] <= step]
        self.previous_seconds = self.lines[-1]["elapsed_seconds"] if self.lines else 0.0
        collectives.barrier()  # every rank has read it before rank 0 writes it anew
        if collectives.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in self.lines), encoding="utf-8")

    def add(
        self, loss: Tensor, *, step: int, tokens: int, elapsed_seconds: float, fraction: float, matrix_rate: float
    ) -> None:
        """Take a step's line. loss: this rank's part of the mean loss in nats, a 0-d tensor. step, tokens: done after
        it. fraction: share of the run that was over before it."""
        record = {
            "step": step,
            "tokens": tokens,
            "elapsed_seconds": round(elapsed_seconds, 4),
            "fraction": fraction,
            "matrix_rate": matrix_rate,
        }
        self.waiting.append((record, loss))

    def flush(self, elapsed_seconds: float) -> None:
        """Write the waiting lines; raises DivergedError if a loss among them is not finite."""
        if not self.waiting:
            return
        losses = collectives.sum_over(torch.stack([loss for _, loss in self.waiting])).tolist()
        tokens = self.waiting[-1][0]["tokens"] - (self.lines[-1]["tokens"] if self.lines else 0)
        speed = tokens / max(1e-9, elapsed_seconds - self.previous_seconds)
        self.previous_seconds = elapsed_seconds
        records = []
        for (record, _), loss in zip(self.waiting, losses, strict=True):
            records.append({**record, "loss_nats": loss, "tokens_per_second": round(speed, 1)})
        self.waiting = []
        self.lines += records
        if collectives.rank() == 0:
            self.write(records)
            self.log(records[-1])
        for record in records:
            if not math.isfinite(record["loss_nats"]):
                raise DivergedError(
                    f"seed {self.seed}: the loss is {record['loss_nats']} at step {record['step']}; {ADVICE}"
                )

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append lines; those that storage refuses now wait for the next time: a full disk ends the run only if it
        stays full."""
        self.unwritten += records
        with contextlib.suppress(OSError):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in self.unwritten))
            self.unwritten = []

    def last_tenth(self) -> float:
        """Average the loss of the last tenth of the steps, in nats a token."""
        losses = [record["loss_nats"] for record in self.lines]
        tail = losses[-max(1, len(losses) // 10) :]
        return sum(tail) / len(tail)


def parse(line: str) -> dict[str, Any] | None:
    """Read a log line; None for one that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
