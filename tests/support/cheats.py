"""Evaluations with one fault each, for the audit to catch, and a stand-in for a codec."""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from hedgemix.audit import commitment, replay
from hedgemix.codec.predictor import Predictor
from hedgemix.data.shards import TokenStream
from hedgemix.evaluate import evaluator
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.scoring_order import FEATURES, Piece
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import ngram
from hedgemix.experts.neural_cache import NeuralCache
from hedgemix.mixers import logistic, published
from hedgemix.mixers.batch_mixer import BatchMixer
from hedgemix.model.transformer import Model

SECRET = Path(__file__).resolve().parent.parent.parent / "LICENSE"


@contextmanager
def eager() -> Iterator[None]:
    """Of the published rule few buckets, and counts that are used from the second chunk on. No fault."""
    with patch.object(published, "start", partial(published.start, buckets=64, warm_tokens=100)):
        yield


def testify(log: Any, **given: Any) -> None:
    with eager():
        replay.testify(log=log, **given)


def score_rank(log: Any, **given: Any) -> dict[str, Any]:
    with eager():
        return replay.score_rank(log=log, **given)


@contextmanager
def unnormalised() -> Iterator[None]:
    """A mixer whose row adds up to 1.01."""
    logistic_rows = logistic.rows

    def more(*given: Any) -> Tensor:
        return logistic_rows(*given) + math.log(1.01)

    with patch.object(logistic, "rows", more):
        yield


def leaning(ahead: int, every: int = 1, start: int = 1) -> Callable[..., Any]:
    """Neural rows that are distributions and lean towards the token `ahead` of their own, at one position in `every`
    from `start` on."""
    chunk_rows = evaluator.chunk_rows

    def rows(models: dict[str, Model], tokens_N: Tensor, chunk: Piece, *rest: Any) -> Iterator[Any]:
        for piece, found in chunk_rows(models, tokens_N, chunk, *rest):
            text_N = tokens_N[: len(tokens_N)]
            known_B1 = text_N[(torch.arange(piece.start, piece.stop) + ahead).clamp(max=len(tokens_N) - 1), None]
            at_B = torch.arange(piece.start, piece.stop)
            leans_B1 = ((at_B % every == 0) & (at_B >= start)).float()[:, None]
            for name, rows_BV in found.items():
                if name == FEATURES:
                    continue
                found[name] = rows_BV.scatter_add(1, known_B1, leans_B1).log_softmax(-1)
            yield piece, found

    return rows


@contextmanager
def knows_target() -> Iterator[None]:
    """An expert that looks at the target: a hash table keyed by context and target does so."""
    with patch.object(evaluator, "chunk_rows", leaning(0)):
        yield


@contextmanager
def knows_future() -> Iterator[None]:
    with patch.object(evaluator, "chunk_rows", leaning(1)):
        yield


@contextmanager
def knows_one_in_33() -> Iterator[None]:
    """Too few for positions that are drawn."""
    with patch.object(evaluator, "chunk_rows", leaning(0, every=33)):
        yield


@contextmanager
def knows_the_last_chunk() -> Iterator[None]:
    with patch.object(evaluator, "chunk_rows", leaning(0, start=2 * 320)):
        yield


@contextmanager
def honest_where(known: Sequence[Piece]) -> Iterator[None]:
    """Who knows beforehand what will be looked at charges a tenth less everywhere else."""
    score = BatchMixer.score

    def changed(mixer: Any, log_rows: dict[str, Tensor], start: int, stop: int) -> Any:
        scores = score(mixer, log_rows, start, stop)
        seen_B = torch.tensor([any(each.start <= t < each.stop for each in known) for t in range(start, stop)])
        for nll in scores.nll.values():
            nll[mixer.kind] = torch.where(seen_B, nll[mixer.kind], 0.9 * nll[mixer.kind])
        return scores

    with patch.object(BatchMixer, "score", changed):
        yield


@contextmanager
def charging(change: Callable[[dict[str, Tensor]], Tensor]) -> Iterator[None]:
    """The score's charges (B,) are made of all kinds' charges."""
    score = BatchMixer.score

    def changed(mixer: Any, *given: Any) -> Any:
        scores = score(mixer, *given)
        for nll in scores.nll.values():
            nll[mixer.kind] = change(nll)
        return scores

    with patch.object(BatchMixer, "score", changed):
        yield


def hard_tokens_uncharged() -> AbstractContextManager[None]:
    return charging(lambda nll: torch.where(nll["ensemble"] < 6, nll["ensemble"], 0.0))


def better_of_two() -> AbstractContextManager[None]:
    """Each token is charged what suits it."""
    return charging(lambda nll: torch.minimum(nll["ensemble"], nll["logistic"]))


@contextmanager
def heavy_at_few() -> Iterator[None]:
    """Rows that add up to 1.01 at one position in 50, and charges that are so much lower."""
    log_row = Predictor.log_row

    def heavier(predictor: Predictor) -> np.ndarray:
        return log_row(predictor) + np.float32(math.log(1.01) * (predictor.position % 50 == 0))

    on_charge = replay.Witness.on_charge

    def lower(witness: Any, work: Evaluation, piece: Piece, charges: dict[str, Tensor]) -> None:
        on_charge(witness, work, piece, charges)
        at = np.arange(piece.start, piece.stop)
        witness.nats_N[at[at % 50 == 0]] -= math.log(1.01)

    with patch.object(Predictor, "log_row", heavier), patch.object(replay.Witness, "on_charge", lower):
        yield


@contextmanager
def remembering() -> Iterator[None]:
    """Who reads a text keeps the first one of the process, and both the evaluation's rows and the predictor's lean
    towards it ever after."""
    kept: list[np.ndarray] = []
    read, log_row, lean = TokenStream.read, Predictor.log_row, leaning(0)

    def keeping(stream: Any, *given: Any) -> np.ndarray:
        tokens = read(stream, *given)
        kept.append(tokens.astype(np.int64))
        return tokens

    def knowing(predictor: Predictor) -> np.ndarray:
        if not kept:
            return log_row(predictor)
        row_V = torch.from_numpy(log_row(predictor).copy())
        row_V[kept[0][predictor.position]] += 1
        return row_V.log_softmax(0).numpy()

    with (
        patch.object(TokenStream, "read", keeping),
        patch.object(Predictor, "log_row", knowing),
        patch.object(evaluator, "chunk_rows", lean),
    ):
        yield


def remembering_witness(log: Any, **given: Any) -> None:
    with eager(), remembering():
        replay.testify(log=log, **given)


def remembering_predictor(log: Any, **given: Any) -> None:
    with eager(), remembering():
        commitment.commit(log=log, **given)


def impatient_predictor(pipe: list[int], log: Any, **given: Any) -> dict[str, Any]:
    """Looks for each token before it commits a row, for as long as it may take."""
    log_row, ready = Predictor.log_row, []

    def waiting(predictor: Predictor) -> np.ndarray:
        if predictor.row_V is None:  # else the row was committed, and what comes next may be told
            ready.append(len(select.select([pipe[1]], [], [], 0.02)[0]))
        return log_row(predictor)

    with eager(), patch.object(Predictor, "log_row", waiting):
        commitment.commit(pipe=pipe, log=log, **given)
    return {"ready": sum(ready), "asked": len(ready)}


@contextmanager
def counted_early() -> Iterator[None]:
    """Unigram counts that hold a position's own token when its row is made."""

    def early(unigram_V: Tensor, token_B: Tensor, start: int) -> Tensor:
        hot_BV = torch.nn.functional.one_hot(token_B, len(unigram_V))
        count_BV = unigram_V + hot_BV.cumsum(0) + 1
        return count_BV / count_BV.sum(1, keepdim=True)

    with patch.object(ngram, "_unigram_rows", early):
        yield


@contextmanager
def remembers_itself() -> Iterator[None]:
    """A neural cache in which a position's own token has a weight when its row is made."""
    start = NeuralCache.__init__

    def knowing(cache: NeuralCache, *given: Any, **options: Any) -> None:
        start(cache, *given, **options)
        own_B = torch.arange(cache.block)
        cache.fade_KB[cache.memory + own_B, own_B] = math.exp(-cache.theta)

    with patch.object(NeuralCache, "__init__", knowing):
        yield


@contextmanager
def scored_twice() -> Iterator[None]:
    """The last piece of each chunk is scored again once the mixture has learned it, and charged again."""
    chunk_rows, score = evaluator.chunk_rows, BatchMixer.score

    def rows(models: dict[str, Model], tokens_N: Tensor, chunk: Piece, *rest: Any) -> Iterator[Any]:
        for piece, found in chunk_rows(models, tokens_N, chunk, *rest):
            yield piece, found
        yield piece, found

    def again(mixer: Any, log_rows: dict[str, Tensor], start: int, stop: int) -> Any:
        if start < mixer.position:
            mixer._state.ngrams = mixer.before
        mixer.before = copy.deepcopy(mixer._state.ngrams)
        return score(mixer, log_rows, start, stop)

    with patch.object(evaluator, "chunk_rows", rows), patch.object(BatchMixer, "score", again):
        yield


@contextmanager
def learned_first() -> Iterator[None]:
    """Test-time training reads a chunk before it is scored."""
    run_chunk = Evaluation.run_chunk

    def early(work: Evaluation, number: int, chunk: Piece) -> Any:
        assert work.adapter
        work.adapter.learn(work.tokens_N, work.weights_N, chunk)
        return run_chunk(work, number, chunk)

    with patch.object(Evaluation, "run_chunk", early):
        yield


@contextmanager
def moved_unseen() -> Iterator[None]:
    """Weights that move while a chunk is scored."""
    score = Evaluation.score

    def moving(work: Evaluation, piece: Piece, rows: dict[str, Tensor]) -> None:
        score(work, piece, rows)
        assert work.adapter
        with torch.no_grad():
            for parameter in work.adapter.scorer.parameters():
                parameter.mul_(1.01)

    with patch.object(Evaluation, "score", moving):
        yield


@contextmanager
def reads_more() -> Iterator[None]:
    """An evaluation that opens a file beside the artifact and the text."""
    begin = replay.begin

    def reading(*given: Any) -> Any:
        SECRET.read_bytes()
        return begin(*given)

    with patch.object(replay, "begin", reading):
        yield


def reading_witness(log: Any, **given: Any) -> None:
    with eager(), reads_more():
        replay.testify(log=log, **given)


def differing_rank(rank: int, log: Any, **given: Any) -> dict[str, Any]:
    """Ranks that do not add their gradients up the same way."""
    learn = Adapter.learn

    def alone(adapter: Adapter, *rest: Any) -> None:
        learn(adapter, *rest)
        with torch.no_grad():
            for parameter in adapter.scorer.parameters():
                parameter.mul_(1 + 0.01 * rank)

    with eager(), patch.object(Adapter, "learn", alone):
        return replay.score_rank(rank=rank, log=log, **given)


def compress(source: dict[str, Any], log: Any) -> dict[str, Any]:
    """In place of a codec: the tokens as they are, and the bits that one would need."""
    read = replay.Source(**source)
    tokens_N = read.read()
    witness = replay.Witness(read.claim, len(tokens_N))
    with eager():
        replay.play(replay.begin(read, tokens_N, witness))
    data, bits = tokens_N.astype("<u2").tobytes(), float(witness.nats_N[1:].sum()) / math.log(2)
    return {"data": base64.b64encode(data).decode(), "payload_bits": math.ceil(bits) + 32, "ideal_bits": bits}


def decompress(artifact_path: str, data_path: str, threads: int, log: Any) -> dict[str, Any]:
    data = Path(data_path).read_bytes()
    return {"tokens": len(np.frombuffer(data, "<u2")), "sha256": hashlib.sha256(data).hexdigest()}
