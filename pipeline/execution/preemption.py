"""Ray's notice that this process's machine is about to be taken away."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import ray

POLL_SECONDS = 1.0


class Notice:
    """Asks Ray on a thread, while it is entered, whether this node is being drained; call it to hear. Clouds give a
    spot machine between 30 s and two minutes. Asking Ray Train itself is a collective of all ranks, too slow for every
    step."""

    def __init__(self) -> None:
        self.node = ray.get_runtime_context().get_node_id()
        self.came = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="notice", daemon=True)

    def watch(self) -> None:
        """Ask every POLL_SECONDS, until a notice came or the block ends."""
        while not self.came and not self.ended.wait(POLL_SECONDS):
            with contextlib.suppress(Exception):  # Ray is busy, or going away: then there is no notice to give
                self.came = self.node in (ray._private.state.state.get_draining_nodes() or {})

    def __enter__(self) -> Notice:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.ended.set()
        self.thread.join()

    def __call__(self) -> bool:
        return self.came
