"""The recency expert against its definition, and on a text that moves on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hedgemix.config import MixerConfig
from hedgemix.experts import ngram_index
from hedgemix.experts.recency import Recency
from hedgemix.mixers.batch_mixer import BatchMixer

VOCAB = 40
TEXT = (np.random.default_rng(0).zipf(1.4, 300) % (VOCAB // 2)).astype(np.uint16)


@pytest.mark.parametrize("memory", [7.0, 0.7])
def test_recency_is_its_definition(memory: float) -> None:
    """Also over more memories than counts are kept in one unit, or at all."""
    expert = Recency(VOCAB, memory_tokens=memory, prior_tokens=3.0, prior_followers=0.5)
    for t, token in enumerate(TEXT[:160].tolist()):
        count_V, recent_V, followers_V = np.ones(VOCAB), np.zeros(VOCAB), np.zeros(VOCAB)
        for at, told in enumerate(TEXT[:t].tolist()):
            faded = np.exp((at + 1 - t) / memory)
            count_V[told] += 1
            recent_V[told] += faded
            followers_V[told] += faded * (at > 0 and TEXT[at - 1] == TEXT[t - 1])
        recent_V = (recent_V + 3 * count_V / count_V.sum()) / (recent_V.sum() + 3)
        expected_V = (followers_V + 0.5 * recent_V) / (followers_V.sum() + 0.5)
        np.testing.assert_allclose(expert.row().numpy(), expected_V, rtol=1e-5)
        expert.update(token)


def test_recency_follows_a_text_that_moves_on() -> None:
    """Every hundred tokens four others are the frequent ones."""
    rng = np.random.default_rng(0)
    text = np.concatenate([rng.choice(VOCAB, 4, replace=False)[rng.integers(0, 4, 100)] for _ in range(10)])
    config = MixerConfig(orders=(1, 2), match_lengths=(), experts=("recency",))
    index = ngram_index.build(text.astype(np.uint16), config.orders, VOCAB)
    nll = (
        BatchMixer(config, VOCAB, index)
        .score({"neural": torch.zeros(len(text) - 1, VOCAB)}, 1, len(text))
        .nll["neural"]
    )
    assert nll["recency"].mean() < 0.95 * min(nll["order1"].mean(), nll["order2"].mean())
