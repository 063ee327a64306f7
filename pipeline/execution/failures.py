"""The retry policy: what is tried again, by whom, how often and after how long. All that retries asks here.

Within one command, with `compute.max_restarts` of the recipe:

- The driver starts a step again that ended in `Retry` or `Repair`: each step of each seed, and the counts, max_restarts
  times (over all records that share it), after 1 s, then 2 s, 4 s, ... (`Restarts`). A `Repair` first sets aside the
  finished step that storage damaged, which is then done again too.
- Ray Train starts a seed's workers again at once: max_restarts times after losses, and as often after machines were
  taken with a notice (`ray_train_restarts`). It tries again whatever a worker raises, so a worker returns `MISTAKES`
  instead. When it gives up, that is a `Fail`; when its controller is lost, a `Retry` of the driver's.
- A lost rank ends its gang, which raises ConnectionError: a `Retry` of the evaluation, from its last checkpoint.
- Ray tries nothing of this again by itself (`RAY_RETRIES`), so that one place counts. Only the progress board comes
  back as often as it is lost: no work is lost with it. `max_calls` of GPU tasks is no retry: their processes end.
- Before all that, where a cluster encodes text: a part that was lost with its process or machine is done again by Ray,
  `LOST_PARTS` times each, since nothing is to be counted. One lost more often ends the command.
- Below, object stores are asked again by their clients (object_store.py) and copies of checkpoints are made again
  (uploader.py); what storage raises in the end is an OSError, a `Retry`.

A `Fail`, or one loss more, fails the seed: its row has the reason. The same command tries as often again.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass

from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from hedgemix.config import ComputeConfig
from hedgemix.train.step_log import DivergedError
from pipeline.steps.step import DamagedStepError

RAY_RETRIES = 0
"""Of tasks (max_retries) and of ranks (max_restarts)."""
LOST_PARTS = 5
"""Times Ray does a part of the text again (max_retries)."""
FIRST_REST_SECONDS = 1.0
"""Before the first restart by the driver; doubled with each. Storage that fails now may not in a moment."""
MISTAKES = (DivergedError, ValueError)
"""What the same training would raise again: a RecipeError is a ValueError too."""
ERRORS_OF_THE_OTHERS = ("Connection closed", "Connection reset", "NCCL", "gloo", "HealthCheck")
"""What ranks say that only noticed another one fail."""

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Ray's frames have them, also in a file."""
TOOL_ERROR = re.compile(r"\b(?:fatal |last )?error:(?: |$)", re.IGNORECASE)
"""How compilers and NCCL begin the line that tells what went wrong, somewhere in what they print."""
RAISED = re.compile(r"[\w.]*(?:Error|Exception): \S")
"""How a traceback ends."""
FRAME = "ray::"
"""How one begins that Ray passes on as text."""


@dataclass(frozen=True)
class Retry:
    """Says that a process, a machine or storage failed, not the work: the same may succeed."""


@dataclass(frozen=True)
class Repair:
    """Says that a file of a finished step is damaged: that step has to be done again first."""

    damaged: DamagedStepError


@dataclass(frozen=True)
class Fail:
    """Says that the work failed, and would again."""


def classify(error: BaseException) -> Retry | Repair | Fail:
    """Say what is to be done about what a task raised. A process that was lost may be one that the task waited for: a
    rank, or Ray Train's controller."""
    found = cause(error)
    if isinstance(found, DamagedStepError):
        return Repair(found)
    if isinstance(found, (RayTaskError, TaskCancelledError)):
        return Fail()
    return Retry() if isinstance(found, (OSError, RayError)) else Fail()


class Restarts:
    """Keeps count of how often the driver started each step again, at most `most` times, and when it may; steps are
    told by their names."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.counts: Counter[str] = Counter()
        self.due: dict[str, float] = {}

    def grant(self, step: str) -> bool:
        """Count a restart of the step, which may begin after a rest; False when it has had them all."""
        if self.counts[step] >= self.most:
            return False
        self.due[step] = time.monotonic() + FIRST_REST_SECONDS * 2 ** self.counts[step]
        self.counts[step] += 1
        return True

    def rested(self, step: str) -> bool:
        """Say whether the rest after the step's last loss is over."""
        return time.monotonic() >= self.due.get(step, 0.0)


def ray_train_restarts(compute: ComputeConfig) -> dict[str, int]:
    """Return the arguments of Ray Train's FailureConfig."""
    return {"max_failures": compute.max_restarts, "max_preemption_failures": compute.max_restarts}


def cause(error: BaseException) -> BaseException:
    """Unwrap what a task raised from Ray's frames."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def explain(error: BaseException) -> str:
    """Tell the cause in one line: what a person can act on, without Ray's frames."""
    found = cause(error)
    failures = getattr(found, "worker_failures", None)
    if failures:
        ranks = sorted(failures, key=lambda rank: (blames_another(failures[rank]), rank))
        return f"worker {ranks[0]}: {explain(failures[ranks[0]])}"
    name, text = type(found).__name__, blamed(str(found)) or "no message"
    return text if text.startswith(name) or name == "RuntimeError" else f"{name}: {text}"


def blamed(message: str) -> str:
    """Find the line of a message that has the cause: its first, with what a line that only announces it (torch's
    compiler: "backend='inductor' raised:") announces, and with the line that a C++ compiler or NCCL calls the error. Of
    tracebacks that Ray passes on it is the end of the last."""
    lines = [text for line in message.splitlines() if (text := COLOURS.sub("", line).strip())]
    if any(line.startswith(FRAME) for line in lines):
        ends = [line for line in lines if RAISED.match(line)]
        lines = [*(line for line in lines[:1] if not line.startswith(FRAME)), *ends[-1:]] or lines
    said = [" ".join(lines[i : i + 2]) if line.endswith(":") else line for i, line in enumerate(lines)]
    errors = [text for line, text in zip(lines, said, strict=True) if TOOL_ERROR.search(line)]
    if errors and errors[0] not in said[0]:
        return f"{said[0]}: {errors[0]}"
    return said[0] if said else ""


def blames_another(error: BaseException) -> bool:
    """Say whether a rank only noticed another one fail."""
    return any(sign in f"{type(error).__name__} {error}" for sign in ERRORS_OF_THE_OTHERS)
