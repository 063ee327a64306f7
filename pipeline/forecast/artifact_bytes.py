"""What a seed's files should weigh: how the limit is shared out, and what weights like these were seen to need.

Computed from the recipe alone. What `quantize.loss_nats` takes is known once the weights are there; models that were
measured say between which bits a weight that may lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hedgemix import stages
from hedgemix.artifact.sections import to_lzma
from hedgemix.config import DataConfig, Recipe
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.quantize.quantizer import is_quantized
from hedgemix.standalone import script

PIECE_BYTES, NORMALISER_BYTES = 5.0, 81_000
"""Of a tokenizer as stored: 4.1 to 4.4 a piece of 1,024, 4.6 to 5.4 of 8,192, trained here; FineWeb's of 1,024 pieces
takes 85,755, most of it the table by which it normalises text."""
STEP_BITS = 4.7
"""Of a row's or a column's step as stored: 3.7 to 4.7 in three artifacts."""
OWN_BYTES = 1_000
"""Of an artifact's document and prefix."""
NEEDED_NATS, NEEDED_BITS = 5e-4, (3.3, 5.4)
"""Bits a weight that this `quantize.loss_nats` took in models of 0.4 to 2.7 M weights: 3.3 where most stand in a table
whose rows are rarely read, 5.3 in one of recipe `frontier`'s parts (both docs/artifact.md), 5.4 in recipe `laptop`'s
after FineWeb. Steps of half the width, a bit more each, are a quarter of the loss."""


@dataclass(frozen=True)
class Shares:
    """Holds how a recipe's bytes are shared out."""

    script: int
    """Of train_gpt.py, exact."""
    tokenizer: int
    known_tokenizer: bool
    """Whether it is a file that is there; else its bytes are an estimate."""
    memory: int
    """At most."""
    rest: int
    """Of gains, scales, gates and quantization steps, and of the artifact's own, about."""
    left: int
    """For the weights that get steps: what an artifact may have beside all of these."""
    weights: int
    """So many."""

    @property
    def bits(self) -> float:
        """Give the bits that are left for a weight."""
        return 8 * max(0, self.left) / self.weights

    def expected(self, loss_nats: float) -> tuple[int, int]:
        """Compute the least and the most bytes of artifact and script by what the measured models needed."""
        low, high = (self.weights * min(bits, self.bits) / 8 for bits in needed_bits(loss_nats))
        fixed = self.script + self.tokenizer + self.memory + self.rest
        return fixed + round(low), fixed + round(high)


def share_out(recipe: Recipe, model: Model) -> Shares:
    """Share out what an artifact of this recipe and its model may weigh."""
    steps = [parameter for parameter in model.parameters() if is_quantized(parameter)]
    weights = sum(parameter.numel() for parameter in steps)
    rest = 2 * (parameter_count(model) - weights) + STEP_BITS / 8 * sum(sum(parameter.shape) for parameter in steps)
    rest = round(rest) + OWN_BYTES
    tokenizer, known = tokenizer_bytes(recipe.data)
    code, memory = script.n_bytes(recipe), recipe.data.memory_bytes
    left = stages.artifact_room(recipe, code) - tokenizer - memory - rest
    return Shares(code, tokenizer, known, memory, rest, left, weights)


def tokenizer_bytes(data: DataConfig) -> tuple[int, bool]:
    """Count the bytes of a tokenizer as an artifact stores it, and tell whether from its file; else they are about
    what such tokenizers take."""
    named = [data.tokenizer] if data.tokenizer else sorted(Path(data.shards_dir or "/dev/null").glob("*.model"))
    if data.source == "shards" and len(named) == 1 and Path(named[0]).is_file():
        return len(to_lzma(Path(named[0]).read_bytes())), True
    return round(PIECE_BYTES * data.vocab_size) + (NORMALISER_BYTES if data.source == "shards" else 0), False


def needed_bits(loss_nats: float) -> tuple[float, float]:
    """Say between which bits a weight such a loss took in models that were measured."""
    more = math.log2(NEEDED_NATS / loss_nats) / 2
    low, high = NEEDED_BITS
    return max(0.0, low + more), max(0.0, high + more)
