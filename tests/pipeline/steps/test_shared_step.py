"""A step that two machines share by an object store."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.steps.recovery import clocked
from pipeline.steps.step import Made, Step, fetch, perform, save_outputs, work_and_publish
from pipeline.storage.lease import Times
from pipeline.storage.lock import hold
from pipeline.storage.store import open_storage
from support.s3_server import StoreServer, store_process, store_server

__all__ = ["store_process", "store_server"]


def making(of: Step, answer: int) -> Made:
    """Write one file."""
    with clocked(of):
        (of.folder / "answer.txt").write_text(str(answer))
        return save_outputs(of, {"answer": answer})


def test_two_machines_do_a_step_of_a_store_once(store_server: StoreServer, tmp_path: Path) -> None:
    machines = [Step("data", "x", open_storage(store_server.uri(), tmp_path / name)) for name in ("here", "there")]
    results: list[dict[str, Any]] = []
    done: list[int] = []

    def work(of: Step) -> Made:
        time.sleep(0.3)
        done.append(1)
        return making(of, len(done))

    threads = [
        threading.Thread(target=lambda of=of: results.append(perform(of, partial(work, of), {}))) for of in machines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"answer": 1}] * 2 and done == [1]


def test_who_was_taken_for_dead_returns_the_result_of_the_other(store_server: StoreServer, tmp_path: Path) -> None:
    here, there = (Step("data", "x", open_storage(store_server.uri(), tmp_path / name)) for name in ("here", "there"))
    lost: list[int] = []

    def stand_still() -> Made:
        made = making(here, 1)
        with hold(there.storage, there.folder / "step.lock", patient=True, times=Times(stale_seconds=0.0)) as other:
            work_and_publish(there, partial(making, there, 2), {}, other)
        return made

    assert perform(here, stand_still, {}, on_lost=lambda: lost.append(1)) == {"answer": 2}
    assert lost == [1] and fetch(here) and (here.folder / "answer.txt").read_text() == "2"
