"""What failed, and whether it is worth another try."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError, TaskCancelledError

ERRORS_OF_THE_OTHERS = ("Connection closed", "Connection reset", "NCCL", "gloo", "HealthCheck")
"""What ranks say that only noticed another one fail."""


def cause(error: BaseException) -> BaseException:
    """What a task raised, without Ray's frames."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def lost(error: Exception) -> bool:
    """Whether a process, a machine or storage failed, not the work: worth another try. The process may be one that a
    task waited for: a rank, or Ray Train's controller."""
    found = cause(error)
    return isinstance(found, (OSError, RayError)) and not isinstance(found, (RayTaskError, TaskCancelledError))


def explain(error: BaseException) -> str:
    """The cause in one line: what a person can act on, without Ray's frames."""
    found = cause(error)
    failures = getattr(found, "worker_failures", None)
    if failures:
        ranks = sorted(failures, key=lambda rank: (blames_another(failures[rank]), rank))
        return f"worker {ranks[0]}: {explain(failures[ranks[0]])}"
    name = type(found).__name__
    text = next((line.strip() for line in str(found).splitlines() if line.strip()), "no message")
    return text if text.startswith(name) or name == "RuntimeError" else f"{name}: {text}"


def blames_another(error: BaseException) -> bool:
    return any(sign in f"{type(error).__name__} {error}" for sign in ERRORS_OF_THE_OTHERS)
