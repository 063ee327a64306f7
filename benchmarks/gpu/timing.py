"""Milliseconds by the device's own clock, and where a profile says they go."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "element-wise": r"^triton_(?!tem|mm|bmm)",  # Inductor names its kernels after all that they came from
    "attention": r"flash|fmha|sdpa|attention|attn",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|matmul|::(add|b|badd)*mm$|triton_(tem|mm|bmm)",
    "copies": r"^[Mm]em(cpy|set)|::copy_$",
}
"""What a kernel's name says of it, the first that fits; the rest is element-wise too."""
LAUNCHES = re.compile(r"cu(da)?Launch(Cooperative)?Kernel|cudaGraphLaunch")
WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize")


class Stopwatch:
    """Marks between pieces of work, on the device's queue; no mark waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next; waits for the device."""
        if not self.cuda:
            return [1000 * (after - before) for before, after in zip(self.marks, self.marks[1:], strict=False)]
        self.marks[-1].synchronize()
        return [before.elapsed_time(after) for before, after in zip(self.marks, self.marks[1:], strict=False)]


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 1) -> float:
    """Median of a call's, after `warmup` that are not counted."""
    for _ in range(warmup):
        work()
    watch = Stopwatch(device)
    for _ in range(repeats):
        work()
        watch.mark()
    return median(watch.milliseconds())


class Profile:
    """What one call did: milliseconds by kind of kernel, and what the host asked for."""

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        cuda = device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])) as profiler:
            work()
            if cuda:
                torch.cuda.synchronize(device)
        self.cuda, self.averages = cuda, profiler.key_averages()
        self.calls = Counter[str]()
        for each in self.averages:
            self.calls[each.key] += each.count

    def kernels(self) -> Iterable[tuple[str, float]]:
        """Name and milliseconds of each kind of kernel; on a CPU, of each kind of operation."""
        for each in self.averages:
            if each.is_user_annotation or (self.cuda and each.device_type != DeviceType.CUDA):
                continue
            yield each.key, (each.self_device_time_total if self.cuda else each.self_cpu_time_total) / 1000

    def kinds(self) -> dict[str, float]:
        found = dict.fromkeys(KINDS, 0.0)
        for name, spent in self.kernels():
            found[next((kind for kind, of in KINDS.items() if re.search(of, name)), "element-wise")] += spent
        return found

    def count(self, what: re.Pattern[str]) -> int:
        """Calls of the runtime whose name begins so; none on a CPU."""
        return sum(count for name, count in self.calls.items() if what.match(name))

    def text(self, rows: int = 60) -> str:
        order = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        return self.averages.table(sort_by=order, row_limit=rows, max_name_column_width=80)
