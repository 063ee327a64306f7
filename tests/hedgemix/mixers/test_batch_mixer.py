"""The mixer of a whole text: valid on any row, blind to the future, the same however it is cut."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hedgemix.config import MixerConfig, RecipeError
from hedgemix.experts import ngram_index
from hedgemix.experts.registry import EXPERTS
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.mixers.network import Blend, classes, expert_names, gate_numbers, gate_sets, weight_sets

VOCAB = 40


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return (np.random.default_rng(0).zipf(1.4, 700) % VOCAB).astype(np.uint16)


def neural_rows(text: np.ndarray, seed: int = 0) -> Tensor:
    return torch.randn(len(text), VOCAB, generator=torch.manual_seed(seed)) * 2


CONFIG = MixerConfig(orders=(1, 2, 3), match_lengths=(3, 4), block_tokens=32)
FURTHER = replace(CONFIG, experts=tuple(EXPERTS))
BOTH = pytest.mark.parametrize("config", [CONFIG, FURTHER], ids=["default", "further experts"])


def index_of(text: np.ndarray, config: MixerConfig = CONFIG) -> ngram_index.NgramIndex:
    return ngram_index.build(text, config.orders, VOCAB, config.match_lengths)


def parts_of(value: Any) -> Any:
    """The tensors and numbers of nested objects, for a comparison."""
    if isinstance(value, (list, tuple)):
        return [parts_of(each) for each in value]
    if isinstance(value, dict):
        return {str(key): parts_of(each) for key, each in value.items() if key not in ("index", "device", "_sizes")}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value if isinstance(value, (Tensor, int, float)) else parts_of(vars(value))


def scored(text: np.ndarray, cuts: list[int], config: MixerConfig = CONFIG) -> dict[str, Tensor]:
    mixer = BatchMixer(config, VOCAB, index_of(text, config), names=("a", "b"))
    rows = {"a": neural_rows(text), "b": neural_rows(text, 1)}
    parts = []
    for start, stop in zip([1, *cuts], [*cuts, len(text)], strict=True):
        parts.append(mixer.score({name: rows[name][start:stop] for name in rows}, start, stop).nll)
    return {f"{name}.{kind}": torch.cat([part[name][kind] for part in parts]) for name in rows for kind in mixer.kinds}


@BOTH
def test_cuts_at_blocks_do_not_matter(text: np.ndarray, config: MixerConfig) -> None:
    whole, cut = scored(text, [], config), scored(text, [32, 64, 320, 640], config)
    for kind in whole:
        torch.testing.assert_close(cut[kind], whole[kind], rtol=1e-5, atol=1e-6, msg=kind)


def test_hedge_does_not_depend_on_cuts_at_all(text: np.ndarray) -> None:
    torch.testing.assert_close(scored(text, [7, 100])["a.hedge"], scored(text, [])["a.hedge"], rtol=1e-9, atol=1e-9)


def test_row_sets_are_scored_apart(text: np.ndarray) -> None:
    index = index_of(text)
    alone = BatchMixer(CONFIG, VOCAB, index, names=("b",)).score({"b": neural_rows(text, 1)[1:]}, 1, len(text)).nll["b"]
    both = scored(text, [])
    for kind, nll in alone.items():
        torch.testing.assert_close(both[f"b.{kind}"], nll, rtol=1e-5, atol=1e-6, msg=kind)


@BOTH
def test_scores_are_gathered_from_rows_that_sum_to_one(text: np.ndarray, config: MixerConfig) -> None:
    mixer = BatchMixer(config, VOCAB, index_of(text))
    neural = neural_rows(text)
    neural[5, 3:] = -1e30
    for start, stop in ((1, 320), (320, 700)):
        given = {"neural": neural[start:stop]}
        rows = mixer.rows(given, start, stop)["neural"]
        nll = mixer.score(given, start, stop).nll["neural"]
        token = torch.from_numpy(text[start:stop].astype(np.int64))
        for kind, row in rows.items():
            assert row.shape == (stop - start, VOCAB)
            assert row.double().logsumexp(1).abs().max() < 1e-5, kind
            gathered = -row.gather(1, token[:, None])[:, 0].double()
            torch.testing.assert_close(nll[kind], gathered, rtol=1e-5, atol=1e-5, msg=kind)


@pytest.mark.parametrize("resident", [False, True])
def test_looking_at_rows_moves_nothing(text: np.ndarray, resident: bool) -> None:
    """Not even memory that the next span overwrites: a graph would replay on it."""
    index, neural = index_of(text, FURTHER), neural_rows(text)
    seen, plain = (BatchMixer(FURTHER, VOCAB, index, resident=resident, span_tokens=64) for _ in range(2))
    for start, stop in ((1, 40), (40, 320), (320, 700)):
        given = {"neural": neural[start:stop]}
        parts = seen.sets[0].memory, seen._state.ngrams, *seen._state.further.values()
        before = copy.deepcopy(parts)
        rows = seen.rows(given, start, stop)["neural"]
        torch.testing.assert_close(parts_of(parts), parts_of(before), rtol=0, atol=0, equal_nan=True)
        assert all(torch.equal(row, rows[kind]) for kind, row in seen.rows(given, start, stop)["neural"].items())
        mine, theirs = (mixer.score(given, start, stop).nll["neural"] for mixer in (seen, plain))
        assert all(torch.equal(nll, theirs[kind]) for kind, nll in mine.items())
        torch.testing.assert_close(seen.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("resident", [False, True])
def test_given_experts_are_mixed_and_plain_row_sets_do_without(text: np.ndarray, resident: bool) -> None:
    """A plain row set has the bits of a mixer that is given nothing; the other one mixes what it is given, in order."""
    index, neural = index_of(text, FURTHER), neural_rows(text)
    given = ("mine", "yours")
    both = BatchMixer(FURTHER, VOCAB, index, names=("a", "b"), given=given, plain=("a",), resident=resident)
    alone, only = BatchMixer(FURTHER, VOCAB, index), BatchMixer(FURTHER, VOCAB, index, names=("b",), given=given)
    assert both.experts == only.experts == (*alone.experts, *given)
    knowing = torch.nn.functional.one_hot(torch.from_numpy(text.astype(np.int64)), VOCAB) * 0.5 + 0.5 / VOCAB
    said = {"mine": neural_rows(text, 1).softmax(1), "yours": knowing}
    for start, stop in ((1, 40), (40, 700)):
        here = {name: rows[start:stop] for name, rows in ({"a": neural, "b": neural} | said).items()}
        rows = both.rows(here, start, stop)
        assert torch.equal(rows["b"]["yours"], here["yours"].log())
        scores = both.score(here, start, stop).nll
        other = alone.score({"neural": here["a"]}, start, stop).nll["neural"]
        third = only.score({name: here[name] for name in ("b", *given)}, start, stop).nll["b"]
        for mine, theirs in ((scores["a"], other), (scores["b"], third)):
            assert mine.keys() == theirs.keys()
            for kind, nll in mine.items():
                torch.testing.assert_close(
                    nll, theirs[kind], rtol=1e-5 if resident else 0, atol=1e-5 if resident else 0
                )
    assert scores["b"]["ensemble"].sum() < 0.6 * scores["a"]["ensemble"].sum()  # yours knows the token
    with pytest.raises(ValueError, match="mine"):
        both.score({"a": neural[:1], "b": neural[:1]}, 700, 701)


@BOTH
@pytest.mark.parametrize("t", [1, 33, 350])
def test_the_target_and_the_future_change_no_row(text: np.ndarray, t: int, config: MixerConfig) -> None:
    changed = text.copy()
    changed[t:] = np.random.default_rng(1).integers(0, VOCAB, len(text) - t)
    neural = {"neural": neural_rows(text)[1:]}
    before, after = (
        BatchMixer(config, VOCAB, index_of(tokens)).rows(neural, 1, len(text))["neural"] for tokens in (text, changed)
    )
    for kind in before:
        assert torch.equal(before[kind][:t], after[kind][:t]), kind
    assert not torch.equal(before["ensemble"][t:], after["ensemble"][t:])


@pytest.mark.parametrize("kind", ["logistic", "ensemble"])
def test_mixers_beat_the_experts_they_mix(kind: str) -> None:
    """A text that repeats itself, told by a model that knows nothing."""
    words = np.random.default_rng(0).integers(0, VOCAB, (20, 8))
    text = words[np.random.default_rng(1).integers(0, 20, 800)].reshape(-1).astype(np.uint16)
    flat = {"neural": torch.zeros(len(text) - 1, VOCAB)}
    nll = BatchMixer(CONFIG, VOCAB, index_of(text)).score(flat, 1, len(text)).nll["neural"]
    assert nll[kind].sum() < 0.98 * min(nll[expert].sum() for expert in expert_names(CONFIG))


def test_ensemble_is_close_to_the_best_of_its_members(text: np.ndarray) -> None:
    nll = scored(text, [], replace(CONFIG, hedge_share=0.0))
    best = min(nll["a.neural"].sum(), nll["a.logistic"].sum())
    assert nll["a.ensemble"].sum() <= best + math.log(4)
    best = min(nll[f"a.{k}"].sum() for k in ("neural", "order1", "order3", "match"))
    rounding = 1e-9  # the unigram wins early, and the bound is then met exactly
    assert nll["a.hedge"].sum() <= best + math.log(5) + rounding


@pytest.mark.parametrize(
    "bad",
    [
        {"hedge_share": 1.0},
        {"gates": ()},
        {"orders": (1, 2)},
        {"memory_tokens": (1.0,)},
        {"match_lengths": (2,)},
        {"match_lengths": ()},
        {"linear_rate": 0.0},
        {"linear_gates": (), "kind": "linear"},
        {"experts": ("neural",)},
    ],
)
def test_what_cannot_work_says_so(text: np.ndarray, bad: dict) -> None:
    with pytest.raises(RecipeError):
        BatchMixer(replace(CONFIG, **bad), VOCAB, index_of(text))


@pytest.mark.parametrize("rows", [1, 63, 65])
def test_another_number_of_rows_is_refused(text: np.ndarray, rows: int) -> None:
    """One row for all positions would fit their memory."""
    with pytest.raises(ValueError, match="rows of"):
        BatchMixer(CONFIG, VOCAB, index_of(text)).score({"neural": neural_rows(text)[1 : 1 + rows]}, 1, 65)


def test_one_position_has_the_gates_of_its_batch(text: np.ndarray) -> None:
    config = replace(CONFIG, gates=("order", "both", "none", "entropy"), memory_tokens=(1.0, 1.0, 1.0, 1.0))
    rows, longest = neural_rows(text).log_softmax(-1), ngram_index.longest_class(index_of(text), 0, len(text))
    together = gate_sets(config, config.gates, rows[:, None], torch.from_numpy(longest)[:, None])
    assert together.shape == (len(text), 1, 4) and together.amax() < weight_sets(config)
    assert [len(together[..., gate].unique()) for gate in (0, 2)] == [classes(config), 1]
    for t in range(0, len(text), 50):
        alone = gate_sets(config, config.gates, rows[t : t + 1], torch.tensor([longest[t]]))
        assert torch.equal(alone, together[t])
        assert gate_numbers(config, config.gates, rows[t], int(longest[t])) == together[t, 0].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"linear_gates": ()},
        {"match_lengths": ()},
        {"orders": (2, 4)},
        {"gates": ("both",) * 3},
        {"match_lengths": (), "experts": tuple(EXPERTS)},
    ],
)
def test_other_shapes_of_mixer_score_from_their_rows(text: np.ndarray, changes: dict) -> None:
    config = replace(CONFIG, **changes)
    config = replace(config, memory_tokens=(900.0,) * len(config.gates))
    mixer, given = BatchMixer(config, VOCAB, index_of(text, config)), {"neural": neural_rows(text)[1:300]}
    rows, token = mixer.rows(given, 1, 300)["neural"], torch.from_numpy(text[1:300].astype(np.int64))
    nll = mixer.score(given, 1, 300).nll["neural"]
    assert set(rows) == set(nll) == set(mixer.kinds) and ("linear" in rows) == bool(config.linear_gates)
    for kind, row in rows.items():
        assert row.double().logsumexp(1).abs().max() < 1e-5, kind
        gathered = -row.gather(1, token[:, None])[:, 0].double()
        torch.testing.assert_close(nll[kind], gathered, rtol=1e-5, atol=1e-5, msg=kind)


def test_positions_mixed_one_by_one_are_the_batch(text: np.ndarray) -> None:
    blend, rng = Blend(CONFIG, 1, VOCAB, "cpu"), torch.manual_seed(0)
    neural = torch.randn(40, 1, VOCAB, generator=rng)
    rows = torch.randn(40, len(expert_names(CONFIG)) - 1, VOCAB, generator=rng).softmax(-1)
    longest, token = torch.arange(40) % classes(CONFIG), torch.arange(40) % VOCAB
    for _ in range(2):
        together = blend.mix(blend.positions(neural, rows, longest))
        alone = [blend.mix(blend.positions(neural[t : t + 1], rows[t : t + 1], longest[t : t + 1])) for t in range(40)]
        for name in vars(together):
            value = torch.cat([getattr(each, name) for each in alone])
            torch.testing.assert_close(value, getattr(together, name), rtol=1e-5, atol=1e-6, msg=name)
        blend.learn(together, token)


@pytest.mark.parametrize("changes", [{}, {"linear_gates": ()}])
def test_mixing_compiles_whole_and_computes_the_same(changes: dict) -> None:
    blend, rng = Blend(replace(CONFIG, **changes), 2, VOCAB, "cpu"), torch.manual_seed(0)
    neural = torch.randn(40, 2, VOCAB, generator=rng)
    rows = torch.randn(40, len(expert_names(CONFIG)) - 1, VOCAB, generator=rng).softmax(-1)
    longest = torch.arange(40) % classes(CONFIG)
    blend.learn(blend.mix(blend.positions(neural, rows, longest)), torch.arange(40) % VOCAB)
    compiled = torch.compile(blend.mix, backend="aot_eager", fullgraph=True)
    mine, theirs = (mix(blend.positions(neural, rows, longest)) for mix in (blend.mix, compiled))
    for name, value in vars(mine).items():
        assert torch.equal(value, getattr(theirs, name)), name
