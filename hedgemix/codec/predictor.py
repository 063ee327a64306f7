"""The distributions that `evaluate` scores with, one token at a time: the step that a coder and its decoder share.

`predict` gives the next token's row from the artifact and the tokens told so far; `update` tells the token, and then
counts, mixing weights and, at the end of a chunk, the model's weights move. Nothing later is known here at all, so what
this gives is decodable by construction. Up to float rounding the rows are those of `evaluate`, which knows the whole
text and works in blocks.

Two predictors agree bitwise on one machine with one thread; see `text_codec` for the conditions.

Shapes as in `hedge`: one position (B = 1), one row set (R = 1), K experts, V vocabulary, M logistic mixers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hedgemix.artifact.format import Artifact
from hedgemix.artifact.load_model import load_model
from hedgemix.config import EvaluateConfig
from hedgemix.data import bpb, tokenizer
from hedgemix.evaluate import scoring_order
from hedgemix.evaluate.ttt import Adapter
from hedgemix.experts import match, registry
from hedgemix.experts.ngram_online import Counts
from hedgemix.mixers import hedge
from hedgemix.mixers.network import Blend, Mixed, Positions, expert_names, join
from hedgemix.model.attention import Cache
from hedgemix.model.transformer import Model
from hedgemix.validate import check_evaluate, check_mixer, check_ttt


class Predictor:
    """Predicts a text token by token. Give it the artifact, the text's length (schedules of test-time training depend
    on it) and its first token."""

    def __init__(self, found: Artifact, n_tokens: int, first_token: int, config: EvaluateConfig) -> None:
        """Raises ArtifactError for an artifact that holds no model, RecipeError for settings that do not fit it,
        ValueError for a token or a length that cannot be."""
        model = load_model(found)
        if n_tokens < 1 or not 0 <= first_token < model.vocab_size:
            raise ValueError(f"{n_tokens} tokens beginning with {first_token}: not a text of {model.vocab_size} tokens")
        check_mixer(config.mixer, registry.EXPERTS)
        check_evaluate(config, model.context_tokens)
        check_ttt(config.ttt, model.context_tokens)
        self.config, self.vocab_size, self.position = config, model.vocab_size, 1
        self.tables = bpb.byte_tables(tokenizer.load(found.tokenizer))
        self.tokens_N = torch.zeros(n_tokens, dtype=torch.int64)
        self.tokens_N[0] = first_token
        self.weights_N = torch.ones(n_tokens)
        self.chunks = scoring_order.chunks(n_tokens, config.chunk_tokens)
        self.adapter = Adapter(model, config.ttt, len(self.chunks), config.dtype) if config.ttt.enabled else None
        self.model = self.adapter.scorer if self.adapter else model
        self.contexts = self._contexts()
        self.targets, self.piece_stop, self.cache = scoring_order.Piece(1, 1), 1, model.start_cache(0)
        self.mixture = Mixture(config, model.vocab_size, first_token)
        self.row: np.ndarray | None = None

    def predict(self) -> np.ndarray:
        """Give the probabilities (V,), float64, of the next token; asked again, the same."""
        if self.row is None:
            self.row = self.mixture.predict(self._neural_row()).double().softmax(0).numpy()
        return self.row

    def update(self, token: int) -> None:
        """Learn the token that `predict` is about; raises ValueError for one that cannot be."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside 0..{self.vocab_size - 1}")
        self.predict()
        self.row = None
        if self.config.ttt.byte_weighted:
            previous = self.tokens_N[self.position - 1 : self.position].numpy()
            self.weights_N[self.position] = float(bpb.token_bytes(self.tables, previous, np.array([token]))[0])
        self.tokens_N[self.position] = token
        self.position += 1
        block = self.config.mixer.block_tokens
        self.mixture.update(token, ends_block=self.position % block == 0 or self.position == self.piece_stop)

    def _contexts(self) -> Iterator[tuple[int, scoring_order.Piece, int]]:
        """Every piece's contexts with the piece's end; between chunks the model learns."""
        for number, chunk in enumerate(self.chunks):
            for piece in scoring_order.pieces(chunk, self.config):
                for begin, targets in scoring_order.contexts(piece, self.config):
                    yield begin, targets, piece.stop
            if self.adapter and number + 1 < len(self.chunks):
                self.adapter.learn(self.tokens_N, self.weights_N, chunk)

    def _neural_row(self) -> Tensor:
        """Log-probabilities (V,) of the next token, float32."""
        begin = self.position - 1
        if self.position == self.targets.stop:
            begin, self.targets, self.piece_stop = next(self.contexts)
            self.cache = self.model.start_cache(self.targets.stop - 1 - begin)
        return next_row(self.model, self.cache, self.tokens_N[begin : self.position], self.config)


@torch.inference_mode()
def next_row(model: Model, cache: Cache, tokens: Tensor, config: EvaluateConfig) -> Tensor:
    """Compute the row (V,) behind the last of `tokens`, which follow those the cache holds; see
    `scoring_order.piece_rows`."""
    band = config.window_tokens if config.order == "streaming" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
        if len(tokens) > 1:
            model.features(tokens[None, :-1], band=band, cache=cache)
        features = model.features(tokens[None, -1:], band=band, cache=cache)
        return torch.log_softmax(model.logits(features)[0, -1], dim=-1)


class Mixture:
    """Does what `batch_mixer.Mixer` does for a whole text, for the one mixture that is the score."""

    def __init__(self, config: EvaluateConfig, vocab_size: int, first_token: int) -> None:
        self.config = config.mixer
        self.counts = Counts(self.config.orders, vocab_size)
        self.follower = match.Follower(self.config.match_lengths, vocab_size)
        self.further = registry.start(self.config.experts, vocab_size)
        self.counts.add(first_token)
        self.follower.update(first_token)
        registry.tell(self.further, [first_token])
        self.blend = Blend(self.config, 1, vocab_size, "cpu")
        size = {"hedge": len(expert_names(self.config)), "ensemble": 1 + len(self.config.gates)}
        over = size.get(self.config.kind, 1)
        self.log_weights_RK = torch.full((1, over), -math.log(over), dtype=torch.float64)
        self.block: list[tuple[Mixed, int]] = []

    def predict(self, neural_V: Tensor) -> Tensor:
        """Mix the log row (V,), float32, of the next token."""
        self.said = self.blend.mix(self._position(neural_V))
        self.team_BRKV = self._team(self.said)
        return hedge.mix(self.log_weights_RK.exp(), self.team_BRKV[0])[0]

    def update(self, token: int, ends_block: bool) -> None:
        """Learn the token that `predict` was about."""
        log_p_RK = self.team_BRKV[0, :, :, token].double()
        self.log_weights_RK = hedge.share_step(log_p_RK, self.log_weights_RK, self.config.hedge_share)
        self.block.append((self.said, token))
        if ends_block:
            self.blend.learn(join([said for said, _ in self.block]), torch.tensor([token for _, token in self.block]))
            self.block = []
        self.counts.add(token)
        self.follower.update(token)
        registry.tell(self.further, [token])

    def _position(self, neural_V: Tensor) -> Positions:
        rows, longest = [row[None] for row in self.counts.rows()], self.counts.longest_class()
        if self.config.match_lengths:
            predicted, matched, confidence = self.follower.predict()
            rows.append(match.rows(rows[-1], torch.tensor([predicted]), torch.tensor([confidence])))
            longest = len(self.counts.followers) + matched if matched else longest
        rows += [registry.row(name, expert)[None] for name, expert in self.further.items()]
        return self.blend.positions(neural_V[None, None], torch.stack(rows, 1), torch.tensor([longest]))

    def _team(self, said: Mixed) -> Tensor:
        """The log rows that the score's mixture is over, (1, 1, K, V): of experts, or of mixers."""
        neural = self.blend.neural(said)
        if self.config.kind == "ensemble":
            return torch.cat([neural, said.log_BRMV], 2)
        team = {"none": neural, "linear": said.log_BRJV[:, :, :1], "logistic": said.log_BRMV[:, :, :1]}
        return self.blend.expert_rows(said) if self.config.kind == "hedge" else team[self.config.kind]
