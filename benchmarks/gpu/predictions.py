"""What was predicted for one H100 before any GPU ran this, beside what is measured.

Computed from shapes, bytes and counts of operations at the rates of pipeline/forecast/gpu_plan.py, never measured; of
the card alone it is what others measured. The reference's own figures are of its 8 H100.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.forecast.gpu_plan import Rates


@dataclass(frozen=True)
class Prediction:
    """Between these, or this text; and what the reference had."""

    low: float = 0.0
    high: float = 0.0
    said: str = ""
    unit: str = ""
    reference: str = ""

    def __str__(self) -> str:
        if self.said:
            return self.said
        numbers = " to ".join(dict.fromkeys(number(value) for value in (self.low, self.high)))
        return f"{numbers} {self.unit}".strip()


US = 1e6
RATES = Rates()
FIRST: dict[str, dict[str, Prediction]] = {
    "environment": {
        "attention": Prediction(said="cudnn_attention"),
        "attention with a mask": Prediction(said="cudnn_attention"),
        "copy": Prediction(3.0, 3.0, unit="TB/s"),
        "product, bfloat16": Prediction(790, 800, unit="TFLOP/s"),
    },
    "smoke": {
        "2 steps and calibration": Prediction(5, 15, unit="s"),
        "peak memory of 2 steps and calibration": Prediction(15, 17, unit="GiB"),
        "quantization": Prediction(3, 25, unit="s"),
    },
    "agreement": {
        "rows, device against CPU": Prediction(0, 1e-5, unit="nats"),
        "mixture, device against CPU": Prediction(0, 1e-5, unit="nats"),
        "GPTQ codes that differ": Prediction(0, 1e-3, unit="of all"),
    },
    "training": {
        "first step, compiling": Prediction(40, 70, unit="s"),
        "ms a step": Prediction(100, 120, unit="ms", reference="97 ms for as many tokens a GPU"),
        "share of 989 TFLOP/s": Prediction(22, 26, unit="%", reference="27 %"),
        "peak memory of compiled steps": Prediction(32, 32, unit="GiB", reference="26.2 GB"),
        "profile: attention": Prediction(24, 27, unit="ms"),
        "profile: matrix products": Prediction(34, 34, unit="ms"),
        "profile: element-wise": Prediction(45, 46, unit="ms"),
        "eager, ms a step": Prediction(200, 300, unit="ms"),
        "first step, compiling, bfloat16 stream": Prediction(30, 70, unit="s"),
        "ms a step, bfloat16 stream": Prediction(92, 112, unit="ms"),
    },
    "kernels": {
        "attention, cudnn_attention": Prediction(2.2, 2.5, unit="ms"),
        "attention, flash_attention": Prediction(3.3, 3.7, unit="ms"),
        "attention, strict mode": Prediction(3.3, 6.0, unit="ms"),
        "banded attention, window": Prediction(said="half of the mask's"),
    },
    "scoring": {
        "streaming": Prediction(1e6, 1e6, unit="tokens/s"),
        "sliding": Prediction(15_000, 15_000, unit="tokens/s", reference="47,000 (62 M in 165 s on 8 GPUs)"),
    },
    "mixing": {
        "blocks of 512": Prediction(0.67, 0.67, unit="us a token"),
        "blocks of 512, eager": Prediction(1.7, 1.7, unit="us a token"),
        "graphs of blocks of 512": Prediction(said="kept"),
        "graph against eager, blocks of 512: difference": Prediction(0, 0),
        "us a launch, blocks of 512, eager": Prediction(
            RATES.launch_seconds * US, RATES.launch_seconds * US, unit="us"
        ),
        "us an operation of a span, blocks of 512": Prediction(2.2, 2.2, unit="us"),
        "device at work, blocks of 512": Prediction(40, 100, unit="%"),
        "blocks of 128": Prediction(1.6, 1.6, unit="us a token"),
        "blocks of 128, eager": Prediction(5.1, 5.1, unit="us a token"),
        "graphs of blocks of 128": Prediction(said="kept"),
        "graph against eager, blocks of 128: difference": Prediction(0, 0),
    },
    "adapting": {
        "step of test-time training": Prediction(200, 260, unit="ms"),
        "peak memory of test-time training": Prediction(15, 16, unit="GiB"),
        "2 strict steps, twice: difference": Prediction(0, 0),
        "evaluated twice, as recorded: difference": Prediction(0, 1e-4, unit="of the nats"),
        "evaluated twice, as audited: difference": Prediction(0, 1e-4, unit="of the nats"),
    },
}
RECORD: dict[str, dict[str, Prediction]] = {
    "train": {
        "before the clock": Prediction(20, 70, unit="s"),
        "steps": Prediction(850, 1000),
        "ms a step": Prediction(200, 240, unit="ms", reference="97 ms for half as many tokens a GPU"),
        "tokens": Prediction(170, 195, unit="M"),
        "calibration": Prediction(1, 4, unit="s", reference="1.9 s"),
    },
    "quantize": {
        "artifact": Prediction(0, 16_000_000, unit="bytes", reference="15,387,977 bytes of weights"),
        "quantization": Prediction(3, 25, unit="s"),
    },
    "evaluate": {
        "index": Prediction(5, 5, unit="s"),
        "scoring seconds": Prediction(8, 8, unit="s"),
        "ttt seconds": Prediction(5, 9, unit="s"),
        "mixing seconds": Prediction(4, 6, unit="s"),
    },
    "audit": {
        "refused": Prediction(said="nothing"),
        "audit against evaluation": Prediction(1e-6, 1e-4, unit="of the nats"),
        "largest distance of a row's sum from 1": Prediction(0, 1e-5),
    },
    "vary": {
        "final, blocks of 128": Prediction(said="0.004 bpb less than with 512"),
        "sliding": Prediction(said="streaming's within 0.005 bpb"),
    },
    "replay": {
        "loss of the first steps: difference": Prediction(1e-6, 1e-3, unit="nats"),
    },
}
PREDICTED = {"first": FIRST, "record": RECORD}
GPU_ONLY = (
    "peak memory of",
    "attention, cudnn",
    "attention, flash",
    "banded attention, window",
    "us a launch",
    "device at",
)
"""What names of figures that a CPU has not begin with."""


def number(value: float) -> str:
    """Four digits."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def wrong(line: dict[str, Any]) -> bool:
    """Whether a figure is over the most that is right; NaN is."""
    return line.get("most") is not None and not line["value"] <= line["most"]


def measured(line: dict[str, Any]) -> str:
    value = line["value"]
    text = value if isinstance(value, str) else f"{number(value)} {line['unit']}".strip()
    return text + (f" (TOO MUCH: at most {number(line['most'])})" if wrong(line) else "")


def table(lines: Iterable[dict[str, Any]], calls: Sequence[str] = tuple(PREDICTED)) -> str:
    """Markdown: of each call and section every figure that was predicted or measured, the latest of each."""
    latest = {(line["call"], line["section"], line.get("name", "")): line for line in lines}
    cards = sorted({line["card"] for line in latest.values()})
    out = [f"Measured on: {'; '.join(cards)}.", ""] if cards else []
    out += [row(*HEAD), row(*("---:" if head in HEAD[2:5] else "---" for head in HEAD))]
    for call in calls:
        told = [(section, name) for of, section, name in latest if of == call]
        for section in dict.fromkeys([*PREDICTED[call], *(section for section, _ in told)]):
            expected, where = PREDICTED[call].get(section, {}), f"{call}: {section}"
            found = [name for of, name in told if of == section and name]
            for name in dict.fromkeys([*expected, *found]):
                line, known = latest.get((call, section, name)), expected.get(name)
                value, note = (measured(line), line["note"]) if line else ("", "")
                out.append(row(where, name, value, str(known or ""), known.reference if known else "", note))
            if end := latest.get((call, section, "")):
                out.append(row(where, end["status"], f"{end['seconds']:.1f} s", "", "", end["error"]))
    return "\n".join(out)


HEAD = "section", "figure", "measured", "predicted for an H100", "the reference's", ""


def row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"
