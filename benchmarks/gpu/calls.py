"""The two calls' sections: in which order, for how long at most, and what each proves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu import record, scoring, smoke, training
from benchmarks.gpu.predictions import table
from benchmarks.gpu.sections import Section

FIRST = (
    Section("environment", 40, smoke.environment,
            "which card, software and kernels the figures are of, and what the card does at best"),
    Section("smoke", 80, smoke.smoke,
            "every stage runs on CUDA at the record's size, and in how much memory"),
    Section("agreement", 40, smoke.agreement,
            "the device computes what a CPU does: rows, mixture, codes"),
    Section("training", 160, training.training,
            "milliseconds a step, the kernels and parts they go to, and what a bfloat16 residual stream brings"),
    Section("kernels", 40, training.kernels,
            "whether attention, products and Muon are near what the card can do, and what another kernel would bring"),
    Section("scoring", 50, scoring.scoring,
            "seconds of scoring 62 million tokens, streaming and by windows"),
    Section("mixing", 40, scoring.mixing,
            "seconds of the mixture, whether its graphs give the same bits and the device waits for the host"),
    Section("adapting", 50, scoring.adapting,
            "seconds of test-time training; what repeats to the bit"),
)  # fmt: skip
RECORD = (
    Section("train", 320, record.train,
            "a run on the clock keeps to its budget, and one real loss curve", least_seconds=60),
    Section("quantize", 60, record.quantize,
            "the artifact fits 16,000,000 bytes with its code, and what its weights scored before"),
    Section("evaluate", 120, record.evaluate,
            "bits per byte of every stage in one pass over held-out text, and its seconds", least_seconds=30),
    Section("audit", 60, record.audit,
            "the audit's closed process works with a GPU, and how near its bits come", least_seconds=20),
    Section("vary", 60, record.vary,
            "what shorter blocks and other test-time training bring; streaming against windows"),
    Section("replay", 60, record.replay,
            "how near a clocked run's first steps come when they are repeated", least_seconds=30),
)  # fmt: skip
CALLS: dict[str, Sequence[Section]] = {"first": FIRST, "record": RECORD}


def documented(lines: Sequence[dict[str, Any]]) -> str:
    """What docs/gpu.md says of the calls: their sections, and the table of figures with what these lines measured."""
    out = ["| call | section | at most | what it proves |", "|---|---|---:|---|"]
    for call, sections in CALLS.items():
        out += [f"| {call} | {each.name} | {each.limit_seconds:.0f} s | {each.proves} |" for each in sections]
    measured = "" if lines else "Not measured yet: no GPU run has been made. All of this is computed.\n\n"
    return "\n".join(out) + f"\n\n{measured}{table(lines)}"
