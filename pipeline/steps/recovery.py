"""A step that was not finished, or whose files storage damaged: who may write them, and what a start goes on from.

Where the runs folder is an object store, what a restart needs is copied there as it is written, and brought from there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatch

from hedgemix.runtime import clock
from hedgemix.runtime.clock import Clock
from hedgemix.runtime.files import OnFileWritten, write_json
from hedgemix.runtime.layout import CLOCK, LOG, RESULT, TRACE
from pipeline.steps.step import ASIDE, Step, exclusive_lock, refuse_links
from pipeline.storage.uploader import Uploader

RESUMED = ("checkpoint*", CLOCK, LOG, TRACE)
"""Files of a step that a later attempt goes on from."""
BEAT_SECONDS = 1.0


def forget(step: Step) -> None:
    """Remove the checkpoints of a step that no start may take up again."""
    for path in step.folder.glob("checkpoint*"):
        path.unlink(missing_ok=True)
    if step.storage.remote:
        step.storage.prune(step.folder, "checkpoint*", ())


def set_aside(step: Step, judged: bytes | None = None) -> None:
    """Make a finished step whose files are damaged one to do: it goes on from its last checkpoint, if it has one.
    judged: the result.json that does not stand; another record may have made the step again meanwhile.

    The time it took was used for work that was finished; redoing what storage lost is not charged again.
    """
    storage, told = step.storage, step.folder / CLOCK
    found = storage.read_bytes(step.folder / RESULT)
    if found is None or judged not in (None, found):
        return
    storage.write_bytes(step.folder / ASIDE, found)
    storage.pull(told)
    write_json(told, {**clock.read(told), "elapsed_seconds": 0.0})
    storage.push(told)
    storage.remove(step.folder / RESULT)


@contextmanager
def resuming(step: Step) -> Iterator[OnFileWritten]:
    """Hold the step as the only process that writes its files, with what an earlier attempt left; yields what keeps
    copies of files that a restart needs. A process of an attempt that is thought dead may live on for a moment: wait
    for it."""
    step.storage.ready()
    step.folder.mkdir(parents=True, exist_ok=True)
    refuse_links(step.folder)
    with exclusive_lock(step.folder / "writer.lock"):
        if step.storage.remote:
            bring(step)
        with closing(Uploader(step.storage)) as kept:
            yield kept


def bring(step: Step) -> None:
    """Take up what the store holds of an unfinished step, unless this machine is further."""
    told = step.folder / CLOCK
    here, before = clock.read(told), told.read_bytes() if told.is_file() else None
    step.storage.pull(told)
    if before is not None and here["elapsed_seconds"] >= clock.read(told)["elapsed_seconds"]:
        told.write_bytes(before)
        return
    for name in step.storage.names(step.folder):
        if any(fnmatch(name, pattern) for pattern in RESUMED):
            step.storage.pull(step.folder / name)


@contextmanager
def clocked(step: Step) -> Iterator[None]:
    """Hold a step without checkpoints as `resuming` does, its seconds noted as they go: a lost attempt loses all of
    them."""
    with resuming(step) as kept:
        clock = Clock(step.folder / CLOCK, None, kept=kept)
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_SECONDS):
                clock.beat()

        thread = threading.Thread(target=beat, name="clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
