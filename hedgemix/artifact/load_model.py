"""The model that an artifact holds, and its tokenizer."""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor

from hedgemix.artifact.format import Artifact, ArtifactError
from hedgemix.config import ModelConfig, RecipeError, from_dict
from hedgemix.data import tokenizer
from hedgemix.model.transformer import Model
from hedgemix.validate import check_model

LARGEST_CONTEXT = 2**20
LARGEST_VOCABULARY, LARGEST_PIECE_BYTES = 2**16, 1024
PIECE, LARGEST_PART = 10, {18: 2**16, 26: 2**21, 34: 2**20, 42: 2**21}
"""Tags of a SentencePiece model's parts: a piece; training, normalisation, self test, denormalisation, with the most
bytes that each may have."""


def load_model(artifact: Artifact) -> Model:
    """Build the model of an artifact, on the CPU. Raises ArtifactError when header and tensors do not fit together,
    before memory is taken for what the header alone asks for."""
    header, tensors = artifact.header, artifact.tensors
    try:
        config = from_dict(ModelConfig, header["model"])
        given = config, header["vocab_size"], header["context_tokens"]
        if not all(type(number) is int for number in given[1:]) or not 0 < given[2] <= LARGEST_CONTEXT:
            raise ValueError(f"vocab_size and context_tokens are {given[1]!r} and {given[2]!r}")
        check_model(config)
        if config.layers > len(tensors):
            raise ValueError(f"{config.layers} layers in {len(tensors)} tensors")
        for name, shape in largest(config, given[1]).items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)} and should have {shape}")
        bos_id = load_tokenizer(artifact).bos_id() if config.within_documents else None
        if bos_id == -1:
            raise ValueError("its model is one within documents, and its tokenizer has no BOS, which begins them")
        model = Model(*given, draw=False, bos_id=bos_id)
        model.load_state_dict(tensors)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"the artifact's header and tensors do not fit together: {error}") from None
    return model


def largest(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, int]]:
    """List the shapes of the tensors that decide how large a model is: all others are no larger than one of them."""
    width, parts = config.width, {"embedding.weight": (vocab_size, config.width)}
    for layer in range(config.layers):
        parts[f"blocks.{layer}.attention.q.weight"] = width, width
        parts[f"blocks.{layer}.mlp.up.weight"] = config.mlp_hidden, width
    if config.skips:
        parts["skip_weights"] = len(config.passes()) // 2, width
    if config.bigram_buckets:
        parts["bigram.table.weight"] = config.bigram_buckets, config.bigram_width
        parts["bigram.project.weight"] = width, config.bigram_width
    if config.value_embedding_layers:
        parts["value_embedding.table.weight"] = vocab_size, config.value_embedding_width
        parts["value_embedding.project.weight"] = width // config.heads * config.kv_heads, config.value_embedding_width
    return parts


def load_tokenizer(artifact: Artifact) -> SentencePieceProcessor:
    """Load the tokenizer of an artifact. Raises ArtifactError for one that is none, or not of the model's vocabulary,
    or whose pieces are no text or longer than any that is trained."""
    try:
        check_pieces(artifact.tokenizer)
        processor = tokenizer.load(artifact.tokenizer)
        size = processor.vocab_size()
        pieces = processor.id_to_piece(list(range(size)))
        if size != artifact.header["vocab_size"]:
            raise ValueError(f"it has {size:,} pieces, the model {artifact.header['vocab_size']}")
        if max(len(piece.encode()) for piece in pieces) > LARGEST_PIECE_BYTES:
            raise ValueError(f"a piece has more than {LARGEST_PIECE_BYTES:,} bytes")
    except (KeyError, RecipeError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"the artifact's tokenizer cannot be used: {error}") from None
    return processor


def check_pieces(model: bytes) -> None:
    """Walk the messages of a SentencePiece model without reading them: parsed, an empty piece takes a hundred bytes for
    its two. Raises ValueError for more pieces than tokens can number, or larger parts than are ever written."""
    at = pieces = 0
    while at < len(model):
        tag, length, shift = model[at], 0, 0
        while (at := at + 1) < len(model) and shift < 32:
            length |= (model[at] & 127) << shift
            shift += 7
            if model[at] < 128:
                break
        at, pieces = at + 1 + length, pieces + (tag == PIECE)
        if tag not in (PIECE, *LARGEST_PART) or length > LARGEST_PART.get(tag, 2 * LARGEST_PIECE_BYTES):
            raise ValueError(f"it has a part of tag {tag} and {length:,} bytes")
    if pieces > LARGEST_VOCABULARY:
        raise ValueError(f"it has more than {LARGEST_VOCABULARY:,} pieces")
