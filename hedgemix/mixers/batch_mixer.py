"""The mixtures an evaluation scores with: experts, Hedge, linear and logistic mixers, and Hedge over the logistic ones.

Several models (frozen and adapted, say) score the same tokens: n-gram rows are made once for all of them, and each
row set has mixing weights of its own. Rows of further experts may be given with those of the models; row sets that are
`plain` are mixed without them, so that one pass tells what they are worth. Positions are worked in blocks that start at
multiples of `block_tokens`, so a score does not depend on how calls cut the text as long as they cut at such multiples.

Shapes as in `hedge`: B positions, R row sets, K experts (0 is neural), V vocabulary, M logistic mixers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hedgemix.config import MixerConfig, RecipeError
from hedgemix.data.shards import PIECE_TOKENS
from hedgemix.experts import match, ngram_index, registry
from hedgemix.experts.device_index import Resident
from hedgemix.experts.ngram import NgramRows
from hedgemix.mixers.row_sets import RowSets
from hedgemix.mixers.span import Memory
from hedgemix.runtime.cuda_graph import record_graph
from hedgemix.validate import check_mixer

SPAN_TOKENS = {"cpu": 512, "cuda": 4096}
"""Positions whose n-gram rows are made at once: cache size on a CPU, launches on a GPU. Changes no score."""


@dataclass
class Scores:
    """Holds what one call scored: `nll[row set][kind]` in nats, (B,) float64, and the weights it ended with.

    Kinds: neural, order1 ..., match, the further experts, the given ones, hedge, linear and logistic (the first mixer
    of each), ensemble. `weights[row set]`: hedge (K,) over the experts, ensemble (1 + M,) over neural and the logistic
    mixers, linear (L, S, K), logistic (M, S, J), see `network`.
    """

    nll: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, Tensor]]


@dataclass
class _State:
    ngrams: NgramRows | Resident
    further: dict[str, registry.Expert]


class BatchMixer:
    """Scores and learns one text under all mixtures; call `score` with rising, adjoining spans."""

    def __init__(
        self,
        config: MixerConfig,
        vocab_size: int,
        index: ngram_index.NgramIndex,
        device: torch.device | str = "cpu",
        names: tuple[str, ...] = ("neural",),
        span_tokens: int = 0,
        resident: bool | None = None,
        graph: bool | None = None,
        given: tuple[str, ...] = (),
        plain: Sequence[str] = (),
    ) -> None:
        """Three ways to save time, which change no score; None and 0 are what suits the device. span_tokens: positions
        whose n-gram rows are made at once. resident: the index is copied to the device. graph: whole spans, which start
        at multiples of span_tokens, are mixed by replaying a CUDA graph.

        names: the row sets. given: experts whose rows `score` is handed. plain: the row sets, fewer than all, that are
        mixed without them.

        Raises RecipeError when the configuration contradicts itself or the index, ValueError for a graph on a CPU or an
        index that is not on the GPU."""
        check_mixer(config, registry.EXPERTS)
        known = index.orders, index.match.lengths, index.vocab_size
        if known != (config.orders, config.match_lengths, vocab_size):
            raise RecipeError(
                "index of orders {}, match lengths {} over {} tokens".format(*known)
                + f", mixer of {config.orders}, {config.match_lengths} over {vocab_size}"
            )
        self.config, self.index, self.names, self.given = config, index, names, given
        self.device = torch.device(device)
        on_host = self.device.type == "cpu"
        if graph and on_host:
            raise ValueError("graph=True: a CPU has no CUDA graphs; give graph=None")
        if resident is False and not on_host:
            raise ValueError(f"resident=False: {self.device} needs the index in its memory; give resident=None")
        self.kind = "neural" if config.kind == "none" else config.kind
        size = span_tokens or SPAN_TOKENS["cpu" if on_host else "cuda"]
        self.span = max(size // config.block_tokens, 1) * config.block_tokens
        record = None if graph is False or on_host else record_graph
        plain = tuple(name for name in names if given and name in plain)
        rest = tuple(name for name in names if name not in plain)
        self.sets = [RowSets(config, rest, given, vocab_size, self.device, self.span, None, record)]
        """Those over all experts, then those that are plain."""
        if plain:
            shared = self.sets[0].memory
            self.sets.append(RowSets(config, plain, (), vocab_size, self.device, self.span, shared, record))
        if on_host and not resident:
            ngrams: NgramRows | Resident = NgramRows(index, config.discount)
        else:
            ngrams = Resident(index, self.device, self.span, config.discount)
        self._state = _State(ngrams, registry.start(config.experts, vocab_size))
        self._count(min(1, len(index.tokens_N)))

    @property
    def experts(self) -> tuple[str, ...]:
        """Name all experts, the neural one first, the given ones last."""
        return self.sets[0].blend.names

    @property
    def kinds(self) -> tuple[str, ...]:
        """Everything that is scored, of row sets that are not plain."""
        return self.sets[0].kinds

    @property
    def position(self) -> int:
        """Give the next position to score: all before it are learned, none from it on."""
        return self._state.ngrams.position

    def score(self, rows: dict[str, Tensor], start: int, stop: int) -> Scores:
        """Score the tokens start..stop-1 and learn them.

        `rows[name][i]` is the neural row (V) of position start + i, made from tokens before it: log probabilities or
        logits of any float type (normalised here, in float32), on any device. Those of given experts are probabilities.
        A text's first scored position is 1. Raises ValueError for rows of other names or positions.
        """
        self._check(rows, start, stop)
        parts: list[list[Tensor]] = [[] for _ in self.sets]
        left = start
        while left < stop:
            right = min((left // self.span + 1) * self.span, stop)
            here = {name: rows_BV[left - start : right - start] for name, rows_BV in rows.items()}
            self._fill(self.sets[0].memory, self._state.further, here, left, right)
            whole = left % self.span == 0 and right - left == self.span
            for part, sets in zip(parts, self.sets, strict=True):
                sets.tell(here)
                part.append(sets.score(self._blocks(left, right), whole))
            self._state.ngrams.advance(right)
            left = right
        nll = [sets.nll(torch.cat(part)) for part, sets in zip(parts, self.sets, strict=True)]
        return Scores({name: found for each in nll for name, found in each.items()}, self.weights())

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Copy the weights as they are now; see `Scores`."""
        return {name: found for sets in self.sets for name, found in sets.weights().items()}

    def state_dict(self) -> dict[str, Any]:
        """Copy what was learned before `position`, without what the text alone tells."""
        return {"position": self.position, "sets": [sets.state_dict() for sets in self.sets]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there; n-grams are counted and experts told again, from the index."""
        while self.position < saved["position"]:
            self._count(min(self.position + PIECE_TOKENS, saved["position"]))
        for sets, state in zip(self.sets, saved["sets"], strict=True):
            sets.load_state_dict(state)

    def rows(self, rows: dict[str, Tensor], start: int, stop: int) -> dict[str, dict[str, Tensor]]:
        """Make the log rows (B, V), float32, that `score` would gather from, by row set and kind.

        Learns and moves nothing here: the network and the further experts go on as copies, in memory of their own, and
        the n-grams' rows of the whole call come from the counts before it, which bitwise are those of its spans.
        Raises ValueError as `score` does.
        """
        self._check(rows, start, stop)
        sets, blocks = self.sets[0], self._blocks(start, stop)
        memory = Memory.allocate(sets.blend, stop - start, len(sets.names), self.index.vocab_size, self.device)
        self._fill(memory, copy.deepcopy(self._state.further), rows, start, stop)
        return {name: found for each in self.sets for name, found in each.rows(rows, memory, blocks).items()}

    def _count(self, stop: int) -> None:
        """Count the tokens up to stop, and tell them the further experts."""
        state = self._state
        if state.further:
            registry.tell(state.further, self.index.tokens_N[self.position : stop].tolist())
        state.ngrams.advance(stop)

    def _check(self, rows: dict[str, Tensor], start: int, stop: int) -> None:
        if set(rows) != {*self.names, *self.given}:
            raise ValueError(f"rows of {sorted(rows)}, mixer of {sorted([*self.names, *self.given])}")
        if any(len(each) != stop - start for each in rows.values()):
            raise ValueError(f"rows of {[len(each) for each in rows.values()]} positions for {start}..{stop}")

    def _blocks(self, start: int, stop: int) -> list[slice]:
        """The blocks of a span, as places in it."""
        block = self.config.block_tokens
        edges = [start, *range((start // block + 1) * block, stop, block), stop]
        return [slice(left - start, right - start) for left, right in itertools.pairwise(edges)]

    def _fill(
        self, memory: Memory, experts: dict[str, registry.Expert], given: dict[str, Tensor], start: int, stop: int
    ) -> None:
        """Put into memory what a span's text tells: tokens, classes, and the rows of every expert but the neural one;
        the further ones, `experts`, are then told the span."""
        ngrams, text_3B, p_BKV = self._state.ngrams, memory.text_3B[:, : stop - start], memory.p_BKV[: stop - start]
        further, index, matches = [], self.index, bool(self.config.match_lengths)
        if experts:
            further = registry.rows(experts, index.tokens_N[start:stop], index.vocab_size)
        further += [given[name] for name in self.given]
        if isinstance(ngrams, Resident):
            text_3B.copy_(ngrams.text(start, stop))
            ngrams.fill(p_BKV, text_3B, start, stop, matches)
            for k, rows_BV in enumerate(further, p_BKV.shape[1] - len(further)):
                p_BKV[:, k].copy_(rows_BV)
            return
        text_3B[0].copy_(torch.from_numpy(index.tokens_N[start:stop].astype(np.int64)))
        text_3B[1].copy_(torch.from_numpy(ngram_index.longest_class(index, start, stop)))
        rows = ngrams.rows(start, stop)
        if matches:
            rows.append(match.rows(index.match, rows[-1], start, stop))
        torch.stack([*rows, *further], 1, out=p_BKV)
