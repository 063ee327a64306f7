"""What a coded file may ask for: its text and its settings in proportion to what it holds, so that a few hundred bytes
cannot take a machine's memory or its day. The coder keeps to the same bounds, so what it writes can be read."""

from __future__ import annotations

import math

from hedgemix.config import EvaluateConfig, RecipeError

FREE_TOKENS, TOKENS_A_WORD = 256, 256
"""Most tokens: so many, and for each word of 32 bits as many again: 1/8 bit a token. A text that is more regular than
that gets words of zeros behind its own."""
MOST_CHUNKS = 2**16
CONTEXTS = 16
"""Most tokens of a forward pass, and of overlap, in training contexts."""
MOST = {
    "batch_windows": 2**10, "published_ranks": 2**10, "ttt.epochs": 16, "ttt.batch_sequences": 2**10,
    "cache.memory_tokens": 2**13, "mixer.block_tokens": 2**11, "mixer.entropy_sets": 64,
}  # fmt: skip
"""Most of a setting that memory or time grows with."""
MOST_GATES, MATCHED_TOKENS = 16, 512
"""Most mixers of a kind, and tokens of all match lengths together."""
BLUNT = 2.0**-20
"""Added to a probability when its bits are counted: the coder's own are rounded to some 2^-24."""
READ_AHEAD_BITS = 64


def words_for(tokens: int) -> int:
    """Compute the fewest words that so many tokens must be given."""
    return max(0, -(-(tokens - FREE_TOKENS) // TOKENS_A_WORD))


def least_bits(probability: float) -> float:
    """Compute a lower bound of what a token of this probability took, in bits."""
    return -math.log2(probability + BLUNT)


def check(config: EvaluateConfig, context_tokens: int, schedule_tokens: int) -> None:
    """Check that settings ask for no more than is ever of use; raises RecipeError for the first that does."""
    parts = {"": config, "ttt": config.ttt, "cache": config.cache, "mixer": config.mixer}
    for name, most in MOST.items():
        part, _, field = name.rpartition(".")
        _require(name, getattr(parts[part], field), most)
    longest = CONTEXTS * context_tokens
    _require("segment_tokens", config.segment_tokens if config.order == "streaming" else 0, longest)
    _require("overlap_tokens", config.overlap_tokens, longest)
    for name in ("gates", "linear_gates"):
        _require(f"mixer.{name} (how many)", len(getattr(config.mixer, name)), MOST_GATES)
    _require("mixer.match_lengths (their sum)", sum(config.mixer.match_lengths), MATCHED_TOKENS)
    _require("chunk_tokens (how many of them in the text)", schedule_tokens // max(1, config.chunk_tokens), MOST_CHUNKS)


def _require(name: str, value: int, most: int) -> None:
    if value > most:
        raise RecipeError(f"evaluate.{name} is {value:,}, of at most {most:,} for a coded text")
