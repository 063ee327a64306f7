"""The one-token step against the evaluation of the whole text: the same bits, for every token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from hedgemix.artifact import format as artifact
from hedgemix.codec import predictor as codec_predictor
from hedgemix.codec.predictor import Predictor
from hedgemix.config import CacheConfig, EvaluateConfig, MixerConfig, RecipeError
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.experts.registry import EXPERTS
from hedgemix.mixers.network import entropy_buckets
from support import tiny_artifact
from support.text_data import processor
from support.tiny_artifact import ADAPTIVE, CACHE_OVER_TRAINED, CONFIG, Case

FROZEN = replace(CONFIG, ttt=replace(CONFIG.ttt, enabled=False))


def mixed(config: EvaluateConfig = CONFIG, **changes: Any) -> EvaluateConfig:
    return replace(config, mixer=replace(config.mixer, **changes))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_artifact.make(tmp_path_factory.mktemp("predictor"))


def evaluated(work: Evaluation, tokens: int) -> torch.Tensor:
    """Nats of the first targets under the score's mixture, as the evaluation adds them."""
    nats: list[torch.Tensor] = []
    score = work.mixer.score

    def watched(*arguments: Any) -> Any:
        scores = score(*arguments)
        nats.append(scores.nll[work.best][work.mixer.kind])
        return scores

    work.mixer.score = watched  # type: ignore[method-assign]
    for number, chunk in enumerate(work.chunks):
        if chunk.start < tokens:
            work.run_chunk(number, chunk)
    return torch.cat(nats)[: tokens - 1]


def predicted(case: Case, config: EvaluateConfig, tokens: int) -> tuple[torch.Tensor, float]:
    """The same from single steps, and the largest distance of a row's sum from 1."""
    predictor = Predictor(artifact.read(case.artifact), len(case.tokens), int(case.tokens[0]), config)
    nats, worst = [], 0.0
    for token in case.tokens[1:tokens].tolist():
        row = predictor.predict()
        assert row.dtype == np.float64 and row.min() >= 0
        worst = max(worst, abs(row.sum() - 1))
        nats.append(-np.log(row[token]))
        predictor.update(token)
    return torch.tensor(nats), worst


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (CONFIG, 400),
        (replace(CONFIG, order="sliding", chunk_tokens=160), 240),
        (replace(CONFIG, segment_tokens=50, overlap_tokens=7, chunk_tokens=160), 260),
        (replace(CONFIG, chunk_tokens=110), 260),
        (replace(FROZEN, order="sliding", stride_tokens=32), 200),
        (mixed(FROZEN, kind="none"), 150),
        (mixed(FROZEN, kind="hedge", hedge_share=0.0), 150),
        (mixed(FROZEN, kind="logistic"), 150),
        (mixed(FROZEN, orders=(2, 4), gates=("entropy", "both"), memory_tokens=(100.0, 700.0)), 200),
        (mixed(FROZEN, match_lengths=()), 150),
        (mixed(replace(CONFIG, chunk_tokens=160), experts=tuple(EXPERTS)), 240),
        (ADAPTIVE, 400),
        (replace(ADAPTIVE, order="sliding", chunk_tokens=110), 350),
        (mixed(replace(ADAPTIVE, segment_tokens=50, cache=CacheConfig(enabled=False)), kind="hedge"), 200),
        (replace(CACHE_OVER_TRAINED, chunk_tokens=160), 350),
    ],
    ids=[
        "default",
        "sliding",
        "odd segments",
        "short chunks",
        "wide stride",
        "none",
        "hedge",
        "logistic",
        "orders",
        "no match",
        "further experts",
        "experts over features",
        "experts over features, sliding, short chunks",
        "head, odd segments",
        "cache over trained weights",
    ],
)
def test_every_token_costs_what_the_evaluation_says(case: Case, config: EvaluateConfig, tokens: int) -> None:
    """Behind a learned chunk, where one is learned from, and more tokens than a cache remembers, where there is one."""
    expected = evaluated(case.begin(config), tokens)
    nats, worst = predicted(case, config, tokens)
    torch.testing.assert_close(nats, expected, rtol=2e-5, atol=2e-5)
    assert worst < 1e-12


@pytest.mark.parametrize("config", [ADAPTIVE, replace(CONFIG, order="sliding", chunk_tokens=110)])
def test_and_by_a_model_within_documents_too(tmp_path: Path, config: EvaluateConfig) -> None:
    """Across the beginning of a document, which is near the text's here."""
    made = tiny_artifact.make(tmp_path, config=tiny_artifact.WITHIN_DOCUMENTS)
    begin = int(np.flatnonzero(made.tokens == processor().bos_id())[1]) - 70
    case = replace(made, tokens=made.tokens[begin:])
    expected = evaluated(case.begin(config), 140)
    nats, _ = predicted(case, config, 140)
    torch.testing.assert_close(nats, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_at_the_edge_of_a_bucket_the_neural_row_is_the_evaluations_to_the_bit(
    case: Case, order: Literal["streaming", "sliding"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a learned chunk too, so that both choose one weight set; here every position counts as one at an edge."""
    config = replace(CONFIG, order=order, chunk_tokens=110)
    work, expected = case.begin(config), list[torch.Tensor]()
    score = work.mixer.score

    def watched(rows: dict[str, torch.Tensor], *arguments: Any) -> Any:
        expected.append(rows[work.best].clone())
        return score(rows, *arguments)

    work.mixer.score = watched  # type: ignore[method-assign]
    for number, chunk in enumerate(work.chunks[:2]):
        work.run_chunk(number, chunk)
    monkeypatch.setattr(codec_predictor, "EDGE", 1.0)
    one = Predictor(artifact.read(case.artifact), len(case.tokens), int(case.tokens[0]), config)
    expected_BV = torch.cat(expected)
    for row_V, token in zip(expected_BV, case.tokens[1:].tolist(), strict=False):
        neural_V, _ = one._neural_row()
        assert torch.equal(neural_V, row_V)
        assert entropy_buckets(config.mixer, neural_V) == entropy_buckets(config.mixer, row_V[None, None])
        one.row_V = one.mixer.predict(neural_V)
        one.update(token)
    assert len(expected_BV) > config.chunk_tokens


def test_two_predictors_agree_bitwise_and_predicting_changes_nothing(case: Case) -> None:
    found, config = artifact.read(case.artifact), replace(CONFIG, chunk_tokens=160)
    one, other = (Predictor(found, len(case.tokens), int(case.tokens[0]), config) for _ in range(2))
    for token in case.tokens[1:240].tolist():
        row = one.predict()
        assert np.array_equal(row, other.predict()) and np.array_equal(row, other.predict())
        one.update(token)
        other.update(token)


def test_settings_that_do_not_fit_the_artifact_are_refused(case: Case) -> None:
    found = artifact.read(case.artifact)
    for config, named in (
        (replace(CONFIG, window_tokens=1000), "window_tokens"),
        (replace(CONFIG, mixer=MixerConfig(orders=(2, 1))), "orders"),
        (replace(CONFIG, ttt=replace(CONFIG.ttt, epochs=0)), "epochs"),
        (replace(CONFIG, cache=CacheConfig(floor=0.0)), "floor"),
    ):
        with pytest.raises(RecipeError, match=named):
            Predictor(found, 10, 1, config)
