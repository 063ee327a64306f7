"""The machine: what it is, and what it can do at best, measured. A stage's limit is what these rates would allow."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.timing import once

MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
COPY_FLOATS = {"cpu": 2**25, "cuda": 2**28}
"""Too many for any cache."""


@dataclass(frozen=True)
class Limits:
    """Rates of one device (all its cores), at best."""

    float32: float
    """Operations a second of a square matrix product; a multiplication and an addition are two."""
    bfloat16: float
    """The same; on a CPU what float32 does, since nothing here computes in bfloat16 there."""
    bandwidth: float
    """Bytes a second, read and written together, of an addition of large vectors."""

    def seconds(self, operations: float, n_bytes: float, dtype: str = "float32") -> float:
        """The least time for so many operations and bytes, if each hid behind the other."""
        return max(operations / getattr(self, dtype), n_bytes / self.bandwidth)


def measure(device: torch.device, quick: bool = False) -> Limits:
    """The best of several sizes and repetitions."""
    kind = device.type
    sizes = (64, 128) if quick else MATRIX_SIZES[kind]
    seconds = 0.0 if quick else 1.0
    single = matrix_rate(sizes, torch.float32, device, seconds)
    half = matrix_rate(sizes, torch.bfloat16, device, seconds) if kind == "cuda" else single
    floats = 2**16 if quick else COPY_FLOATS[kind]
    x, y = (torch.ones(floats, device=device) for _ in range(2))
    return Limits(single, half, 3 * x.nbytes / least(lambda: x.add_(y), seconds))


def matrix_rate(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    def rate(size: int) -> float:
        x = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(x)
        return 2 * size**3 / least(lambda: torch.mm(x, x, out=out), seconds)

    return max(rate(size) for size in sizes)


def least(work: Callable[[], Any], seconds: float, repeats: int = 5) -> float:
    """Of at least so many repetitions, for at least so long: a shared machine is slow for a while, then fast again."""
    began, found = time.monotonic(), [once(work)[0]]
    while len(found) <= repeats or time.monotonic() - began < seconds:
        found.append(once(work)[0])
    return min(found[1:])


def describe(device: torch.device) -> dict[str, Any]:
    """Names and numbers, for the table's head."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "cpu": field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int((field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "load": round(os.getloadavg()[0], 1),
        "gpu": gpu.name if gpu else "",
        "gpu_gib": round(gpu.total_memory / 2**30, 1) if gpu else 0.0,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def field(path: str, name: str) -> str:
    """The first value of that name in a file of `name: value` lines; '' where there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
