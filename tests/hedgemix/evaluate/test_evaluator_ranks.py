"""Two real processes score what one scores: the number of ranks changes the speed, not the bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hedgemix.config import EvaluateConfig
from hedgemix.evaluate.scoring_order import chunks, pieces
from hedgemix.experts.registry import EXPERTS
from hedgemix.runtime.files import read_json, write_json
from support import rank_processes, tiny_artifact
from support.tiny_artifact import ADAPTIVE, CACHE_OVER_TRAINED, CONFIG, Case

# Three pieces a chunk; some steps have one sequence, so that rank 1 has nothing to learn from.
STREAMING = replace(CONFIG, segment_tokens=128)
SLIDING = replace(CONFIG, order="sliding", batch_windows=14, ttt=replace(CONFIG.ttt, polyak=0.0, last_blocks=0))
FURTHER = replace(STREAMING, mixer=replace(CONFIG.mixer, experts=tuple(EXPERTS)))
RUNS: dict[str, EvaluateConfig] = {
    "streaming": STREAMING,
    "sliding": SLIDING,
    "further": FURTHER,
    "adaptive": replace(ADAPTIVE, segment_tokens=128),
    "cache over trained weights": replace(CACHE_OVER_TRAINED, segment_tokens=128),
    "within documents": STREAMING,
}
SECONDS = ("evaluate_seconds", "scoring_seconds", "mixing_seconds", "ttt_seconds")


def score(case: Case, folder: Path, rank: int) -> None:
    """Every run's result and trace, of one rank."""
    for name, config in RUNS.items():
        scored = replace(case, folder=case.folder / "within") if name == "within documents" else case
        result = asdict(scored.score(config, trace=folder / f"{name}_trace{rank}.jsonl"))
        write_json(folder / f"{name}{rank}.json", {key: result[key] for key in result if key not in SECONDS})


def work(rank: int, case: Case, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting, limit = f"file://{folder}/meeting", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    try:
        score(case, folder, rank)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An artifact, and in a folder of it another, of a model within documents."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "within").mkdir()
    tiny_artifact.make(folder / "within", texts=3, config=tiny_artifact.WITHIN_DOCUMENTS)
    return tiny_artifact.make(folder, texts=3)


@pytest.fixture(scope="module")
def folders(case: Case) -> Iterator[tuple[Path, Path]]:
    """What one process and what two left."""
    one, two, threads = case.folder / "one", case.folder / "two", torch.get_num_threads()
    two.mkdir()
    torch.set_num_threads(1)
    score(case, one, 0)
    torch.set_num_threads(threads)
    rank_processes.run(work, (case, two))
    yield one, two


def trace(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}_trace0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_the_ranks_shares_are_uneven(case: Case, name: str) -> None:
    found = [len(pieces(chunk, RUNS[name])) for chunk in chunks(len(case.tokens), CONFIG.chunk_tokens)]
    assert any(count % 2 for count in found)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_score_as_one(folders: tuple[Path, Path], name: str) -> None:
    """To the bit with the shipped weights. Gradients are summed in another order: measured, relative, 1e-8 in bpb."""
    one, two = (read_json(folder / f"{name}0.json") for folder in folders)
    for key in ("bpb_quantized", "bpb_mixed", "scored_tokens", "scored_bytes", "expert_names", "ensemble_names"):
        assert two[key] == one[key], key
    for key in set(one) - {
        "expert_names",
        "ensemble_names",
        "ensemble_weights",
    }:  # the trace's weights are compared below
        assert two[key] == pytest.approx(one[key], rel=1e-6), key
    assert one["bpb_ttt"] < one["bpb_quantized"] - 0.005


@pytest.mark.parametrize("name", RUNS)
def test_chunks_of_two_ranks_are_those_of_one(folders: tuple[Path, Path], name: str) -> None:
    """Measured, relative: 1e-8 in a chunk's bits."""
    one, two = (trace(folder, name) for folder in folders)
    assert len(one) == len(two) > 2
    for mine, expected in zip(two, one, strict=True):
        assert all(mine[key] == expected[key] for key in ("chunk", "tokens", "bytes"))
        assert mine["bits"] == pytest.approx(expected["bits"], rel=1e-6)
        for name in ("hedge", "ensemble"):
            assert mine["weights"][name] == pytest.approx(expected["weights"][name], rel=1e-4, abs=1e-6)
    assert two[0]["bits"] == one[0]["bits"]  # nothing was learned yet


@pytest.mark.parametrize("name", RUNS)
def test_ranks_agree_to_the_bit_and_rank_0_writes(folders: tuple[Path, Path], name: str) -> None:
    folder = folders[1]
    assert read_json(folder / f"{name}0.json") == read_json(folder / f"{name}1.json")
    assert not (folder / f"{name}_trace1.jsonl").exists()
