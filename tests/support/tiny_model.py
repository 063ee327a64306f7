"""A model small enough to be trained in a test and quantized in many ways."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hedgemix.artifact import tensors as artifact_tensors
from hedgemix.artifact.tensors import Stepped, Stored
from hedgemix.config import ModelConfig, TrainConfig
from hedgemix.data.dataloader import Batches
from hedgemix.data.shards import TokenStream
from hedgemix.model.transformer import Model
from hedgemix.quantize.calibration import Moments, calibrate

VOCAB, SEQUENCES, LENGTH, CPU = 300, 24, 64, torch.device("cpu")
SETTINGS = TrainConfig(sequence_tokens=LENGTH, calibration_sequences=SEQUENCES, microbatch_sequences=8, dtype="float32")


class Trained(NamedTuple):
    model: Model
    inputs: Tensor
    targets: Tensor
    moments: Moments
    batches: Batches


def make(**parts: Any) -> Trained:
    """A small model that has learned a random Markov chain, with its calibration."""
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2, width=64, heads=4, kv_heads=2, mlp_hidden=1040, rope_dims=8, embedding_std=0.05,
        bigram_buckets=1100, bigram_width=64, value_embedding_layers=1, value_embedding_width=16,
    )  # fmt: skip
    model = Model(replace(config, **parts), VOCAB, LENGTH)
    followers, text = torch.randint(VOCAB, (VOCAB, 3)), [0]
    for choice in torch.randint(3, (SEQUENCES * LENGTH,)).tolist():
        text.append(int(followers[text[-1], choice]))
    stream = TokenStream([torch.tensor(text).numpy().astype("uint16")])
    batches = Batches(stream, LENGTH, 8, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(40):
        optimizer.zero_grad()
        (model(*batches.read(batches.indices(step), CPU)) / (8 * LENGTH)).backward()
        optimizer.step()
    inputs, targets = batches.read(Batches(stream, LENGTH, SEQUENCES, seed=0).indices(0), CPU)
    return Trained(model, inputs, targets, calibrate(model, batches, SETTINGS, CPU), batches)


def restored(model: Model, tensors: dict[str, Any]) -> Model:
    """A copy of the model with what decoding the tensors gives."""

    def decoded(tensor: Any) -> Tensor:
        if isinstance(tensor, Stepped):
            return artifact_tensors.stepped_weights(tensor)
        return artifact_tensors.dequantize(tensor.codes, tensor.scale) if isinstance(tensor, Stored) else tensor.float()

    model = copy.deepcopy(model)
    model.load_state_dict({name: decoded(tensor) for name, tensor in tensors.items()})
    return model
