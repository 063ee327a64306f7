"""Text encoded by Ray tasks on all nodes of a cluster: the tokens, and the order, of one machine.

A task is a pure function of its documents, so Ray does it again wherever it was lost, up to LOST_PARTS times. What it
raises itself would be raised again, and ends the making.

A process that encodes imports this module, one a CPU: none of it imports torch, which takes 1.8 CPU seconds and 180 MB.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import ray
from ray.exceptions import RayError
from sentencepiece import SentencePieceProcessor

from hedgemix.data import bpb, text_set, tokenizer

MOST_IN_FLIGHT = 64
"""Batches of two million characters, which lie in the object store of the driver's node with their tokens: 3.3 MB each
of English prose."""
LEAST_IN_FLIGHT = 4


class EncodeError(RayError):
    """Tells that a part of the text could not be encoded, and why."""


@lru_cache(1)
def loaded(model: bytes) -> tuple[SentencePieceProcessor, bpb.ByteTables]:
    """Load a SentencePiece model and its tables, once in a process."""
    processor = tokenizer.load(model)
    return processor, bpb.byte_tables(processor)


def encode(model: bytes, documents: list[str]) -> np.ndarray:
    """Encode a batch of documents, as `text_set.encode_part`."""
    return text_set.encode_part(*loaded(model), documents)


def encode_by_tasks(model: bytes, batches: Iterator[list[str]]) -> Iterator[np.ndarray]:
    """Encode batches as a `text_set.EncodeParts`, by Ray tasks of one CPU each, spread over the nodes; no more are
    waited for at once than twice the cluster's CPUs. Raises EncodeError."""
    from pipeline.execution.failures import LOST_PARTS  # the driver's alone: it imports torch

    task = ray.remote(num_cpus=1, max_retries=LOST_PARTS, scheduling_strategy="SPREAD")(encode)
    shared = ray.put(model)
    waiting: deque[ray.ObjectRef[np.ndarray]] = deque()
    try:
        for batch in batches:
            waiting.append(task.remote(shared, batch))
            while len(waiting) >= most_in_flight():
                yield finished(waiting.popleft())
        while waiting:
            yield finished(waiting.popleft())
    finally:
        for reference in waiting:
            with contextlib.suppress(RayError):
                ray.cancel(reference)


def most_in_flight() -> int:
    """Count the batches that may be under way in the cluster as it is now."""
    return min(max(LEAST_IN_FLIGHT, 2 * int(ray.cluster_resources().get("CPU", 0))), MOST_IN_FLIGHT)


def finished(reference: ray.ObjectRef[np.ndarray]) -> np.ndarray:
    """Wait for a task's tokens. Raises EncodeError, with the cause in one line."""
    try:
        return ray.get(reference)
    except RayError as error:
        from pipeline.execution.failures import explain

        raise EncodeError(f"a part of the text could not be encoded: {explain(error)}") from None


def once_started(start: Callable[[], None]) -> text_set.EncodeParts:
    """Return `encode_by_tasks` on a Ray that `start` starts when the first batch comes: what is wrong with the text
    shows before."""

    def encode_parts(model: bytes, batches: Iterator[list[str]]) -> Iterator[np.ndarray]:
        start()
        yield from encode_by_tasks(model, batches)

    return encode_parts
