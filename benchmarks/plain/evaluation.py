"""Sliding-window scoring, plain: each window runs whole and makes logits at all of its positions.

The contexts are those of `hedgemix.evaluate.scoring_order`'s sliding order on a text in one chunk, so the bits are
equal to rounding. A plain mixture for one token at a time is `hedgemix.mixers.online_mixer`; a plain one for blocks,
the published rule's, is `hedgemix.mixers.published`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hedgemix.model.transformer import Model


@torch.inference_mode()
def sliding_nats(model: Model, tokens_N: Tensor, window: int, stride: int, batch_windows: int = 32) -> Tensor:
    """Nats of the targets 1 .. N - 1, float64 (N - 1,), of int64 tokens on the model's device.

    The first window scores all of its targets, later ones the last `stride`; the last window ends with the text.
    """
    size, targets = min(window, len(tokens_N) - 1), tokens_N[1:]
    nats_N = torch.empty(len(targets), dtype=torch.float64, device=tokens_N.device)
    windows = [(0, 0)]  # first token, and its first target that is not scored yet, both counted in inputs
    for scored in range(size, len(targets), stride):
        windows.append((min(scored + stride, len(targets)) - size, scored))
    for first in range(0, len(windows), batch_windows):
        batch = windows[first : first + batch_windows]
        inputs_BT = torch.stack([tokens_N[begin : begin + size] for begin, _ in batch])
        targets_BT = torch.stack([targets[begin : begin + size] for begin, _ in batch])
        log_rows_BTV = model.logits(model.features(inputs_BT)).log_softmax(-1)
        nats_BT = -log_rows_BTV.gather(2, targets_BT[..., None])[..., 0].double()
        for nats_T, (begin, scored) in zip(nats_BT, batch, strict=True):
            nats_N[scored : begin + size] = nats_T[scored - begin :]
    return nats_N
