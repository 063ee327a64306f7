"""Rows that are committed before their tokens are told: the one-token predictor in a process that has the artifact and
nothing else, and learns the text over a pipe.

For each target it writes its row, log probabilities (V,) float32, little-endian, and only then reads the token, uint16.
Where not the whole text is asked for, what lies between two stretches is told when the first of them was paid; the
evaluation of these tokens, which are earlier ones then, brings the predictor to where the next stretch begins.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Self

import numpy as np
import torch

from hedgemix.artifact import format as artifact
from hedgemix.artifact.format import Artifact
from hedgemix.codec.predictor import Predictor
from hedgemix.config import EvaluateConfig, from_dict
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.runtime.files import Log


class Pipe:
    """Commits rows and hears tokens, each side by a file descriptor, which are closed with it: who listens hears the
    end of one that failed."""

    def __init__(self, rows_to: int, tokens_from: int) -> None:
        self.rows_to, self.tokens_from = os.fdopen(rows_to, "wb"), os.fdopen(tokens_from, "rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.rows_to.close()
        self.tokens_from.close()

    def commit(self, log_row_V: np.ndarray) -> None:
        """Write a row."""
        self.rows_to.write(np.ascontiguousarray(log_row_V, "<f4").data)
        self.rows_to.flush()

    def hear(self, count: int) -> np.ndarray:
        """Read tokens (count,), uint16; raises EOFError when no more are told."""
        data = self.tokens_from.read(2 * count)
        if len(data) < 2 * count:
            raise EOFError("the audit ended before the text")
        return np.frombuffer(data, "<u2")


def commit(
    artifact_path: str,
    config: dict[str, Any],
    n_tokens: int,
    stretches: list[list[int]],
    device: str,
    pipe: list[int],
    log: Log,
) -> None:
    """Commit the rows of the targets start .. stop - 1 of every stretch, which begins and ends where a piece does.

    n_tokens: of the whole text, which schedules depend on."""
    torch.set_num_threads(1)
    found, settings = artifact.read(artifact_path), from_dict(EvaluateConfig, config)
    with Pipe(*pipe) as line:
        told_N, past = line.hear(1), Past(found, settings, n_tokens, torch.device(device))
        for start, stop in stretches:
            told_N = np.concatenate([told_N, line.hear(start - len(told_N))])
            work = past.until(told_N) if start > 1 else None
            predictor = Predictor(found, n_tokens, int(told_N[0]), settings, work)
            heard_B = np.empty(stop - start, np.uint16)
            for at in range(stop - start):
                line.commit(predictor.log_row())
                heard_B[at] = token = int(line.hear(1)[0])
                predictor.update(token)
            told_N = np.concatenate([told_N, heard_B])


class Past:
    """Evaluates the text told so far, each chunk of it once."""

    def __init__(self, found: Artifact, config: EvaluateConfig, n_tokens: int, device: torch.device) -> None:
        self.found, self.config, self.n_tokens, self.device = found, config, n_tokens, device
        self.state: dict[str, Any] | None = None
        """Behind the last whole chunk."""

    def until(self, told_N: np.ndarray) -> Evaluation:
        """Return the evaluation that has scored and learned the tokens told, (start,), and no more."""
        work = Evaluation.begin(self.found, told_N, self.config, self.device, schedule_tokens=self.n_tokens)
        if self.state is not None:
            work.load_state_dict(copy.deepcopy(self.state))
        for number, chunk in enumerate(work.chunks[work.finished :], work.finished):
            whole = chunk.stop % self.config.chunk_tokens == 0
            work.run_chunk(number, chunk)
            if whole and work.adapter and number + 1 == len(work.chunks):  # to the evaluation it is the text's end
                work.adapter.learn(work.tokens_N, work.weights_N, chunk)
            if whole:
                self.state = copy.deepcopy(work.state_dict())
        return work
