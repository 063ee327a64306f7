"""A profile of a few steps, for people: where the time of training or evaluation goes.

`NAME.json.gz` is in the Chrome trace format (chrome://tracing, Perfetto), `NAME.txt` lists the operations that took
longest. Profiled steps compute what others do; they are slower, so a run on the clock makes fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

LISTED = 40
"""Operations in the table."""


@contextmanager
def tracing(
    folder: Path | None, name: str, device: torch.device, skipped: int = 3, recorded: int = 5
) -> Iterator[Callable[[], None]]:
    """Profile some steps; yields the function to call after every step. Nothing is written without a folder, or for too
    few steps: it takes `skipped`, one that warms the profiler up, and `recorded`."""
    if folder is None:
        yield lambda: None
        return
    cuda = device.type == "cuda"

    def write(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / f"{name}.json.gz"))
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=LISTED, max_name_column_width=60)
        (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")

    with profile(
        activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else []),
        schedule=schedule(wait=skipped, warmup=1, active=recorded, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield profiler.step
