"""An evaluation behind a memory: fewer bits, the same of every way to score, and only behind its own memory."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from hedgemix.artifact import format as artifact
from hedgemix.codec.text_codec import compress_tokens, decompress_tokens
from hedgemix.config import RecipeError, TTTConfig
from hedgemix.data import memory
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.resume import Restart
from hedgemix.experts import ngram_index
from support import rank_processes, tiny_artifact
from support.text_data import documents, processor
from support.tiny_artifact import CONFIG, CPU, Case

CONFIG = replace(CONFIG, ttt=TTTConfig(enabled=False))
REMEMBERED = [text[:1500] for text in documents()[14:30]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_artifact.make(tmp_path_factory.mktemp("memory"), REMEMBERED)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same without it."""
    return tiny_artifact.make(tmp_path_factory.mktemp("plain"))


def numbers(result: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if not name.endswith("_seconds")}


def test_the_mixture_begins_with_the_memory_and_the_model_does_not(case: Case, plain: Case) -> None:
    found, without = case.score(CONFIG), plain.score(CONFIG)
    assert found.bpb_quantized == without.bpb_quantized and found.bpb_published == without.bpb_published
    assert found.bpb_final < 0.95 * without.bpb_final
    assert (found.scored_tokens, found.scored_bytes) == (without.scored_tokens, without.scored_bytes)


def test_the_index_may_lie_in_a_folder_or_be_made_here(case: Case) -> None:
    work = case.begin(CONFIG)
    for number, chunk in enumerate(work.chunks):
        work.run_chunk(number, chunk)
    assert numbers(work.result()) == numbers(case.score(CONFIG))


def test_a_killed_evaluation_goes_on(case: Case, tmp_path: Path) -> None:
    def killed(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    expected = numbers(case.score(CONFIG))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            case.score(CONFIG, log=killed, start=Restart(tmp_path, 0.0))
    told: list[dict[str, Any]] = []
    assert numbers(case.score(CONFIG, log=told.append, start=Restart(tmp_path, 0.0))) == expected
    assert len(told) < len(case.begin(CONFIG).chunks)


def ranked(rank: int, folder: Path, tokens: np.ndarray) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    result = Case(folder, b"", tokens).score(CONFIG)
    if rank == 0:
        (folder / "bpb").write_text(repr(result.bpb_final))
    dist.destroy_process_group()


def test_two_ranks_give_one_ranks_score(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "ranks")
    rank_processes.run(ranked, (folder, case.tokens))
    assert float((folder / "bpb").read_text()) == pytest.approx(case.score(CONFIG).bpb_final, rel=1e-6)


def test_the_codec_pays_what_the_score_says_and_decodes(case: Case) -> None:
    found, part, config = artifact.read(case.artifact), case.tokens[:240], replace(CONFIG, chunk_tokens=160)
    made, work = compress_tokens(found, part, config), case.begin(config, part)
    for number, chunk in enumerate(work.chunks):
        work.run_chunk(number, chunk)
    reported_bits = work.result().bpb_final * work.result().scored_bytes
    assert made.ideal_bits == pytest.approx(reported_bits, rel=1e-6)
    assert np.array_equal(decompress_tokens(found, made.data), part)


def test_an_index_behind_another_memory_is_refused(case: Case, plain: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(plain.folder, tmp_path / "without")
    shutil.copy(case.artifact, folder / "model.hmx")
    with pytest.raises(RecipeError, match="counts another memory than the artifact's"):
        replace(case, folder=folder).score(CONFIG)
    mixer, other_M = CONFIG.mixer, memory.tokens(processor(), REMEMBERED[:-1])
    shutil.rmtree(folder / "counts")
    arguments = (case.tokens, mixer.orders, processor().vocab_size(), mixer.match_lengths, folder / "counts")
    ngram_index.build(*arguments, memory_M=other_M)
    with pytest.raises(RecipeError, match="counts another memory than the artifact's"):
        replace(case, folder=folder).score(CONFIG)


def test_the_future_changes_no_charge(case: Case) -> None:
    found, changed = artifact.read(case.artifact), case.tokens.copy()
    changed[700:] = (changed[700:] + 1) % processor().vocab_size()
    traces = []
    for tokens in (case.tokens, changed):
        work = Evaluation.begin(found, tokens, CONFIG, CPU)
        traces.append([work.run_chunk(number, chunk)["bits"] for number, chunk in enumerate(work.chunks[:2])])
    assert traces[0] == traces[1] and work.chunks[1].stop <= 700
