"""Processes of several ranks, forked from one server that has imported torch once: a spawned one takes seconds to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "hedgemix.stages", "pytest", "hypothesis"])


def run(work: Callable[..., None], arguments: tuple[Any, ...], ranks: int = 2) -> None:
    """Call work(rank, *arguments) in a process for each rank; raises what torch.multiprocessing.spawn does for a rank
    that raised or was killed. The server has no thread and no state of this process, so neither have they."""
    mp.start_processes(work, arguments, nprocs=ranks, start_method="forkserver")
