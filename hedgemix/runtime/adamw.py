"""torch's AdamW for use outside of compiled code, where it needs no compiler."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """Does what torch.optim.AdamW does, to the bit, without its first use importing torch._dynamo: two seconds of every
    process that trains or adapts. What is unwrapped here only keeps a compiler from tracing into an optimizer."""

    add_param_group: Any = unwrap(torch.optim.AdamW.add_param_group)
    state_dict: Any = unwrap(torch.optim.AdamW.state_dict)
    load_state_dict: Any = unwrap(torch.optim.AdamW.load_state_dict)
    step: Any = torch.no_grad()(unwrap(torch.optim.AdamW.step))
