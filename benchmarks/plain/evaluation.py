"""Sliding windows as one writes them first: a loop over batches of windows, the logits of every position."""

from __future__ import annotations

import torch
from torch import Tensor

from hedgemix.model import Model


@torch.inference_mode()
def sliding_nats(model: Model, tokens_N: Tensor, window: int, stride: int, batch_windows: int) -> Tensor:
    """Nats (N - 1,), float32, of every token but the first; the first `window` targets are one window."""
    last = len(tokens_N) - 1
    nats = [window_nats(model, tokens_N[None, : min(window, last)], tokens_N[None, 1 : min(window, last) + 1])[0]]
    starts = range(window, last, stride)  # targets starts + 1 .. starts + stride
    for first in range(0, len(starts), batch_windows):
        stops = [min(start + stride, last) for start in starts[first : first + batch_windows]]
        inputs = torch.stack([tokens_N[stop - window : stop] for stop in stops])
        targets = torch.stack([tokens_N[stop - window + 1 : stop + 1] for stop in stops])
        for row, start, stop in zip(window_nats(model, inputs, targets), starts[first:], stops, strict=False):
            nats.append(row[start - stop :])
    return torch.cat(nats)


def window_nats(model: Model, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    logits_BTV = model.logits(model.features(tokens_BT))
    return torch.nn.functional.cross_entropy(logits_BTV.mT, targets_BT, reduction="none")
