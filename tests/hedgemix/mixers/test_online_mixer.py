"""The mixer of one token at a time against that of the whole text, under every kind of mixture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hedgemix.config import MixerConfig
from hedgemix.experts import ngram_index
from hedgemix.experts.match_online import OnlineMatch
from hedgemix.experts.ngram_online import OnlineNgram
from hedgemix.experts.registry import EXPERTS
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.mixers.online_mixer import OnlineMixer

VOCAB = 40
TEXT = (np.random.default_rng(0).zipf(1.4, 200) % VOCAB).astype(np.uint16)
MEMORY = np.roll(TEXT, 100).repeat(2)
CONFIG = MixerConfig(orders=(1, 2, 3), match_lengths=(3, 4), block_tokens=32)


@pytest.mark.parametrize(
    "changes",
    [
        *({"kind": kind} for kind in ("none", "hedge", "linear", "logistic", "ensemble")),
        {"match_lengths": ()},
        {"linear_gates": (), "experts": tuple(EXPERTS)},
    ],
)
@pytest.mark.parametrize("memory_tokens", [0, 1, 400])
def test_every_row_is_the_batchs(changes: dict[str, Any], memory_tokens: int) -> None:
    config, memory_M = replace(CONFIG, **changes), MEMORY[:memory_tokens]
    index = ngram_index.build(TEXT, config.orders, VOCAB, config.match_lengths, memory_M=memory_M)
    neural = torch.randn(len(TEXT), VOCAB, generator=torch.manual_seed(0)).mul_(2).log_softmax(-1)
    batch, online = BatchMixer(config, VOCAB, index), OnlineMixer(config, VOCAB, TEXT[:1], memory_M=memory_M)
    told = OnlineMixer(config, VOCAB, TEXT[:1])  # the slow, obvious way: experts that read the memory first
    told.ngram, told.match = (
        OnlineNgram(config.orders, VOCAB, config.discount),
        OnlineMatch(config.match_lengths, VOCAB),
    )
    for token in [*memory_M.tolist(), int(TEXT[0])]:
        told.ngram.update(token)
        told.match.update(token)
    expected_BV = batch.rows({"neural": neural[1:]}, 1, len(TEXT))["neural"][batch.kind]
    for t, token in enumerate(TEXT[1:].tolist(), 1):
        row_V = online.predict(neural[t])
        assert np.array_equal(row_V, told.predict(neural[t]))
        if t % 4 == 0:  # also where a block ends
            assert np.array_equal(row_V, online.predict(neural[t]))
        torch.testing.assert_close(torch.from_numpy(row_V), expected_BV[t - 1], rtol=2e-5, atol=2e-5)
        for each in (online, told):
            each.update(token, ends_block=(t + 1) % config.block_tokens == 0)
