"""The model that an artifact holds."""

from __future__ import annotations

from hedgemix.artifact.format import Artifact, ArtifactError
from hedgemix.config import ModelConfig, from_dict
from hedgemix.model.transformer import Model


def load_model(artifact: Artifact) -> Model:
    """Build the model of an artifact, on the CPU. Raises ArtifactError when header and tensors do not fit together."""
    header = artifact.header
    try:
        config = from_dict(ModelConfig, header["model"])
        model = Model(config, header["vocab_size"], header["context_tokens"], draw=False)
        model.load_state_dict(artifact.tensors)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"the artifact's header and tensors do not fit together: {error}") from None
    return model
