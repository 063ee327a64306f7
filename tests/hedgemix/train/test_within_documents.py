"""Training within documents: a step is the sum of steps on each alone, and what cannot be is refused or run slowly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from hedgemix.config import RecipeError
from hedgemix.data import shards
from hedgemix.data.dataset import Dataset
from hedgemix.train.schedule import StepKind
from hedgemix.train.trainer import build
from support.text_data import without_spaces
from tests.hedgemix.train.test_trainer import CPU, MODEL, recipe, write_data

PLAIN = StepKind(qat=False, looped=True, pieces=1)
WITHIN, BOS = recipe(replace(MODEL, within_documents=True)), 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_data(tmp_path_factory.mktemp("data"))


def with_tokenizer(data: Dataset, folder: Path, model: bytes) -> Dataset:
    (folder / "tokenizer.model").write_bytes(model)
    return replace(data, tokenizer=str(folder / "tokenizer.model"))


def test_a_step_within_documents_is_one_on_each_alone(data: Dataset, tmp_path: Path) -> None:
    """Loss and gradient, of what a row has of a document; the tokenizer says what begins one. Of a document longer than
    a row each row's part is one of its own."""
    run = build(WITHIN, with_tokenizer(data, tmp_path, without_spaces()), 7, CPU)
    loss, gradient, begun = run.backward(0, PLAIN), run.gradient.buffer.clone(), 0
    model, expected, longer = run.model, 0.0, 0
    run.gradient.zero()
    for inputs, targets in run.read(0):
        for row, target in zip(inputs, targets, strict=True):
            inside = [at for at in range(1, 32) if row[at] == BOS]
            begun += len(inside)
            for a, b in itertools.pairwise([0, *inside, 32]):
                alone = model(row[None, a:b], target[None, a:b]) / 256
                alone.backward()
                expected += alone.item()
            longer += not inside and int(row[0]) != BOS
    run.read.close()
    assert begun > 2 and longer > 2 and float(loss) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(run.gradient.buffer, gradient, rtol=1e-4, atol=1e-7)


def test_rows_of_too_many_documents_for_a_compiled_graph_are_run_without_it(data: Dataset, tmp_path: Path) -> None:
    rows = np.full(33 * 8, 5)
    rows[:32:2] = BOS  # one row has 16, and four rows have places for 8
    shards.write_shard(tmp_path / "crowded.bin", rows)
    data = replace(with_tokenizer(data, tmp_path, without_spaces()), train_shards=(str(tmp_path / "crowded.bin"),))
    run, compiled = build(WITHIN, data, 7, CPU), list[int]()

    def loss(tokens: Tensor, targets: Tensor, qat: bool, looped: bool) -> Tensor:
        compiled.append(int((tokens == BOS).sum()))
        return model(tokens, targets, qat, looped)

    model, run.loss = run.model, loss
    run.read.largest = 4
    found = run.backward(0, PLAIN)
    expected = sum(float(model(*pair).detach()) / 256 for pair in run.read(0))
    run.read.close()
    assert compiled == [0] and float(found) == pytest.approx(expected, rel=1e-6)


def test_documents_of_a_tokenizer_without_bos_are_refused(data: Dataset, tmp_path: Path) -> None:
    found = sentencepiece_model_pb2.ModelProto.FromString(without_spaces())
    found.pieces[1].piece = "<other>"
    with pytest.raises(RecipeError, match="model.within_documents needs documents that begin with BOS"):
        build(WITHIN, with_tokenizer(data, tmp_path, found.SerializeToString()), 7, CPU)
