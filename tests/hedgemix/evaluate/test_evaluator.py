"""The score of an artifact: complete, blind to the future, and equal to what slow loops over the same parts give."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from hedgemix.artifact import format as artifact
from hedgemix.artifact.format import ArtifactError
from hedgemix.artifact.load_model import load_model
from hedgemix.audit.sandbox import FORBIDDEN
from hedgemix.config import CacheConfig, RecipeError, TTTConfig
from hedgemix.data import tokenizer
from hedgemix.data.device_text import Text
from hedgemix.data.shards import TokenStream
from hedgemix.evaluate.evaluator import Evaluation, score_model
from hedgemix.evaluate.scoring_order import Piece, chunks, piece_features, piece_rows, pieces
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import ngram_index
from hedgemix.experts.feature_experts import FeatureExperts
from hedgemix.mixers import published
from hedgemix.mixers.batch_mixer import BatchMixer
from support import tiny_artifact
from support.no_host_sync import unattended
from support.text_data import processor
from support.tiny_artifact import ADAPTIVE, CONFIG, CONTEXT, WITHIN_DOCUMENTS, Case

NO_TTT = replace(CONFIG, ttt=TTTConfig(enabled=False))
MISSING = object()
LACKING: dict[str, dict[str, Any]] = {
    "cache": {"ttt": TTTConfig(enabled=False)},
    "head": {"cache": CacheConfig(enabled=False)},
    "both": {},
}


@pytest.fixture(scope="module", autouse=True)
def small_and_quick() -> Iterator[None]:
    """One thread; of the published rule a table of few buckets, and counts that are used from the second chunk on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "start", partial(published.start, buckets=64, warm_tokens=100))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_artifact.make(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def scored(case: Case) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """Result, trace and log of the whole text."""
    trace, log = case.folder / "trace.jsonl", []
    trace.write_text("left by an earlier attempt\n")
    result = case.score(trace=trace, log=log.append)
    return result, [json.loads(line) for line in trace.read_text().splitlines()], log


def rate(case: Case, nats: float) -> float:
    return nats / math.log(2) / len(case.text)


def token_sizes(tokens: np.ndarray) -> list[int]:
    """Bytes of every token but the first, from decoding ever longer beginnings of the text."""
    lengths = [len(tokenizer.decode(processor(), tokens[:stop])) for stop in range(1, len(tokens) + 1)]
    return np.diff(lengths).tolist()


def test_all_tokens_but_the_first_and_all_bytes_are_scored(case: Case, scored: Any) -> None:
    result, trace, log = scored
    found = chunks(len(case.tokens), CONFIG.chunk_tokens)
    assert len(found) > 3 and (case.tokens == processor().bos_id()).sum() == 4
    assert result.scored_tokens == len(case.tokens) - 1
    assert result.scored_bytes == len(case.text) == sum(line["bytes"] for line in trace)
    assert [(line["chunk"], line["tokens"]) for line in trace] == [(i, c.stop - c.start) for i, c in enumerate(found)]
    fractions = [record["fraction"] for record in log]
    assert fractions == sorted(fractions) and fractions[-1] == 1 and log[-1]["bpb"] == result.bpb_final


def test_the_trace_adds_up_to_the_result(case: Case, scored: Any) -> None:
    result, trace, _ = scored
    assert {f"bpb_{name}" for name in trace[0]["bits"]} == {f.name for f in fields(result) if "bpb" in f.name}
    for name in trace[0]["bits"]:
        bits = sum(line["bits"][name] for line in trace)
        assert bits / len(case.text) == pytest.approx(getattr(result, f"bpb_{name}"), rel=1e-12), name
    assert rate(case, result.nats_per_token * result.scored_tokens) == pytest.approx(result.bpb_final, rel=1e-12)
    for phase in ("scoring", "mixing", "ttt"):
        spent = sum(line["seconds"][phase] for line in trace)
        assert 0 < spent == pytest.approx(getattr(result, f"{phase}_seconds"))
    assert result.scoring_seconds + result.mixing_seconds + result.ttt_seconds < result.evaluate_seconds
    assert result.expert_names == ["neural", "order1", "order2", "order3", "match"]
    assert result.expert_weights == trace[-1]["weights"]["hedge"] and sum(result.expert_weights) == pytest.approx(1)
    assert result.ensemble_names == ["neural", "logistic-order", "logistic-entropy"]
    assert result.ensemble_weights == trace[-1]["weights"]["ensemble"]


def test_a_profile_is_a_trace_of_one_chunk_that_changes_no_score(case: Case, scored: Any, tmp_path: Path) -> None:
    assert case.score(profile=tmp_path).bpb_final == scored[0].bpb_final
    events = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep") for event in events) == 1
    assert "aten::mm" in (tmp_path / "profile.txt").read_text()


def test_every_number_equals_a_loop_over_its_parts(case: Case, scored: Any) -> None:
    """The parts have tests of their own; here it is about who sees what, in which order."""
    frozen, text = case.model(), torch.from_numpy(case.tokens.astype(np.int64))
    sizes_N = torch.tensor([0.0, *map(float, token_sizes(case.tokens))])
    found = chunks(len(text), CONFIG.chunk_tokens)
    adapter = Adapter(frozen, CONFIG.ttt, len(found), "float32")
    mixer = BatchMixer(CONFIG.mixer, frozen.vocab_size, ngram_index.load(case.folder / "counts"), names=("a", "b"))
    rule = published.start(frozen.vocab_size)
    nats, mass = dict.fromkeys(("quantized", "mixed", "ttt", "final", "hedge", "logistic", "published"), 0.0), 0.0
    for chunk in found:
        published.open_chunk(rule, chunk.stop - chunk.start)
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
            adapter.learn(text, sizes_N, chunk)
    result = scored[0]
    for name, value in nats.items():
        assert getattr(result, f"bpb_{name}") == pytest.approx(rate(case, value), rel=1e-9), name
    assert result.published_mass == pytest.approx(mass / (len(text) - 1), rel=1e-9) and result.published_mass > 1.01
    assert result.bpb_ttt < result.bpb_quantized - 0.01


@pytest.mark.parametrize("experts", ["cache", "head", "both"])
def test_experts_over_features_are_mixed_beside_the_frozen_rows_and_change_no_other_number(
    case: Case, scored: Any, experts: str
) -> None:
    """Against two mixers with n-grams of their own, one of which is given what the experts say."""
    config, text = replace(ADAPTIVE, **LACKING[experts]), torch.from_numpy(case.tokens.astype(np.int64))
    frozen, index = case.model(), ngram_index.load(case.folder / "counts")
    learner = FeatureExperts(config, frozen.vocab_size, frozen.config.width)
    plain = BatchMixer(config.mixer, frozen.vocab_size, index)
    full = BatchMixer(config.mixer, frozen.vocab_size, index, given=learner.names)
    nats = dict.fromkeys(("mixed", "ttt", "final", "hedge", "logistic"), 0.0)
    for chunk in chunks(len(text), config.chunk_tokens):
        for piece in pieces(chunk, config):
            span, features = (piece.start, piece.stop), piece_features(frozen, text, piece, config)
            rows = piece_rows(frozen, text, piece, config)
            said = learner.rows(rows, features, text[piece.start : piece.stop])
            nll = full.score({"neural": rows, **said}, *span).nll["neural"]
            mixed = plain.score({"neural": rows}, *span).nll["neural"]["ensemble"]
            values = mixed, nll.get("head"), nll["ensemble"], nll["hedge"], nll["logistic"]
            for name, value in zip(nats, values, strict=True):
                nats[name] += float(value.sum()) if value is not None else math.nan
    result = case.score(config)
    assert result.expert_names == ["neural", "order1", "order2", "order3", "match", *learner.names]
    for name, value in nats.items():
        if not math.isnan(value):
            assert getattr(result, f"bpb_{name}") == pytest.approx(rate(case, value), rel=1e-12), name
    assert (result.bpb_ttt is None) == (experts == "cache")
    assert result.bpb_final < result.bpb_mixed or experts == "head"  # the n-grams of so small a text know more
    assert result.bpb_quantized == scored[0].bpb_quantized
    assert result.bpb_mixed == pytest.approx(scored[0].bpb_mixed, rel=1e-7)  # there two row sets are mixed at once


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_the_quantized_score_equals_a_loop_over_tokens(case: Case, order: str) -> None:
    config, text = replace(NO_TTT, order=order), torch.from_numpy(case.tokens.astype(np.int64))
    model, window, stride = case.model(), config.window_tokens, config.stride_tokens
    asked: dict[tuple[int, int | None], list[int]] = {}  # targets by the length and band of what is read before them
    for chunk in chunks(len(text), config.chunk_tokens):
        full = max(chunk.start, window + 1)
        for t in range(chunk.start, chunk.stop):
            begin, band = max(0, t - CONTEXT - 1), window
            if order == "sliding":
                stop = min(full + ((t - full) // stride + 1) * stride, chunk.stop)
                begin, band = 0 if t < full else stop - 1 - window, None
            asked.setdefault((t - begin, band), []).append(t)
    nats = 0.0
    for (length, band), targets in asked.items():
        for some in torch.tensor(targets).split(64):
            before = text[some[:, None] - length + torch.arange(length)]
            with torch.no_grad():
                rows = model.logits(model.features(before, band=band)[:, -1]).log_softmax(-1)
            nats -= float(rows.double().gather(1, text[some, None]).sum())
    result = case.score(config)
    assert result.bpb_quantized == pytest.approx(rate(case, nats), rel=1e-6)
    assert score_model(model, TokenStream([case.tokens]), config) == pytest.approx(nats, rel=1e-6)
    assert result.scored_tokens == len(text) - 1 and result.scored_bytes == len(case.text)


class Recorder:
    """What an evaluation scored, counted and learned, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.nll: dict[str, list[Tensor]] = {}
        self.weights: list[Tensor] = []
        score, learn, count = BatchMixer.score, Adapter.learn, published.count

        def scoring(mixer: BatchMixer, rows: dict[str, Tensor], start: int, stop: int) -> Any:
            scores = score(mixer, rows, start, stop)
            self.events.append(("score", start, stop))
            for name, kinds in scores.nll.items():
                for kind, values in kinds.items():
                    self.nll.setdefault(f"{name}.{kind}", []).append(values)
            return scores

        def learning(adapter: Adapter, tokens_N: Tensor, weights_N: Tensor, chunk: Piece) -> None:
            self.events.append(("learn", chunk.start, chunk.stop))
            self.weights.append(weights_N[: len(tokens_N)])
            learn(adapter, tokens_N, weights_N, chunk)

        def counting(state: published.PublishedState, history_B2: Tensor, token_B: Tensor) -> None:
            self.events.append(("count", state.counted + 1, state.counted + 1 + len(token_B)))
            count(state, history_B2, token_B)

        patch.setattr(BatchMixer, "score", scoring)
        patch.setattr(Adapter, "learn", learning)
        patch.setattr(published, "count", counting)

    def nats(self) -> dict[str, Tensor]:
        """By row set and kind, of the targets 1 .. N - 1."""
        return {name: torch.cat(parts) for name, parts in self.nll.items()}


def run(work: Evaluation) -> list[dict[str, Any]]:
    """The trace without its seconds."""
    lines = [work.run_chunk(number, chunk) for number, chunk in enumerate(work.chunks)]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def unchanged(case: Case) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        return run(case.begin()), recorder.nats()


def test_host_and_device_leave_each_other_alone_while_a_piece_is_scored(case: Case, unchanged: Any) -> None:
    """As on a GPU: text and index resident. The bits are the same, and the device is read at the end of a chunk."""
    work = case.begin()
    work.tokens_N = Text(case.tokens, torch.device("cpu"), resident=True)
    # Spans of one block: chunks of 320 tokens end where spans do.
    work.mixer = BatchMixer(CONFIG.mixer, 512, work.mixer.index, names=work.mixer.names, span_tokens=32, resident=True)
    score, counts = work.score, []

    def watched(piece: Piece, rows: dict[str, Tensor]) -> None:
        if work.finished == 0:  # what is kept from piece to piece is made here
            return score(piece, rows)
        with unattended() as operations:
            score(piece, rows)
        counts.append(operations.count)

    work.score = watched  # type: ignore[method-assign]
    assert run(work) == unchanged[0] and len(counts) > 3 and min(counts) > 100


@pytest.mark.parametrize("t", [1, 319, 320, 500, 641, 1100])
def test_the_future_changes_no_score(case: Case, unchanged: Any, monkeypatch: pytest.MonkeyPatch, t: int) -> None:
    shift = np.random.default_rng(0).integers(1, 512, len(case.tokens) - t).astype(np.uint16)
    recorder, changed = Recorder(monkeypatch), np.concatenate([case.tokens[:t], (case.tokens[t:] + shift) % 512])
    lines, (expected_lines, expected) = run(case.begin(tokens=changed)), unchanged
    done = sum(chunk.stop <= t for chunk in chunks(len(changed), CONFIG.chunk_tokens))
    assert lines[:done] == expected_lines[:done] and lines[done] != expected_lines[done]
    for name, nats in recorder.nats().items():
        assert len(nats) == len(changed) - 1
        assert torch.equal(nats[: t - 1], expected[name][: t - 1]), name
        assert not torch.equal(nats[t - 1 :], expected[name][t - 1 :]), name


@pytest.mark.parametrize("order", ["streaming", "sliding"])
def test_each_chunk_is_scored_once_then_learned(case: Case, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    work, recorder, expected = case.begin(replace(CONFIG, order=order)), Recorder(monkeypatch), []
    run(work)
    for chunk in chunks(len(case.tokens), CONFIG.chunk_tokens):
        expected += [("score", piece.start, piece.stop) for piece in pieces(chunk, work.config)]
        expected += [("count", chunk.start, chunk.stop), ("learn", chunk.start, chunk.stop)]
    assert recorder.events == expected[:-1]  # nobody scores after the last chunk, so nothing is learned from it


@pytest.mark.parametrize("weighted", [True, False])
def test_learning_weighs_tokens_by_their_bytes(case: Case, monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    recorder, tokens = Recorder(monkeypatch), case.tokens[:400]
    run(case.begin(replace(CONFIG, ttt=replace(CONFIG.ttt, byte_weighted=weighted)), tokens))
    assert recorder.weights[0][1:].tolist() == (token_sizes(tokens) if weighted else [1] * 399)


def test_without_test_time_training_the_shipped_weights_score_everything(case: Case, scored: Any) -> None:
    result = case.score(NO_TTT)
    assert result.bpb_ttt is None and result.ttt_seconds == 0 and result.bpb_final == result.bpb_mixed
    assert result.bpb_quantized == scored[0].bpb_quantized
    assert result.bpb_mixed == pytest.approx(scored[0].bpb_mixed, rel=1e-6)


@pytest.mark.parametrize(("kind", "final"), [("none", "ttt"), ("hedge",) * 2, ("logistic",) * 2, ("ensemble", None)])
def test_the_recipe_chooses_the_mixture_of_the_final_score(case: Case, kind: str, final: str | None) -> None:
    work = case.begin(replace(CONFIG, mixer=replace(CONFIG.mixer, kind=kind)), case.tokens[:500])
    run(work)
    result = asdict(work.result())
    equal = {name for name in ("ttt", "hedge", "logistic") if result["bpb_final"] == result[f"bpb_{name}"]}
    assert equal == ({final} if final else set())
    assert (result["bpb_mixed"] == result["bpb_quantized"]) == (kind == "none")


@pytest.mark.parametrize("chunk_tokens", [1, 33, 64])
@pytest.mark.parametrize("size", [3, 4, 34])
def test_texts_and_chunks_of_any_size_are_scored(case: Case, size: int, chunk_tokens: int) -> None:
    work = case.begin(replace(CONFIG, chunk_tokens=chunk_tokens), case.tokens[:size])
    assert all(0 < line["bits"]["final"] < 20 * line["tokens"] for line in run(work))
    assert work.result().scored_tokens == size - 1


def test_bfloat16_scores_about_the_same(case: Case) -> None:
    exact, rough = case.score(NO_TTT), case.score(replace(NO_TTT, dtype="bfloat16"))
    assert rough.bpb_quantized != exact.bpb_quantized
    assert rough.bpb_quantized == pytest.approx(exact.bpb_quantized, rel=5e-3)


@pytest.mark.parametrize("change", [lambda tokens: tokens[:-1], lambda tokens: np.roll(tokens, 1)])
def test_counts_of_another_text_are_refused(case: Case, change: Any) -> None:
    with pytest.raises(RecipeError, match="counts another text"):
        replace(case, tokens=change(case.tokens)).score()


def test_counts_of_other_orders_are_refused(case: Case) -> None:
    with pytest.raises(RecipeError, match="orders"):
        case.score(replace(CONFIG, mixer=replace(CONFIG.mixer, orders=(1, 2))))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("header", "vocab_size", MISSING),
        ("header", "vocab_size", 511),
        ("header", "vocab_size", "many"),
        ("header", "model", 7),
        ("model", "layers", 3),
        ("model", "layers", "two"),
        ("model", "heads", 3),
        ("model", "colour", "blue"),
        ("model", "rope_scaled_beyond_tokens", 0),
        ("tensors", "embedding.weight", MISSING),
        ("tensors", "more", torch.zeros(3)),
    ],
)
def test_header_and_tensors_that_do_not_fit_are_refused(case: Case, part: str, name: str, value: Any) -> None:
    found = artifact.read(case.artifact)
    parts = {"header": found.header, "model": found.header["model"], "tensors": found.tensors}
    parts[part].pop(name, None)
    if value is not MISSING:
        parts[part][name] = value
    with pytest.raises(ArtifactError, match="do not fit together"):
        load_model(found)


def test_a_model_within_documents_learns_from_the_artifacts_tokenizer_what_begins_them(tmp_path: Path) -> None:
    found = artifact.read(tiny_artifact.make(tmp_path, texts=1, config=WITHIN_DOCUMENTS).artifact)
    assert load_model(found).bos_id == processor().bos_id()
    changed = sentencepiece_model_pb2.ModelProto.FromString(found.tokenizer)
    changed.pieces[1].piece = "<other>"
    with pytest.raises(ArtifactError, match="has no BOS"):
        load_model(replace(found, tokenizer=changed.SerializeToString()))


def test_an_artifact_is_scored_without_the_code_that_made_it() -> None:
    code = f"import sys, hedgemix.evaluate.evaluator; print({{*sys.modules}} & {{*{FORBIDDEN}}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
