"""The distributions that `evaluate` scores with, one token at a time: the step that a coder and its decoder share.

`predict` gives the next token's row from the artifact and the tokens told so far; `update` tells the token, and then
counts, mixing weights and, at the end of a chunk, the model's weights move. Nothing later is known here at all, so what
this gives is decodable by construction. Up to float rounding the rows are those of `evaluate`, which knows the whole
text and works in blocks.

Two predictors agree bitwise on one machine with one thread; see `text_codec` for the conditions.

Shapes: N tokens of the text, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hedgemix.artifact.format import Artifact
from hedgemix.artifact.load_model import load_model, load_tokenizer
from hedgemix.codec.model_step import ModelStep
from hedgemix.config import EvaluateConfig
from hedgemix.data import bpb, memory
from hedgemix.evaluate import scoring_order
from hedgemix.evaluate.evaluator import Evaluation
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import registry
from hedgemix.experts.feature_experts import names, start_experts
from hedgemix.mixers.online_mixer import OnlineMixer
from hedgemix.model.layers import autocast
from hedgemix.validate import check_cache, check_evaluate, check_mixer, check_ttt

EDGE = 1e-4
"""Of a bucket of neural entropy: so near to its edge, rounding one token at a time may choose another weight set than
rounding in blocks does, and rows that would agree to 1e-6 do not. The row is then made as `evaluate` makes it."""


class Predictor:
    """Predicts a text token by token. Give it the artifact, the text's length (schedules of test-time training depend
    on it) and its first token."""

    def __init__(
        self,
        found: Artifact,
        n_tokens: int,
        first_token: int,
        config: EvaluateConfig,
        after: Evaluation | None = None,
        most_tokens: int = 0,
    ) -> None:
        """after: the evaluation of the text's beginning, of whole pieces, to go on behind. most_tokens: that it will be
        told, when these are fewer; memory is taken for them alone. Raises ArtifactError for an artifact that holds no
        model, RecipeError for settings that do not fit it, ValueError for a token or a length that cannot be."""
        model = load_model(found)
        if n_tokens < 1 or not 0 <= first_token < model.vocab_size:
            raise ValueError(f"{n_tokens} tokens beginning with {first_token}: not a text of {model.vocab_size} tokens")
        check_mixer(config.mixer, registry.EXPERTS)
        check_evaluate(config, model.context_tokens)
        check_ttt(config.ttt, model.context_tokens)
        check_cache(config.cache)
        told_B = np.array([first_token]) if after is None else after.tokens_N.read(slice(None)).astype(np.int64)
        self.config, self.vocab_size, self.position = config, model.vocab_size, len(told_B)
        processor = load_tokenizer(found)
        self.tables = bpb.byte_tables(processor)
        self.most_tokens = most_tokens or n_tokens
        self.tokens_N = torch.zeros(self.most_tokens, dtype=torch.int64)
        self.tokens_N[: len(told_B)] = torch.from_numpy(told_B)
        self.weights_N = torch.ones(self.most_tokens)
        self._weigh(1, len(told_B))
        self.chunks = scoring_order.chunks(n_tokens, config.chunk_tokens)
        self.adapter = Adapter(model, config.ttt, len(self.chunks), config.dtype) if config.ttt.trains_weights else None
        if self.adapter and after is not None and after.adapter:
            self.adapter.load_state_dict(copy.deepcopy(after.adapter.state_dict()))
        self.experts = start_experts(config, model)
        if self.experts and after is not None and after.experts:
            self.experts.load_state_dict(copy.deepcopy(after.experts.state_dict()))
        self.model = self.adapter.scorer if self.adapter else model
        self.step = ModelStep(self.model) if config.dtype == "float32" else None
        self.contexts = self._contexts()
        self.targets, self.cache = scoring_order.Piece(1, self.position), model.start_cache(0)
        self.piece = self.targets
        memory_M = memory.tokens(processor, found.memory)
        self.mixer = OnlineMixer(config.mixer, model.vocab_size, told_B, names(config), memory_M)
        if after is not None:
            self.mixer.go_on(after.mixer.sets[0], after.best)
        self.row_V: np.ndarray | None = None

    def predict(self) -> np.ndarray:
        """Give the probabilities (V,), float64, of the next token; asked again, the same."""
        p_V = np.exp(self.log_row().astype(np.float64))
        return p_V / p_V.sum()

    def log_row(self) -> np.ndarray:
        """Give the log probabilities (V,), float32, of the next token; asked again, the same."""
        if self.row_V is None:
            neural_V, feature_D = self._neural_row()
            given = self.experts.predict(neural_V, feature_D) if self.experts else {}
            self.row_V = self.mixer.predict(neural_V, given)
        return self.row_V

    def update(self, token: int) -> None:
        """Learn the token that `predict` is about; raises ValueError for one that cannot be."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside 0..{self.vocab_size - 1}")
        self.log_row()
        self.row_V = None
        tokens_N = self.tokens_N.numpy()
        tokens_N[self.position] = token
        self._weigh(self.position, self.position + 1)
        self.position += 1
        block = self.config.mixer.block_tokens
        if self.experts:
            self.experts.update(token)
        self.mixer.update(token, ends_block=self.position % block == 0 or self.position == self.piece.stop)

    def _weigh(self, start: int, stop: int) -> None:
        """Note what these tokens count when the model learns."""
        if self.config.ttt.byte_weighted:
            sizes_B = bpb.token_bytes(self.tables, self.tokens_N.numpy(), start, stop)
            self.weights_N[start:stop] = torch.from_numpy(sizes_B.astype(np.float32))

    def _contexts(self) -> Iterator[tuple[int, scoring_order.Piece, scoring_order.Piece]]:
        """Every piece's contexts with the piece; between chunks the model learns."""
        for number, chunk in enumerate(self.chunks):
            if chunk.stop <= self.position:
                continue
            told = scoring_order.Piece(chunk.start, min(chunk.stop, self.most_tokens))
            for piece in scoring_order.pieces(told, self.config):
                for begin, targets in scoring_order.contexts(piece, self.config):
                    if targets.stop > self.position:
                        yield begin, targets, piece
            if self.adapter and number + 1 < len(self.chunks):
                self.adapter.learn(self.tokens_N, self.weights_N, chunk)

    def _neural_row(self) -> tuple[Tensor, Tensor]:
        """Compute log probabilities (V,), float32, of the next token, and the features (D,) they come from."""
        begin = self.position - 1
        if self.position == self.targets.stop:
            begin, self.targets, self.piece = next(self.contexts)
            self.cache = self.model.start_cache(self.targets.stop - 1 - begin)
        neural_V, feature_D = self._next_row(begin)
        # As `entropy_buckets` in less time, and to 1e-5.
        log_row_V = neural_V.numpy()
        entropy = -float((np.exp(log_row_V) * log_row_V).sum()) / math.log(self.vocab_size)
        buckets = entropy * (self.config.mixer.entropy_sets + 1)
        if abs(buckets - round(buckets)) < EDGE:
            # What is not told yet is 0 in tokens_N, and no row rests on it: the model is causal.
            rows_BV = scoring_order.piece_rows(self.model, self.tokens_N, self.piece, self.config)
            neural_V = rows_BV[self.position - self.piece.start]
        return neural_V, feature_D

    def _next_row(self, begin: int) -> tuple[Tensor, Tensor]:
        """Run the tokens from `begin` on, which follow those the cache holds; see `scoring_order.chunk_rows`."""
        config, cache, fresh = self.config, self.cache, self.position - begin
        band = config.window_tokens if config.order == "streaming" else None
        tokens_N = self.tokens_N.numpy()
        previous, token = int(tokens_N[max(self.position - 2, 0)]), int(tokens_N[self.position - 1])
        if self.step and cache.length and fresh == 1:
            return self.step(cache, previous, token, band)
        tokens_B = self.tokens_N[begin : self.position]
        with torch.inference_mode(), autocast(config.dtype, tokens_B.device):
            if fresh > 1:
                self.model.features(tokens_B[None, :-1], band=band, cache=cache)
            if self.step and cache.length:
                return self.step(cache, previous, token, band)
            features = self.model.features(tokens_B[None, -1:], band=band, cache=cache)
            return torch.log_softmax(self.model.logits(features)[0, -1], dim=-1), features[0, -1]
