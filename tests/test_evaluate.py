"""The score of an artifact: complete, blind to the future, and equal to what slow loops over the same parts give."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from textdata import documents, processor
from torch import Tensor

from hedgemix import artifact, bpb, evaluate, ngram, published, tokenizer
from hedgemix.artifact import ArtifactError
from hedgemix.config import EvaluateConfig, MixerConfig, ModelConfig, QuantizeConfig, RecipeError, TTTConfig
from hedgemix.evaluate import Evaluation, evaluate_artifact, load_model, read_tokens, score_model
from hedgemix.mixer import Mixer
from hedgemix.model import Model
from hedgemix.quantize import quantize_model
from hedgemix.shards import TokenStream
from hedgemix.stream import Piece, chunks, piece_rows, pieces
from hedgemix.ttt import Adapter

CPU, CONTEXT, TOKENS = torch.device("cpu"), 64, 1200
CONFIG = EvaluateConfig(
    window_tokens=32, stride_tokens=8, segment_tokens=96, overlap_tokens=64, batch_windows=7, chunk_tokens=320,
    dtype="float32",
    ttt=TTTConfig(rate=1e-3, epochs=1, batch_sequences=3, sequence_tokens=32, last_blocks=1, polyak=0.9),
    mixer=MixerConfig(orders=(1, 2, 3), block_tokens=32),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An artifact and a text to score it on."""

    folder: Path
    text: bytes
    tokens: np.ndarray

    @property
    def artifact(self) -> Path:
        return self.folder / "model.hmx"

    def score(self, config: EvaluateConfig = CONFIG, **options: Any) -> evaluate.EvaluateResult:
        return evaluate_artifact(
            self.artifact, TokenStream([self.tokens]), self.folder / "counts", config, CPU, **options
        )

    def begin(self, config: EvaluateConfig = CONFIG, tokens: np.ndarray | None = None) -> Evaluation:
        tokens = self.tokens if tokens is None else tokens
        model, tables = load_model(artifact.read(self.artifact)), bpb.byte_tables(processor())
        bytes_N = np.concatenate([[0], bpb.token_bytes(tables, tokens[:-1], tokens[1:])])
        index = ngram.build_index(tokens, config.mixer.orders, model.vocab_size)
        return Evaluation(model, torch.from_numpy(tokens.astype(np.int64)), bytes_N, index, config)


def make_case(folder: Path) -> Case:
    """A small model of the documents' tokenizer, quantized and written, and about TOKENS tokens of documents."""
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2, width=32, heads=2, kv_heads=1, mlp_hidden=64, rope_dims=8, bigram_buckets=256, bigram_width=16,
        value_embedding_layers=1, value_embedding_width=16,
    )  # fmt: skip
    model = Model(config, processor().vocab_size(), CONTEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    sums = {name: torch.eye(model.get_parameter(name).shape[1]) for name in model.inputs()}
    tensors, _ = quantize_model(model, sums, 1, QuantizeConfig())
    header = {"model": asdict(config), "vocab_size": model.vocab_size, "context_tokens": CONTEXT}
    artifact.write(folder / "model.hmx", header, processor().serialized_model_proto(), tensors, 3)
    texts, parts = [], []
    while sum(map(len, parts)) < TOKENS:
        texts.append(documents()[10 + len(texts)][:1500])
        parts.append(np.array(tokenizer.encode(processor(), texts[-1]), np.uint16))
    case = Case(folder, "".join(texts).encode(), np.concatenate(parts))
    ngram.save(ngram.build_index(case.tokens, CONFIG.mixer.orders, model.vocab_size), folder / "counts")
    return case


@pytest.fixture(scope="module", autouse=True)
def small_published_rule() -> Iterator[None]:
    """A table of few buckets, and counts that are used from the second chunk on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "start", partial(published.start, buckets=64))
        patch.setattr(published, "score", partial(published.score, warm_tokens=100))
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def scored(case: Case) -> tuple[evaluate.EvaluateResult, list[dict[str, Any]], list[dict[str, Any]]]:
    """Result, trace and log of the whole text."""
    trace, log = case.folder / "trace.jsonl", []
    trace.write_text("left by an earlier attempt\n")
    result = case.score(trace=trace, log=log.append)
    return result, [json.loads(line) for line in trace.read_text().splitlines()], log


def bits_per_byte(case: Case, nats: float) -> float:
    return nats / math.log(2) / len(case.text)


def test_all_tokens_but_the_first_and_all_bytes_are_scored(case: Case, scored: Any) -> None:
    result, trace, log = scored
    found = chunks(len(case.tokens), CONFIG.chunk_tokens)
    assert len(found) == 4 or len(found) == 5
    assert result.scored_tokens == len(case.tokens) - 1 == sum(line["tokens"] for line in trace)
    assert result.scored_bytes == len(case.text) == sum(line["bytes"] for line in trace)
    assert [(line["chunk"], line["tokens"]) for line in trace] == [(i, c.stop - c.start) for i, c in enumerate(found)]
    assert [record["fraction"] for record in log] == sorted(record["fraction"] for record in log)
    assert log[-1]["fraction"] == 1 and log[-1]["bpb"] == result.bpb_final


def test_the_trace_adds_up_to_the_result(case: Case, scored: Any) -> None:
    result, trace, _ = scored
    for name in trace[0]["bits"]:
        assert sum(line["bits"][name] for line in trace) / len(case.text) == pytest.approx(
            getattr(result, f"bpb_{name}"), rel=1e-12
        )
    assert {f"bpb_{name}" for name in trace[0]["bits"]} == {f.name for f in fields(result) if "bpb" in f.name}
    assert bits_per_byte(case, result.nats_per_token * result.scored_tokens) == pytest.approx(result.bpb_final)
    for phase in ("scoring", "mixing", "ttt"):
        spent = sum(line["seconds"][phase] for line in trace)
        assert 0 < spent == pytest.approx(getattr(result, f"{phase}_seconds"))
    assert result.scoring_seconds + result.mixing_seconds + result.ttt_seconds < result.evaluate_seconds
    assert result.expert_names == ["neural", "order1", "order2", "order3"]
    assert result.expert_weights == trace[-1]["weights"]["hedge"] and sum(result.expert_weights) == pytest.approx(1)


def test_every_number_equals_a_loop_over_its_parts(case: Case, scored: Any) -> None:
    """The parts have tests of their own; here it is about who sees what, in which order."""
    result, _, _ = scored
    frozen = load_model(artifact.read(case.artifact))
    text = read_tokens(TokenStream([case.tokens]), CPU)
    weights = torch.tensor([0.0, *map(float, token_sizes(case.tokens))])
    assert weights.sum() == len(case.text)
    found = chunks(len(text), CONFIG.chunk_tokens)
    adapter = Adapter(frozen, CONFIG.ttt, len(found), "float32")
    mixer = Mixer(CONFIG.mixer, frozen.vocab_size, ngram.load(case.folder / "counts"), names=("a", "b"))
    rule = published.start(frozen.vocab_size)
    nats, mass = dict.fromkeys(("quantized", "mixed", "ttt", "final", "hedge", "logistic", "published"), 0.0), 0.0
    for chunk in found:
        history = torch.stack([text[(torch.arange(chunk.start, chunk.stop) - back).clamp(0)] for back in (2, 1)], 1)
        for piece in pieces(chunk, CONFIG):
            rows = {name: piece_rows(m, text, piece, CONFIG) for name, m in (("a", frozen), ("b", adapter.scorer))}
            nll = mixer.score(rows, piece.start, piece.stop).nll
            here = slice(piece.start - chunk.start, piece.stop - chunk.start)
            losses, masses = published.score(rule, rows["b"], history[here], text[piece.start : piece.stop])
            for name, values in (
                ("quantized", nll["a"]["neural"]), ("mixed", nll["a"]["ensemble"]), ("ttt", nll["b"]["neural"]),
                ("final", nll["b"]["ensemble"]), ("hedge", nll["b"]["hedge"]), ("logistic", nll["b"]["logistic"]),
                ("published", losses),
            ):  # fmt: skip
                nats[name] += float(values.sum())
            mass += float(masses.sum())
        published.count(rule, history, text[chunk.start : chunk.stop])
        if chunk.stop < len(text):
            adapter.learn(text, weights, chunk)
    for name, value in nats.items():
        assert getattr(result, f"bpb_{name}") == pytest.approx(bits_per_byte(case, value), rel=1e-9), name
    assert result.published_mass == pytest.approx(mass / (len(text) - 1), rel=1e-9) and result.published_mass > 1.01
    assert result.bpb_ttt < result.bpb_quantized - 0.01


def token_sizes(tokens: np.ndarray) -> list[int]:
    """Bytes of every token but the first, from decoding ever longer beginnings of the text."""
    lengths = [len(tokenizer.decode(processor(), tokens[:stop])) for stop in range(1, len(tokens) + 1)]
    return np.diff(lengths).tolist()


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_the_quantized_score_equals_a_loop_over_tokens(case: Case, order: str) -> None:
    config = replace(CONFIG, order=order, ttt=TTTConfig(enabled=False))
    model, text = load_model(artifact.read(case.artifact)), torch.from_numpy(case.tokens.astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for chunk in chunks(len(text), config.chunk_tokens):
            full = max(chunk.start, config.window_tokens + 1)
            for t in range(chunk.start, chunk.stop):
                begin, band = max(0, t - CONTEXT - 1), config.window_tokens
                if order == "sliding":
                    ahead = min(full + (t - full) // config.stride_tokens * config.stride_tokens + 8, chunk.stop)
                    begin, band = max(0, ahead - 1 - config.window_tokens) if t >= full else 0, None
                row = model.logits(model.features(text[None, begin:t], band=band)[0, -1]).log_softmax(-1)
                nats -= float(row[text[t]])
    result = case.score(config)
    assert result.bpb_quantized == pytest.approx(bits_per_byte(case, nats), rel=1e-6)
    assert score_model(model, TokenStream([case.tokens]), config) == pytest.approx(nats, rel=1e-6)
    assert result.scored_tokens == len(text) - 1 and result.scored_bytes == len(case.text)


@dataclass
class Recorder:
    """What an evaluation scored, counted and learned, in order."""

    events: list[tuple[str, int, int]]
    nll: dict[str, list[Tensor]]
    weights: list[Tensor]

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events, self.nll, self.weights = [], {}, []
        score, learn, count = Mixer.score, Adapter.learn, published.count

        def scoring(mixer: Mixer, rows: dict[str, Tensor], start: int, stop: int) -> Any:
            scores = score(mixer, rows, start, stop)
            self.events.append(("score", start, stop))
            for name, kinds in scores.nll.items():
                for kind, values in kinds.items():
                    self.nll.setdefault(f"{name}.{kind}", []).append(values)
            return scores

        def learning(adapter: Adapter, tokens_N: Tensor, weights_N: Tensor, chunk: Piece) -> None:
            self.events.append(("learn", chunk.start, chunk.stop))
            self.weights.append(weights_N)
            learn(adapter, tokens_N, weights_N, chunk)

        def counting(state: published.PublishedState, history_B2: Tensor, token_B: Tensor) -> None:
            self.events.append(("count", state.counted + 1, state.counted + 1 + len(token_B)))
            count(state, history_B2, token_B)

        patch.setattr(Mixer, "score", scoring)
        patch.setattr(Adapter, "learn", learning)
        patch.setattr(published, "count", counting)

    def nats(self) -> dict[str, Tensor]:
        """By row set and kind, the nats of the targets 1 .. N - 1."""
        return {name: torch.cat(parts) for name, parts in self.nll.items()}


def run(work: Evaluation, patch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], Recorder]:
    """The trace without its seconds, and what happened."""
    recorder = Recorder(patch)
    lines = [work.run_chunk(number, chunk) for number, chunk in enumerate(work.chunks)]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines], recorder


@pytest.fixture(scope="module")
def undisturbed(case: Case) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        lines, recorder = run(case.begin(), patch)
    return lines, recorder.nats()


@pytest.mark.parametrize("t", [1, 319, 320, 500, 641, 1100])
def test_the_future_changes_no_score(case: Case, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, t: int) -> None:
    changed = case.tokens.copy()
    changed[t:] = 3 + (changed[t:] + np.random.default_rng(0).integers(1, 400, len(changed) - t)) % 500
    lines, recorder = run(case.begin(tokens=changed), monkeypatch)
    expected_lines, expected = undisturbed
    done = sum(chunk.stop <= t for chunk in chunks(len(changed), CONFIG.chunk_tokens))
    assert lines[:done] == expected_lines[:done] and lines[done] != expected_lines[done]
    for name, nats in recorder.nats().items():
        assert len(nats) == len(changed) - 1
        assert torch.equal(nats[: t - 1], expected[name][: t - 1]), name
        assert not torch.equal(nats[t - 1 :], expected[name][t - 1 :]), name


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_each_chunk_is_scored_once_then_learned(case: Case, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    work = case.begin(replace(CONFIG, order=order))
    _, recorder = run(work, monkeypatch)
    expected = []
    for chunk in chunks(len(case.tokens), CONFIG.chunk_tokens):
        expected += [("score", piece.start, piece.stop) for piece in pieces(chunk, work.config)]
        expected += [("count", chunk.start, chunk.stop), ("learn", chunk.start, chunk.stop)]
    assert recorder.events == expected[:-1]  # nobody scores after the last chunk, so nothing is learned from it


@pytest.mark.parametrize("byte_weighted", [True, False])
def test_learning_weighs_tokens_by_their_bytes(
    case: Case, monkeypatch: pytest.MonkeyPatch, byte_weighted: bool
) -> None:
    work = case.begin(replace(CONFIG, ttt=replace(CONFIG.ttt, byte_weighted=byte_weighted)), case.tokens[:400])
    _, recorder = run(work, monkeypatch)
    sizes = token_sizes(case.tokens[:400])
    assert recorder.weights[0][1:].tolist() == (sizes if byte_weighted else [1] * 399) and len(set(sizes)) > 3


def test_without_test_time_training_the_shipped_weights_score_everything(case: Case, scored: Any) -> None:
    result = case.score(replace(CONFIG, ttt=TTTConfig(enabled=False)))
    assert result.bpb_ttt is None and result.ttt_seconds == 0
    assert result.bpb_final == result.bpb_mixed
    assert result.bpb_quantized == scored[0].bpb_quantized
    assert result.bpb_mixed == pytest.approx(scored[0].bpb_mixed, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "final"), [("none", "ttt"), ("hedge", "hedge"), ("logistic", "logistic"), ("ensemble", None)]
)
def test_the_recipe_chooses_the_mixture_of_the_final_score(case: Case, kind: str, final: str | None) -> None:
    work = case.begin(replace(CONFIG, mixer=replace(CONFIG.mixer, kind=kind)), case.tokens[:500])
    for number, chunk in enumerate(work.chunks):
        work.run_chunk(number, chunk)
    result = asdict(work.result())
    equal = {name for name in ("ttt", "hedge", "logistic") if result["bpb_final"] == result[f"bpb_{name}"]}
    assert equal == ({final} if final else set())
    assert (result["bpb_mixed"] == result["bpb_quantized"]) == (kind == "none")


@pytest.mark.parametrize("size", [2, 3, 66, 130])
@pytest.mark.parametrize("chunk_tokens", [1, 33, 64])
def test_texts_and_chunks_of_any_size_are_scored(case: Case, size: int, chunk_tokens: int) -> None:
    work = case.begin(replace(CONFIG, chunk_tokens=chunk_tokens), case.tokens[:size])
    for number, chunk in enumerate(work.chunks[:20]):
        assert math.isfinite(work.run_chunk(number, chunk)["bits"]["final"])
    assert work.result().scored_tokens == min(size, work.chunks[:20][-1].stop) - 1


def test_bfloat16_scores_about_the_same(case: Case) -> None:
    off = replace(CONFIG, ttt=TTTConfig(enabled=False))
    exact, rough = case.score(off), case.score(replace(off, dtype="bfloat16"))
    assert rough.bpb_quantized != exact.bpb_quantized
    assert rough.bpb_quantized == pytest.approx(exact.bpb_quantized, rel=5e-3)


def test_counts_of_another_text_are_refused(case: Case, tmp_path: Path) -> None:
    other = replace(case, tokens=np.roll(case.tokens, 1))
    with pytest.raises(RecipeError, match="counts another text"):
        other.score()
    with pytest.raises(RecipeError, match="counts another text"):
        replace(case, tokens=case.tokens[:-1]).score()
    with pytest.raises(RecipeError, match="orders"):
        case.score(replace(CONFIG, mixer=replace(CONFIG.mixer, orders=(1, 2))))


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("vocab_size"),
        lambda header, tensors: header.update(vocab_size=511),
        lambda header, tensors: header.update(vocab_size="many"),
        lambda header, tensors: header.update(model=["layers", 2]),
        lambda header, tensors: header["model"].update(layers=3),
        lambda header, tensors: header["model"].update(layers="two"),
        lambda header, tensors: header["model"].update(heads=3),
        lambda header, tensors: header["model"].update(colour="blue"),
        lambda header, tensors: header["model"].update(rope_scaled_beyond_tokens=0),
        lambda header, tensors: tensors.pop("embedding.weight"),
        lambda header, tensors: tensors.update(more=torch.zeros(3)),
    ],
)
def test_header_and_tensors_that_do_not_fit_are_refused(case: Case, change: Any) -> None:
    found = artifact.read(case.artifact)
    load_model(found)
    change(found.header, found.tensors)
    with pytest.raises(ArtifactError, match="do not fit together"):
        load_model(found)


def test_an_artifact_is_scored_without_the_code_that_made_it() -> None:
    made = [f"hedgemix.{name}" for name in ("train", "quantize", "gptq", "calibrate", "corpus", "dataset", "recipes")]
    code = f"import sys, hedgemix.evaluate; print(*[name for name in {made + ['ray']} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
