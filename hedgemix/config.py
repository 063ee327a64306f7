"""What a run is: one frozen dataclass tree, validated before anything expensive starts.

Every field can be overridden on the command line; the text under a field is its help. `config_hash` names a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from hedgemix.model_config import ModelConfig as ModelConfig
from hedgemix.train_config import TrainConfig as TrainConfig

Config = TypeVar("Config")


class RecipeError(ValueError):
    """Tells that a recipe field, or a combination of fields, cannot work; the message names the field and the fix."""


@dataclass(frozen=True)
class DataConfig:
    """Choose the text that is read, and how it becomes tokens."""

    source: Literal["docs", "text", "shards"] = "docs"
    """docs: documentation inside installed Python packages. text: your own files. shards: tokenized shards on disk."""
    packages: tuple[str, ...] = ("torch", "ray", "sympy", "pandas", "numpy", "networkx")
    """docs: the packages whose docstrings are read."""
    paths: tuple[str, ...] = ()
    """text: files or folders (.txt, .md, .jsonl, .parquet, optionally .zst or .gz compressed)."""
    text_field: str = "text"
    """text: the field (jsonl) or column (parquet) that holds the document."""
    shards_dir: str = ""
    """shards: folder with *_train_*.bin and *_val_*.bin in the official FineWeb shard format."""
    tokenizer: str = ""
    """shards: the SentencePiece .model the shards were made with (default: the only one in shards_dir)."""
    vocab_size: int = 1024
    """Tokens in the vocabulary; for docs and text a tokenizer of this size is trained on the training part."""
    case_markers: bool = False
    """docs, text: write capitals as markers and small letters, so that the, The and THE share their pieces."""
    max_text_bytes: int = 0
    """docs, text: read at most this many bytes of text (0: all)."""
    valid_fraction: float = 0.02
    """docs, text: share of documents held out, chosen by the hash of their content."""
    memory_bytes: int = 0
    """Most bytes of compressed training text in every artifact: n-grams and match begin as if they had read it."""
    overlap_words: int = 8
    """docs, text: leave out training paragraphs that share so many words in a row with validation text (0: none)."""
    max_valid_tokens: int = 0
    """Score at most this many validation tokens, from the start (0: all)."""


@dataclass(frozen=True)
class QuantizeConfig:
    """Set how trained weights become the artifact."""

    method: Literal["stepped", "reference"] = "stepped"
    """stepped: steps by row and column from what weights matter, entropy coded. reference: the published export."""
    loss_nats: float = 5e-4
    """stepped: loss a token that quantization is expected to add, unless bytes demand more."""
    target_bytes: int = 0
    """stepped: most bytes of the artifact (0: what limits.total_bytes leaves beside the code)."""
    matrix_bits: int = 5
    """reference: bits of attention and MLP matrices (GPTQ)."""
    table_bits: int = 8
    """reference: bits of embeddings and other large tables (rounded per row)."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""
    block_columns: int = 128
    clip_quantiles: tuple[float, ...] = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    """reference: candidates for each row's clipping point; the one with the least (weighted) error is kept."""
    scale_floor: float = 0.0
    """reference: smallest step of a row (the published 1/15 caps the artifact's size at the cost of accuracy)."""
    prune_fraction: float = 0.0
    """reference: share of the smallest weights of each large matrix set to zero first."""
    zstd_level: int = 1
    """Codes hardly repeat, so a higher level takes up to 100 times longer for 0.04 % fewer bytes."""


@dataclass(frozen=True)
class HeadConfig:
    """Set how the fast head learns: the output layer alone, token by token, by steps that fade."""

    rate: float = 0.5
    """How far one step moves the logits at the very same feature, times the error."""
    memory_tokens: float = 1000.0
    """After how many tokens a step has faded to 1/e."""
    block_tokens: int = 64
    """Tokens whose steps are found together; divides 1,024."""
    ridge: float = 0.03
    """Added to the eigenvalues of the features' moments before they are whitened, in units of their mean."""


@dataclass(frozen=True)
class CacheConfig:
    """Set how far back, and how sharply, the neural cache looks for features like the present one's."""

    enabled: bool = True
    """Mix the neural cache, an expert over the model's final features."""
    memory_tokens: int = 3000
    """Positions that are looked back on."""
    theta: float = 15.0
    """What the cosine of two features is multiplied by in the softmax over positions."""
    decay_tokens: float = 500.0
    """After how many tokens a position's weight has faded to 1/e."""
    floor: float = 0.005
    """Share of each row that is spread evenly over the vocabulary."""
    ridge: float = 4.0
    """Added to the eigenvalues of the features' moments before they are whitened, in units of their mean."""


@dataclass(frozen=True)
class TTTConfig:
    """Set how the model trains on what it has scored."""

    enabled: bool = True
    """Train on what was scored, once it was."""
    kind: Literal["head", "weights"] = "head"
    """head: the output layer, token by token, as `head` says; its rows are mixed beside the frozen model's. weights:
    all layers, after each chunk, as the fields below say; their rows are mixed in place of the frozen model's."""
    head: HeadConfig = field(default_factory=HeadConfig)
    rate: float = 2e-4
    """Of AdamW (betas 0.9 and 0.999, no decay), or of normalised steps."""
    epochs: int = 1
    batch_sequences: int = 64
    """Sequences in one optimizer step over all ranks."""
    sequence_tokens: int = 2048
    context_tokens: int = 0
    """Tokens in front of each sequence that it sees and does not learn: for steps of fewer tokens than the context."""
    gradient_clip: float = 1.0
    normalise: bool = False
    """Plain steps on gradients divided by their root mean square so far, weight by weight, instead of AdamW's."""
    decay: float = 0.0
    """Share of the way back to the shipped weights after each step."""
    last_blocks: int = 0
    """Trained: all weights of this many last blocks, and the norms and scales of all (0: every weight)."""
    byte_weighted: bool = False
    """Weight each token's loss by the bytes it stands for."""
    cosine: bool = False
    """Rate falls over the chunks as a half cosine."""
    ramp: float = 1.0
    """The rate's extra factor rises from 1 to this over ramp_fraction of the chunks (1: no ramp)."""
    ramp_fraction: float = 0.3
    polyak: float = 0.0
    """Decay per step of the averaged weights that score (0: score with the trained weights themselves)."""

    @property
    def trains_weights(self) -> bool:
        """Tell whether chunks are learned, with a backward pass."""
        return self.enabled and self.kind == "weights"


@dataclass(frozen=True)
class MixerConfig:
    """Choose which experts are mixed, and how fast the mixtures learn."""

    kind: Literal["none", "hedge", "linear", "logistic", "ensemble"] = "ensemble"
    """The mixture whose bits are the final score. hedge: over the experts. linear: the first of linear_gates.
    logistic: the first of gates. ensemble: Hedge over the neural model and every logistic mixer."""
    orders: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Orders of the n-gram experts: 1 unigram, 2 bigram, 3 trigram, up to 8."""
    discount: float = 0.75
    """Kneser-Ney: taken from the count of every n-gram above the unigram and given to the next lower order."""
    match_lengths: tuple[int, ...] = (6, 8, 12, 16, 24, 32)
    """The match expert follows the last occurrence of the last so many tokens, the longest first (none: no expert)."""
    experts: tuple[str, ...] = ()
    """Further experts, after the match, by their names in hedgemix/experts/registry.py (recency)."""
    block_tokens: int = 128
    """Tokens scored between two moves of the linear and logistic weights."""
    hedge_share: float = 0.02
    """Fixed share: weight redistributed over what Hedge mixes at each token."""
    linear_gates: tuple[Literal["none", "order", "entropy", "both"], ...] = ("order", "entropy")
    """One linear mixer of all experts each, an input of the logistic mixers; its weight sets as in gates."""
    linear_rate: float = 0.02
    """How far one token moves the linear weights towards what explained it."""
    gates: tuple[Literal["none", "order", "entropy", "both"], ...] = ("order", "entropy")
    """One logistic mixer each; its weights go by the longest context seen before, the neural entropy, both or none."""
    memory_tokens: tuple[float, ...] = (1000.0, 1000.0)
    """Tokens of curvature each logistic mixer remembers in a weight set; fewer follow the text faster."""
    logistic_ridge: float = 10.0
    """Added to the curvature: what the first steps of a weight set are damped by."""
    bias_rate: float = 0.05
    """Step of the bias that logistic mixers learn for each token of the vocabulary (0: none)."""
    entropy_sets: int = 4
    """Buckets of the neural distribution's entropy, for the gates that use it."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Set in which order, and with how much context, tokens are scored."""

    order: Literal["streaming", "sliding"] = "streaming"
    """streaming: one pass, banded attention. sliding: windows of window_tokens, each scoring its last stride_tokens."""
    window_tokens: int = 2048
    """Context a token is scored with: the window, or the attention band."""
    stride_tokens: int = 32
    """sliding: tokens scored by each window."""
    segment_tokens: int = 8192
    """streaming: tokens of one forward pass; segments are shared out over the ranks."""
    overlap_tokens: int = 2048
    """streaming: earlier tokens run again in front of each segment."""
    batch_windows: int = 32
    """sliding: windows of one forward pass."""
    chunk_tokens: int = 131_072
    """Tokens scored before test-time training moves the weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    published_ranks: int = 1
    """Ranks of the published rule (the reference had 8): bpb_published depends on their number, and no score does."""
    ttt: TTTConfig = field(default_factory=TTTConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    mixer: MixerConfig = field(default_factory=MixerConfig)


@dataclass(frozen=True)
class ComputeConfig:
    """Set how many processes a seed gets, and what of a machine each."""

    workers: int = 8
    """Ray Train workers of one seed's training job, all on one node."""
    gpus_per_worker: float = 1
    cpus_per_worker: float = 20
    """CPUs of a worker (0: its share of the largest machine's, so that timed training shares it with nobody)."""
    evaluate_workers: int = 8
    """Ranks of one seed's evaluation."""
    max_restarts: int = 3
    """Times each step of a seed is started again after losing a process or a machine; a training budget goes on."""
    checkpoint_seconds: float = 60.0
    """Seconds of training, or of evaluation, between two checkpoints: the most work that a lost machine costs."""


@dataclass(frozen=True)
class LimitsConfig:
    """Set what a record's rules allow a seed."""

    total_bytes: int = 16_000_000
    """Artifact and code together."""
    train_seconds: float = 600.0
    evaluate_seconds: float = 600.0


@dataclass(frozen=True)
class Recipe:
    """Holds all that decides a run but its seed."""

    recipe: str
    """Name of the recipe this configuration started from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Make a configuration of what `to_dict` gave; raises RecipeError for other fields, or other types."""
    if not isinstance(values, dict):
        raise RecipeError(f"{kind.__name__} is {str(values)[:40]}, and should be an object with its fields")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RecipeError(f"{kind.__name__} has no field {unknown[0]!r}; it was written by another version of hedgemix")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            value = from_dict(hint, value)
        elif isinstance(value, list):
            value = tuple(value)
        if not _fits(value, hint):
            raise RecipeError(f"{kind.__name__}.{name} is {str(value)[:40]}, which is no {str(hint)[:80]}")
        arguments[name] = value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise RecipeError(f"{kind.__name__}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; a whole number is a float too."""
    of = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return type(value) is str and value in of
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, of[0]) for each in value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in of)
    if not isinstance(hint, type) or dataclasses.is_dataclass(hint):
        return hint is Any or isinstance(value, (tuple, typing.get_origin(hint) or hint))
    return type(value) in ((int, float) if hint is float else (hint,)) and not (hint is int and abs(value) >= 2**53)


def config_hash(*parts: Any) -> str:
    """Name a run: first 12 hex digits of the SHA-256 of the parts (dataclasses or JSON values) in canonical JSON."""
    plain = [to_dict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
