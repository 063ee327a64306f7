"""The ablation against evaluations of their own: each line is what the same artifact scores with that setting."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.quality import ablation
from benchmarks.quality.ablation import DEFAULT, Options, Score
from hedgemix.artifact import format as artifact
from hedgemix.config import CacheConfig, EvaluateConfig, MixerConfig, RecipeError, TTTConfig
from hedgemix.data import memory
from hedgemix.evaluate.evaluator import EvaluateResult, Evaluation
from hedgemix.experts import ngram_index
from hedgemix.runtime.files import read_json
from hedgemix.runtime.layout import ABLATION
from support import tiny_artifact
from support.text_data import documents, processor
from support.tiny_artifact import ADAPTIVE, CPU, Case

REMEMBERED = [text[:1500] for text in documents()[14:20]]
MIXER = replace(ADAPTIVE.mixer, orders=(1, 2, 3, 4, 5), discount=0.6)
CONFIG = replace(ADAPTIVE, mixer=MIXER)
NO_CACHE, NO_HEAD = CacheConfig(enabled=False), TTTConfig(enabled=False)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = tiny_artifact.make(tmp_path_factory.mktemp("ablation"), REMEMBERED)
    return replace(made, tokens=made.tokens[:400])


def ablated(case: Case, config: EvaluateConfig) -> dict[str, Score]:
    memory_M, vocab_size = memory.tokens(processor(), REMEMBERED), case.model().vocab_size
    todo = ablation.lines(config, remembers=True)
    indexes = ablation.build_indexes(todo, case.tokens, vocab_size, memory_M)
    return ablation.Scorer(artifact.read(case.artifact), case.tokens, config, todo, indexes, CPU).score()


def evaluated(case: Case, config: EvaluateConfig, *, remembers: bool = True) -> EvaluateResult:
    """What an evaluation of this configuration finds."""
    mixer, vocab_size = config.mixer, case.model().vocab_size
    forgot = ngram_index.build(case.tokens, mixer.orders, vocab_size, mixer.match_lengths)
    found = artifact.read(case.artifact)
    work = Evaluation.begin(found, case.tokens, config, CPU, index=None if remembers else forgot)
    for number, chunk in enumerate(work.chunks):
        work.run_chunk(number, chunk)
    return work.result()


def test_every_line_is_an_evaluation_with_that_setting(case: Case) -> None:
    whole = evaluated(case, CONFIG)
    found = ablated(case, CONFIG)

    def final(config: EvaluateConfig = CONFIG, **mixer: Any) -> float:
        return evaluated(case, replace(config, mixer=replace(MIXER, **mixer))).bpb_final

    expected = {
        "neural": whole.bpb_quantized,
        "neural with fast head": whole.bpb_ttt,
        DEFAULT: whole.bpb_final,
        "without neural cache": final(replace(CONFIG, cache=NO_CACHE)),
        "without fast head": final(replace(CONFIG, ttt=NO_HEAD)),
        "without neural cache and fast head": whole.bpb_mixed,
        "without memory": evaluated(case, CONFIG, remembers=False).bpb_final,
        "without match": final(match_lengths=()),
        "without n-grams above order 2": final(orders=(1, 2)),
        "without n-grams above order 4": final(orders=(1, 2, 3, 4)),
        "without linear mixers": final(linear_gates=()),
        "without bias": final(bias_rate=0.0),
        "with recency": final(experts=("recency",)),
        "one logistic mixer, gate order": whole.bpb_logistic,
        "one linear mixer, gate order": final(kind="linear"),
        "Hedge over the experts": whole.bpb_hedge,
    }
    assert {label: score.bpb for label, score in found.items()} == pytest.approx(expected, abs=1e-9)
    assert len(set(expected.values())) == len(expected), "two lines that cannot be told apart"
    shown = {label for label, score in found.items() if score.mixing is None}
    assert shown == {label for label in expected if label.startswith(("neural", "one ", "Hedge "))}


def test_trained_weights_have_lines_of_their_own(case: Case) -> None:
    config = replace(tiny_artifact.CACHE_OVER_TRAINED, mixer=MIXER)
    whole, found = evaluated(case, config), ablated(case, config)
    expected = {
        "neural": whole.bpb_quantized,
        "neural, trained weights": whole.bpb_ttt,
        DEFAULT: whole.bpb_final,
        "without neural cache": evaluated(case, replace(config, cache=NO_CACHE)).bpb_final,
        "without neural cache and trained weights": whole.bpb_mixed,
    }
    # Without a cache the evaluation mixes both row sets in one batch, which rounds float32 sums in another order.
    assert {label: found[label].bpb for label in expected} == pytest.approx(expected, abs=1e-7)
    assert list(found)[:5] == list(expected)


def test_only_what_a_record_turns_on_is_left_out() -> None:
    bare = EvaluateConfig(
        ttt=NO_HEAD, cache=NO_CACHE,
        mixer=MixerConfig(kind="hedge", orders=(1, 2), match_lengths=(), experts=("recency",), linear_gates=()),
    )  # fmt: skip
    labels = [line.label for line in ablation.lines(bare, remembers=False)]
    assert labels == ["neural", DEFAULT, "without recency", "ensemble", "one logistic mixer, gate order"]


def test_differences_are_paired_by_seed() -> None:
    default, other = [1.0, 2.0, 4.0], [1.1, 2.4, 4.1]
    found = [
        {
            DEFAULT: Score(one, 2.0, 3.0),
            "without it": Score(two, 2.0, 1.5),
            "neural": Score(one - 0.1 * sign, 2.0, None),
        }
        for one, two, sign in zip(default, other, (1, 1, -1), strict=True)
    ]
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in lines_of(found))}
    by = np.array(other) - np.array(default)
    low, high = stats.t.interval(0.95, 2, by.mean(), by.std(ddof=1) / math.sqrt(3))
    assert rows[f"**{DEFAULT}**"] == ["2.3333", "", "", "", "3.0", "2.0"]
    assert rows["without it"] == ["2.5333", "+0.2000", f"{low:+.4f} to {high:+.4f}", "3 of 3", "1.5", "2.0"]
    assert rows["neural"][1] == "-0.0333" and rows["neural"][3:5] == ["2 of 3", ""]
    assert lines_of(found[:1])[1].count("|  |") == 1, "one seed has no interval"


def lines_of(found: list[dict[str, Score]]) -> list[str]:
    return ablation.markdown(found).splitlines()[2:]


def record(
    case: Case, monkeypatch: pytest.MonkeyPatch, config: EvaluateConfig, score: float, memory_M: object,
    evaluation: Path = Path("nowhere"),
) -> None:  # fmt: skip
    """Let the command find a record of one seed with this artifact and score."""
    recipe = SimpleNamespace(recipe="tiny", evaluate=config, data=SimpleNamespace(source="text"))
    dataset = SimpleNamespace(valid_sha256="0123456789abcdef", vocab_size=case.model().vocab_size)
    claim = SimpleNamespace(
        seed=7, recipe=recipe, dataset=dataset, artifact=case.artifact, score=score, evaluation=evaluation
    )
    stream = tiny_artifact.TokenStream([case.tokens])
    monkeypatch.setattr(ablation, "claims", lambda table, seeds: [claim])
    monkeypatch.setattr(ablation.datasets, "valid_stream", lambda of: stream)
    monkeypatch.setattr(ablation.datasets, "memory_tokens", lambda of: memory_M)


def test_the_command_compares_the_default_with_the_record(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    remembered_M, score = memory.tokens(processor(), REMEMBERED), evaluated(case, CONFIG).bpb_final
    record(case, monkeypatch, CONFIG, score + 2e-3, remembered_M, tmp_path)
    ablation.main(Options(Path("any"), device="cpu", out=tmp_path / "out.md"))
    out = capsys.readouterr().out
    assert out == (tmp_path / "out.md").read_text()
    assert f"| **{DEFAULT}** |" in out and "own bpb_final: 2.0e-03 bits per byte" in out
    ablation.main(Options(Path("any"), device="cpu", tokens=300))
    out = capsys.readouterr().out
    assert out.startswith("299 validation tokens") and "not compared" in out
    assert not (tmp_path / ABLATION).exists(), "what is not the record's score is not kept beside it"


def test_what_repeats_the_record_is_kept_for_its_report(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {DEFAULT: Score(1.0, 2.0, 3.0), "without it": Score(1.25, 2.0, 1.5)}
    monkeypatch.setattr(ablation, "Scorer", lambda *given: SimpleNamespace(score=lambda: found))
    record(case, monkeypatch, CONFIG, 1.0 + 1e-9, memory.tokens(processor(), REMEMBERED), tmp_path)
    list(ablation.measure(Options(Path("any"), device="cpu")))
    assert read_json(tmp_path / ABLATION) == {"default": 1.0, "variants": {"without it": 1.25}}


def test_records_it_cannot_take_apart(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    record(case, monkeypatch, replace(CONFIG, mixer=replace(MIXER, kind="none")), 1.0, np.zeros(0, np.uint16))
    with pytest.raises(SystemExit, match="error: .*kind is none"):
        ablation.main(Options(Path("any"), device="cpu"))
    record(case, monkeypatch, CONFIG, 1.0, np.ones(5, np.uint16))
    with pytest.raises(RecipeError, match="seed 7: the artifact's memory"):
        list(ablation.measure(Options(Path("any"), device="cpu")))
