"""One start of an evaluation, and what it leaves for the next."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hedgemix.artifact import format as artifact
from hedgemix.config import EvaluateConfig
from hedgemix.data.shards import TokenStream
from hedgemix.runtime import collectives

if TYPE_CHECKING:
    from hedgemix.evaluate.evaluator import Evaluation


class Start:
    """Is one start of an evaluation, on every rank; this one is the only one."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.began = now()
        self.trace: Path | None = None

    def elapsed(self) -> float:
        """Measure the seconds that the evaluation has used."""
        return self.now() - self.began

    def take_up(
        self,
        found: artifact.Artifact,
        stream: TokenStream,
        config: EvaluateConfig,
        trace: Path | None,
        device: torch.device,
    ) -> dict[str, Any] | None:
        """Give what `Evaluation.load_state_dict` goes on from, on every rank; the trace then has its chunks' lines."""
        self.trace = trace
        return None

    def beat(self) -> None:
        """Called many times in a chunk."""

    def after_chunk(self, work: Evaluation, line: dict[str, Any]) -> None:
        """Add the chunk's line to the trace."""
        if self.trace is not None and collectives.rank() == 0:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            with open(self.trace, "a" if line["chunk"] else "w", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Called at the end, however it came."""
