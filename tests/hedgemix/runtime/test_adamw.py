"""AdamW against torch's, and what it is for: no compiler is imported."""

from __future__ import annotations

import sys
from inspect import unwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hedgemix.runtime.adamw import AdamW


def moved(kind: Any) -> list[Tensor]:
    """Two groups of parameters after three steps, and three more from a saved state."""
    source = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=source)) for shape in ((3, 5), (7,), ())]

    def made() -> Any:
        groups = [{"params": parameters[:2], "base_rate": 0.1}, {"params": parameters[2:], "lr": 0.3}]
        return kind(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.01, fused=True)

    optimizer = made()
    for step in range(6):
        if step == 3:
            state, optimizer = optimizer.state_dict(), made()
            optimizer.load_state_dict(state)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=source)
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
    assert all(parameter.requires_grad for parameter in parameters) and optimizer.param_groups[0]["base_rate"] == 0.1
    return [*(parameter.detach() for parameter in parameters), *optimizer.state[parameters[0]].values()]


def test_it_moves_as_torchs_without_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = moved(torch.optim.AdamW)
    for name in ("add_param_group", "state_dict", "load_state_dict"):  # torch keeps what it imported the compiler for
        monkeypatch.delattr(unwrap(getattr(torch.optim.AdamW, name)), "__dynamo_disable", raising=False)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    with pytest.raises(ImportError):
        torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(moved(AdamW), expected, strict=True))
