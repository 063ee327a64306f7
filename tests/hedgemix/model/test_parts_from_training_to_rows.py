"""Every part that is off by default, at a tiny size: trained, exported, read again, and run in every way that rows are
made."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.codec.model_step import ModelStep
from hedgemix.config import EvaluateConfig, QuantizeConfig
from hedgemix.evaluate import scoring_order
from hedgemix.evaluate.scoring_order import Piece
from hedgemix.model.transformer import Model
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.quantizer import quantize_model
from hedgemix.runtime.files import load_tensors
from hedgemix.train.trainer import train
from tests.hedgemix.train.test_trainer import CPU, MODEL, VOCAB, recipe, write_data

PARTS: dict[str, dict[str, Any]] = {
    "head gates": {"head_gates": True},
    "smear by input": {"smear_by": "input"},
    "a loop": {"looped_layers": (0,)},
    "skip gates": {"skip_gates": True},
    "lanes": {"lane_layers": 1},
    "zero outputs": {"zero_outputs": True},
}
STREAMED = EvaluateConfig(window_tokens=32, segment_tokens=20, overlap_tokens=60, dtype="float32")


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_part_is_trained_exported_and_scored(parts: dict[str, Any], tmp_path: Path) -> None:
    config = replace(MODEL, **parts)
    train(recipe(config, steps=3, loop_from_fraction=0.5), write_data(tmp_path), 7, tmp_path, CPU)
    model = Model(config, VOCAB, 32)
    model.load_state_dict(load_tensors(tmp_path / "weights.pt"))
    started = Model(config, VOCAB, 32).state_dict()
    assert all(not torch.equal(value, started[name]) for name, value in model.state_dict().items())
    moments = Moments(**load_tensors(tmp_path / "moments.pt"))
    tensors, _ = quantize_model(model, moments, QuantizeConfig(loss_nats=0.01), 10**9, lambda _: 0)
    header = {"model": asdict(config), "vocab_size": VOCAB, "context_tokens": 32}
    artifact.write(tmp_path / "model.hmx", header, b"", tensors, 3)
    loaded = load_model(artifact.read(tmp_path / "model.hmx"))
    assert loaded.config == config
    tokens = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = torch.cat([
            scoring_order.piece_rows(loaded, tokens, piece, STREAMED)
            for piece in scoring_order.pieces(Piece(1, 60), STREAMED)
        ])  # fmt: skip
        whole = loaded.logits(loaded.features(tokens[None, :-1], band=32))[0].log_softmax(-1)
        cache, step = loaded.start_cache(59), ModelStep(loaded)
        loaded.features(tokens[None, :1], band=32, cache=cache)
        cached = [step(cache, int(tokens[t - 1]), int(tokens[t]), 32)[0] for t in range(1, 59)]
    torch.testing.assert_close(torch.stack(cached), whole[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-5)  # each segment is behind all that comes before
