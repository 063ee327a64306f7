"""Every further expert gives distributions from what it was told, and one that does not is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from hedgemix.artifact import format as artifact
from hedgemix.codec.predictor import Predictor
from hedgemix.config import MixerConfig, RecipeError
from hedgemix.experts import ngram_index, registry
from hedgemix.experts.recency import Recency
from hedgemix.experts.registry import EXPERTS, Expert
from hedgemix.mixers.batch_mixer import BatchMixer
from support import tiny_artifact
from support.tiny_artifact import CONFIG, Case

VOCAB = 40
TEXT = (np.random.default_rng(0).zipf(1.4, 300) % (VOCAB // 2)).astype(np.uint16)
"""Half of the vocabulary is never seen."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_artifact.make(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("name", EXPERTS)
def test_rows_are_distributions_over_seen_and_unseen_tokens(name: str) -> None:
    expert = EXPERTS[name](VOCAB)
    for token in [*TEXT.tolist(), VOCAB - 1]:
        row_V = expert.row()
        assert row_V.shape == (VOCAB,) and row_V.dtype == torch.float32 and row_V.min() > 0
        assert float(row_V.double().sum()) == pytest.approx(1, abs=1e-6)
        expert.update(token)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_row_changes_with_what_is_told_and_with_nothing_else(name: str) -> None:
    expert = EXPERTS[name](VOCAB)
    registry.tell({name: expert}, TEXT.tolist())
    before, other = expert.row().clone(), copy.deepcopy(expert)
    other.update(VOCAB - 1)
    other.update(VOCAB - 1)
    assert not torch.equal(other.row(), before)
    assert torch.equal(expert.row(), before) and torch.equal(expert.row(), before)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_row_does_not_depend_on_whether_earlier_ones_were_asked(name: str) -> None:
    """A stopped evaluation goes on without them."""
    asked, told = EXPERTS[name](VOCAB), EXPERTS[name](VOCAB)
    for token in TEXT.tolist():
        asked.row()
        asked.update(token)
    registry.tell({name: told}, TEXT.tolist())
    assert torch.equal(asked.row(), told.row())


@pytest.mark.parametrize(("names", "told"), [(("recent",), "choose from recency"), (("recency",) * 2, "once")])
def test_names_that_cannot_be_are_refused(names: tuple[str, ...], told: str) -> None:
    index = ngram_index.build(TEXT, (1,), VOCAB)
    with pytest.raises(RecipeError, match=rf"evaluate\.mixer\.experts.*{told}"):
        BatchMixer(MixerConfig(orders=(1,), match_lengths=(), experts=names), VOCAB, index)


class Fixed:
    """An expert that always gives the row it was made with."""

    def __init__(self, row_V: torch.Tensor) -> None:
        self.row_V = row_V

    def row(self) -> torch.Tensor:
        return self.row_V

    def update(self, token: int) -> None:
        pass


def even(vocab_size: int, change: Callable[[torch.Tensor], None]) -> Expert:
    row_V = torch.full((vocab_size,), 1 / vocab_size)
    change(row_V)
    return Fixed(row_V)


@pytest.mark.parametrize(
    "change",
    [
        lambda row_V: row_V.mul_(1.01),
        lambda row_V: row_V[:2].copy_(torch.tensor([0, 2 / len(row_V)])),
        lambda row_V: row_V[0].fill_(torch.nan),
    ],
    ids=["sum", "zero", "nan"],
)
def test_a_row_that_is_no_distribution_ends_evaluation_and_coding(
    change: Callable[[torch.Tensor], None], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERTS, "wrong", lambda vocab_size: even(vocab_size, change))
    config = replace(CONFIG, mixer=replace(CONFIG.mixer, experts=("wrong",)))
    with pytest.raises(ValueError, match="'wrong' gave a row that is no distribution"):
        case.score(config)
    predictor = Predictor(artifact.read(case.artifact), len(case.tokens), int(case.tokens[0]), config)
    with pytest.raises(ValueError, match="'wrong' gave a row that is no distribution"):
        predictor.predict()


def test_an_expert_cannot_take_the_name_of_another_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERTS, "order1", Recency)
    index = ngram_index.build(TEXT, (1,), VOCAB)
    with pytest.raises(AssertionError, match="the name of another part"):
        BatchMixer(MixerConfig(orders=(1,), match_lengths=(), experts=("order1",)), VOCAB, index)
