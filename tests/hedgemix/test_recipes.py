"""Every recipe whole, at a small size: trained, exported, scored, audited, coded and decoded, in this process."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from hedgemix.artifact import format as artifact
from hedgemix.audit import auditor, limits, sandbox
from hedgemix.audit.auditor import Work
from hedgemix.audit.claim import claims
from hedgemix.audit.findings import failed
from hedgemix.audit.plan import Plan
from hedgemix.audit.seconds import check_seconds
from hedgemix.audit.text_bytes import check_bytes
from hedgemix.config import ComputeConfig, DataConfig, Recipe, TTTConfig
from hedgemix.data import shards, tokenizer
from hedgemix.experts.registry import EXPERTS
from hedgemix.model.linear import QAT_LEVELS
from hedgemix.model.transformer import Model
from hedgemix.recipes import RECIPES
from hedgemix.runtime.files import load_tensors
from hedgemix.validate import check_recipe
from pipeline.submission.evidence import AUDITED
from support import cheats, tiny_seed
from support.sound_audit import run_here
from support.text_data import documents, marked_processor

CONTEXT, CODED_TOKENS, SEED = 32, 200, 7
RANKS = {"world-size"}
"""The check that takes processes of its own; the others are made in this one."""
WORK = replace(Work(), witness="support.cheats:testify")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 512 pieces with markers for capitals: 20 documents to train on, the beginnings of others to score."""
    folder, processor = tmp_path_factory.mktemp("text"), marked_processor()
    read = {"train": documents()[20:40], "val": [each[:300] for each in documents()[10:12]]}
    for name, texts in read.items():
        tokens = np.concatenate(tokenizer.encode_batch(processor, texts))
        shards.write_shard(folder / f"{name}_000000.bin", tokens)
    assert (tokens[1:CODED_TOKENS] == processor.bos_id()).any() and len(tokens) > CODED_TOKENS
    (folder / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    return folder


def small(recipe: Recipe, text: Path) -> Recipe:
    """The recipe narrow, shallow and short, with all its parts; its loop is of two layers behind the first. What the
    chosen kind of test-time training does not read is left out. Large first weights, fast steps and their short mean:
    so every part shows in the rows, and the audit sees one that is made otherwise."""
    model, train, evaluate, memory_bytes = recipe.model, recipe.train, recipe.evaluate, recipe.data.memory_bytes
    ttt = TTTConfig(evaluate.ttt.enabled, evaluate.ttt.kind, evaluate.ttt.head)
    assert not ttt.trains_weights
    loop, layers = ((1, 2), 4) if model.looped_layers else ((), min(model.layers, 2))
    return replace(
        recipe,
        data=DataConfig("shards", shards_dir=str(text), vocab_size=512, memory_bytes=min(memory_bytes, 2000)),
        model=replace(
            model, layers=layers, width=32, mlp_hidden=48, rope_dims=32 // model.heads // 2 * 2, bigram_width=16,
            bigram_buckets=min(model.bigram_buckets, 64), value_embedding_width=16, residual_dtype="float32",
            looped_layers=loop, lane_layers=min(model.lane_layers, 1), embedding_std=0.3,
            value_embedding_layers=min(model.value_embedding_layers, layers),
        ),
        train=replace(
            train, steps=3, batch_tokens=4 * CONTEXT, sequence_tokens=CONTEXT, microbatch_sequences=2, warmup_steps=0,
            calibration_sequences=8, log_every_steps=1, dtype="float32", compile=False, ema_decay=0.1, matrix_rate=0.1,
        ),
        evaluate=replace(
            evaluate, window_tokens=CONTEXT, segment_tokens=64, overlap_tokens=CONTEXT, chunk_tokens=192,
            dtype="float32", ttt=ttt, published_ranks=1,
        ),
        compute=ComputeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1, evaluate_workers=1),
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_trained_exported_scored_audited_and_coded(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RECIPES[name]()
    assert whole.recipe == name
    check_recipe(whole, QAT_LEVELS, EXPERTS)
    recipe = small(whole, text)
    check_recipe(recipe, QAT_LEVELS, EXPERTS)
    if any(small(RECIPES[other](), text) == replace(recipe, recipe=other) for other in before(name)):
        return
    monkeypatch.setattr(artifact, "read", lru_cache(artifact.read))
    with cheats.eager():
        [claim] = claims(tiny_seed.make_record(recipe, tmp_path, (SEED,)))
    torch.manual_seed(SEED)
    started = Model(recipe.model, 512, CONTEXT).state_dict()
    trained = load_tensors(claim.training / "weights.pt")
    assert not [name for name, value in trained.items() if value.numel() and torch.equal(value, started[name])]

    work = auditor.start(claim, Plan(seed=5, streamed_tokens=48, coded_tokens=CODED_TOKENS), lambda found: None, WORK)
    with patch.object(sandbox, "run", run_here):
        proof = auditor.prove(work)
        auditor.repeat(work, CODED_TOKENS)
        charged_N = np.concatenate([[np.nan], *work.charges])
        for finding in (
            limits.check_limits(claim),
            limits.unseen(claim, 100, 5, charged_N),
            check_bytes(claim),
            auditor.claimed(work),
            check_seconds(claim),
            auditor.really_coded(work, CODED_TOKENS),
            proof(),
        ):
            work.find(finding)
    assert {found.name for found in work.findings} == set(AUDITED) - RANKS
    assert failed(work.findings) == []
    [coded] = (found for found in work.findings if found.name == "coded")
    assert coded.figures["tokens"] == CODED_TOKENS


def before(name: str) -> list[str]:
    """The recipes before this one: what is the same as one of them at this size is not done twice."""
    return list(RECIPES)[: list(RECIPES).index(name)]
