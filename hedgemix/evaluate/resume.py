"""An evaluation that goes on where it was stopped: from its newest sound checkpoint, with the seconds it had used.

In one folder: `checkpoint-<chunks>.pt` and `checkpoint.json` (see `checkpoint`), `clock.json` (see `clock`). What goes
on gives the bits that an undisturbed evaluation gives, on a CPU and with as many ranks; another number of ranks is
allowed, and adds up gradients in another order. A checkpoint of another artifact, text or configuration is not taken
up, nor one whose chunks the trace no longer has: the evaluation then begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hedgemix import __version__
from hedgemix.artifact.format import Artifact
from hedgemix.config import EvaluateConfig, config_hash
from hedgemix.data.shards import PIECE_TOKENS, TokenStream
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.start import Start
from hedgemix.evaluate.trace_file import Lines
from hedgemix.runtime import collectives
from hedgemix.runtime.checkpoint import Checkpoints
from hedgemix.runtime.clock import Clock, Due, no_notice
from hedgemix.runtime.files import DamagedFileError, OnFileWritten, no_copy
from hedgemix.runtime.layout import CLOCK


class Restart(Start):
    """Is one start of an evaluation in `folder`, on every rank; rank 0 writes."""

    def __init__(
        self,
        folder: Path,
        checkpoint_seconds: float = 60.0,
        *,
        notice: Callable[[], bool] = no_notice,
        kept: OnFileWritten = no_copy,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """checkpoint_seconds: the most that a kill costs, but for the chunk it falls into. notice: whether the machine
        is about to be taken away; rank 0 asks after each chunk, and leaves one checkpoint more when it hears so. kept:
        told of every file that another start needs; the trace may have grown by the time it is copied.
        """
        super().__init__(now)
        self.folder, self.checkpoint_seconds, self.notice, self.kept = folder, checkpoint_seconds, notice, kept
        self.checkpoints = Checkpoints(folder, kept=kept)
        self.clock: Clock | None = None
        self.due: Due | None = None
        self.lines: Lines | None = None
        self.owner: dict[str, Any] = {}

    def elapsed(self) -> float:
        """Measure the seconds used, over all starts."""
        return self.clock.elapsed() if self.clock else super().elapsed()

    def take_up(
        self,
        found: Artifact,
        stream: TokenStream,
        config: EvaluateConfig,
        trace: Path | None,
        device: torch.device,
    ) -> dict[str, Any] | None:
        """Load the state that rank 0 finds, read by each rank for itself. Raises DamagedFileError on every rank when
        one cannot read what rank 0 can."""
        self.owner = {
            "version": __version__,
            "artifact": found.sha256,
            "config": config_hash(config),
            "tokens": len(stream),
            "text": digest(stream),
        }
        state = None
        if collectives.rank() == 0:
            self.lines = Lines(trace) if trace is not None else None
            state = self.load()
        (told,) = collectives.broadcast(torch.tensor([chunks_of(state)], device=device)).tolist()
        if collectives.rank() != 0:
            with contextlib.suppress(OSError, DamagedFileError):
                state = self.checkpoints.load(agree=lambda _: [told])
        lacking = int(chunks_of(state) != told)
        if int(collectives.sum_over(torch.tensor([lacking], device=device))):
            raise DamagedFileError(
                f"rank {collectives.rank()} of the evaluation in {self.folder} "
                + (
                    f"cannot read the checkpoint of {told} chunks"
                    if lacking
                    else "waits for one that cannot read a file"
                )
                + "; give all ranks the same storage, or remove that folder to begin anew"
            )
        saved_seconds = state["elapsed_seconds"] if state else None
        self.clock = Clock(self.folder / CLOCK, saved_seconds, self.now, self.kept, self.began)
        self.due = Due(self.clock, self.checkpoint_seconds, self.notice)
        return state["evaluation"] if state else None

    def load(self) -> dict[str, Any] | None:
        """Load the newest sound checkpoint if it is this evaluation's and the trace has its chunks; else there are
        none."""
        state = self.checkpoints.load()
        mine = state is not None and state.get("owner") == self.owner
        if mine and (self.lines is None or self.lines.take_up(chunks_of(state))):
            return state
        self.checkpoints.clear()  # or they would pass for this evaluation's, by their numbers
        return None

    def beat(self) -> None:
        """Note the clock, once a second at most."""
        if self.clock:
            self.clock.beat()

    def after_chunk(self, work: Evaluation, line: dict[str, Any]) -> None:
        """Add the line, and leave a checkpoint when one is due. What storage refuses is no reason to stop before the
        end, when the trace has to be whole: raises OSError then."""
        if collectives.rank() != 0:
            return
        if self.lines is not None:
            self.lines.add(line)
            if work.finished == len(work.chunks):
                self.lines.flush()
        if self.due and self.due():
            with contextlib.suppress(OSError):
                self.save(work)

    def save(self, work: Evaluation) -> None:
        """Write trace, then checkpoint: a checkpoint promises that its chunks are there. Raises OSError when they
        cannot be."""
        if self.lines is not None:
            self.lines.flush(sync=True)
            self.kept(self.lines.path)
        state = {"owner": self.owner, "elapsed_seconds": self.elapsed(), "evaluation": work.state_dict()}
        self.checkpoints.save(work.finished, state)

    def close(self) -> None:
        """Wait for the checkpoint that is being written. They stay: the result is not on disk yet."""
        self.checkpoints.close()
        if self.clock:
            with contextlib.suppress(OSError):
                self.clock.note()


def chunks_of(state: dict[str, Any] | None) -> int:
    """Count the chunks that a checkpoint has behind it, -1 for none."""
    return -1 if state is None else state["evaluation"]["finished"]


def digest(stream: TokenStream) -> str:
    """Hash a text's tokens with SHA-256, as little-endian 16-bit numbers, in hex."""
    found = hashlib.sha256()
    for at in range(0, len(stream), PIECE_TOKENS):
        found.update(stream.read(at, min(PIECE_TOKENS, len(stream) - at)).astype("<u2").tobytes())
    return found.hexdigest()
