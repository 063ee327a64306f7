"""Floating-point operations and bytes of the stages, from shapes alone. A multiplication and an addition are two.

Counted are matrix products and attention over the keys that are allowed; bytes are those that must move at least
once: weights and optimizer state, and rows over the vocabulary. So a limit made from them is below what can be reached.
"""

from __future__ import annotations

from hedgemix.config import EvaluateConfig, MixerConfig, ModelConfig, TrainConfig
from hedgemix.experts import fast_head
from hedgemix.mixers.network import expert_names, logistic_experts
from hedgemix.model_config import GATE_CHANNELS


def matrix_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """List rows and columns of every matrix of the blocks: what Muon and GPTQ work on."""
    width, kv = model.width, model.width // model.heads * model.kv_heads
    block = [(width, width), (kv, width), (kv, width), (width, width)]
    block += [(model.mlp_hidden, width), (width, model.mlp_hidden)]
    return model.layers * block


def token_operations(model: ModelConfig, keys: float, vocab_size: int = 0, looped: bool = True) -> float:
    """Count operations of one position's forward pass that attends to `keys` positions; with a vocabulary also those of
    its logits. looped: with the loop of layers, where there is one."""
    kv, passes = model.width // model.heads * model.kv_heads, len(model.passes(looped))
    matrices = passes * sum(rows * columns for rows, columns in matrix_shapes(model)) // model.layers
    matrices += passes * GATE_CHANNELS * model.heads if model.head_gates else 0
    matrices += model.bigram_width * model.width if model.bigram_buckets else 0
    matrices += model.value_embedding_width * kv if model.value_embedding_layers else 0
    return 2 * matrices + 4 * passes * model.width * keys + 2 * vocab_size * model.width


def train_operations(model: ModelConfig, train: TrainConfig, vocab_size: int, looped: bool = True) -> float:
    """Count operations of one step over all ranks: forward, twice that backward."""
    return 3 * train.batch_tokens * token_operations(model, train.sequence_tokens / 2, vocab_size, looped)


def muon_operations(shapes: list[tuple[int, int]], steps: int) -> float:
    """Count operations of Newton-Schulz: two Gram-like products and one square of the short side, `steps` times."""
    return sum(steps * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes)


def step_bytes(parameters: int) -> float:
    """Count bytes: weights read twice, gradients written and read, three states read and written, float32."""
    return 4 * parameters * (2 + 2 + 2 * 3)


def sliding_operations(model: ModelConfig, vocab_size: int, tokens: int, window: int, stride: int) -> float:
    """Count operations of scoring so many targets in full windows."""
    return tokens / stride * window * token_operations(model, window / 2) + 2 * tokens * vocab_size * model.width


def streaming_operations(
    model: ModelConfig, vocab_size: int, tokens: int, window: int, segment: int, overlap: int
) -> float:
    """Count the same in one pass of segments, each behind its overlap."""
    positions = tokens * (1 + overlap / segment)
    return positions * token_operations(model, window) + 2 * tokens * vocab_size * model.width


def gptq_operations(shapes: list[tuple[int, int]], inputs: list[int]) -> float:
    """Count a Cholesky factor for each input, and what each column passes on to the later ones."""
    return sum(size**3 / 3 for size in inputs) + sum(rows * columns**2 for rows, columns in shapes)


def mixing_costs(vocab_size: int, config: MixerConfig) -> tuple[float, float]:
    """Count operations and bytes of mixing one position's rows, one row set: products over the vocabulary, among them
    the logistic mixers' curvature (inputs squared); every row written once, the logistic inputs read again."""
    experts, linears, logistics = len(expert_names(config)), len(config.linear_gates), len(config.gates)
    inputs = linears + len(logistic_experts(config))
    products = linears * experts + logistics * inputs + logistics * inputs**2
    return 2.0 * vocab_size * products, 4.0 * vocab_size * (experts + 2 * inputs + logistics)


def feature_operations(model: ModelConfig, config: EvaluateConfig, vocab_size: int) -> float:
    """Count operations of the experts over features, a position: the cache's cosines and sums by token, the head's
    steps before the block and within it."""
    cache = config.cache.memory_tokens * (model.width + vocab_size) if config.cache.enabled else 0
    block, trained = config.ttt.head.block_tokens, config.ttt.enabled and config.ttt.kind == "head"
    head = 2 * model.width * vocab_size + fast_head.PASSES * block * vocab_size if trained else 0
    return 2.0 * (cache + head)


RULE_PASSES = 29
"""Times that the published rule reads or writes a row over the vocabulary: two softmaxes, two entropies, a division,
and the counts of three orders looked up and summed."""


def rule_bytes(vocab_size: int) -> float:
    """Count bytes of the published rule, a position."""
    return 4.0 * vocab_size * RULE_PASSES
