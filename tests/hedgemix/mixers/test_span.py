"""What is kept of a span's positions: the rows, and what is gathered from them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from hedgemix.config import MixerConfig
from hedgemix.mixers import span
from hedgemix.mixers.network import Blend, classes, gather
from hedgemix.mixers.span import Memory

VOCAB, SETS = 40, 2
CONFIG = MixerConfig(orders=(1, 2, 3), match_lengths=(3, 4), block_tokens=32)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, linear_gates=())], ids=["default", "no linear mixer"])
def test_scores_are_the_rows_at_the_tokens(config: MixerConfig) -> None:
    blend = Blend(config, SETS, VOCAB, "cpu")
    memory, random = Memory.allocate(blend, 100, SETS, VOCAB, torch.device("cpu")), torch.manual_seed(0)
    memory.text_3B[0] = torch.randint(VOCAB, (100,), generator=random)
    memory.text_3B[1] = torch.randint(classes(config), (100,), generator=random)
    memory.neural_BRV.normal_(generator=random)
    memory.p_BKV.normal_(generator=random).copy_(memory.p_BKV.softmax(-1))
    blocks = [slice(0, 32), slice(32, 64), slice(64, 90)]
    other = copy.deepcopy((blend, memory))
    span.score(blend, memory, blocks)
    rows, log_p = span.rows(*other, blocks)
    assert torch.equal(memory.log_p.joined_BRC[:90], log_p.joined_BRC)
    assert all(map(torch.equal, blend.state_dict().values(), other[0].state_dict().values()))
    for rows_BRKV, log_p_BRK in zip(rows, (log_p.experts_BRK, log_p.linear_BRC, log_p.logistic_BRM), strict=True):
        assert rows_BRKV.shape == (*log_p_BRK.shape, VOCAB)
        torch.testing.assert_close(gather(rows_BRKV, memory.text_3B[0, :90]), log_p_BRK, rtol=1e-6, atol=1e-6)
