"""The columns of the results table: one row a declared seed, failures too.

They are the fields of `Row`, with the text under each as its documentation; arrow types follow from the annotations.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from dataclasses import dataclass
from functools import cache

import pyarrow as pa

SCHEMA_VERSION = 9


@dataclass(frozen=True)
class Row:
    """Holds what is known of one declared seed; None where nothing is."""

    record: str
    """Name of the record; one parquet file holds one record."""
    recipe: str
    """Name of the recipe the configuration started from."""
    config_hash: str
    """Hash of the whole configuration; rows with equal hashes ran the same recipe."""
    seed: int
    """Seed of the initial weights and of the order of training sequences."""
    status: str
    """done, failed, or pending (not finished when the driver stopped)."""
    error: str | None = None
    """What ended a failed seed."""
    study: str | None = None
    """Name of the study the record belongs to; empty for a record by itself, and before schema version 9."""
    variant: str | None = None
    """What the record is called in its study; base is the recipe that the others vary."""
    retries: int | None = None
    """Starts of the seed's finished steps beyond the first of each: 0 when nothing was lost. Before schema version 7
    `attempts`, which counted the first as well."""
    lost_seconds: float | None = None
    """Seconds of work in those steps that a fault undid and that were done again."""
    parameters: int | None = None
    """Trained weights of the model."""
    steps: int | None = None
    """Optimizer steps."""
    train_tokens: int | None = None
    """Training tokens the steps read."""
    ms_per_step: float | None = None
    """Milliseconds of the training loop per step."""
    train_loss_nats: float | None = None
    """Mean training loss a token over the last tenth of the steps."""
    restarts: int | None = None
    """Times the training was started again, after losing a worker or the driver."""
    checkpoint_failures: int | None = None
    """Training checkpoints that storage did not take, in the last start."""
    qat_steps: int | None = None
    """Steps trained through quantization (0: late QAT did not act)."""
    peak_memory_bytes: int | None = None
    """Most memory in use on the first worker's GPU during training (0 on a CPU)."""
    warmup_seconds: float | None = None
    """Building and compiling before the training clock."""
    train_seconds: float | None = None
    """Training budget used: loop, averaging and calibration, over all restarts."""
    loop_seconds: float | None = None
    """Part of train_seconds in the training loop, checkpoints included."""
    calibrate_seconds: float | None = None
    """Part of train_seconds after the loop: averaging and calibration."""
    quantize_seconds: float | None = None
    """GPTQ and compression."""
    gptq_seconds: float | None = None
    """Part of quantize_seconds in GPTQ and rounding; the rest is reading, compressing and reading back."""
    largest_damping: float | None = None
    """Largest damping GPTQ needed, as a share of a Hessian's mean diagonal."""
    theta: float | None = None
    """What sets all quantization steps together; larger means coarser (empty for the reference's export)."""
    expected_loss_nats: float | None = None
    """Nats a token that quantization was expected to add (empty for the reference's export)."""
    bits_per_weight: float | None = None
    """All bits of the artifact, tokenizer and configuration too, over the parameters."""
    score_seconds: float | None = None
    """Scoring the full-precision weights, for bpb_full."""
    counts_seconds: float | None = None
    """Indexing the n-grams of the scored text, once for all seeds."""
    evaluate_seconds: float | None = None
    """Evaluation from reading the artifact to the last bit, with the passes that only compare."""
    scoring_seconds: float | None = None
    """Part of evaluate_seconds in forward passes, of the frozen and of the adapted weights."""
    mixing_seconds: float | None = None
    """Part of evaluate_seconds in experts and mixers."""
    ttt_seconds: float | None = None
    """Part of evaluate_seconds in test-time training and the neural cache."""
    evaluate_workers: int | None = None
    """Ranks of the evaluation."""
    order: str | None = None
    """streaming or sliding: the order and context tokens were scored with."""
    bpb_full: float | None = None
    """Bits per byte of the full-precision averaged weights."""
    bpb_quantized: float | None = None
    """Bits per byte of the artifact's weights, frozen, no mixing."""
    bpb_mixed: float | None = None
    """Bits per byte of the artifact's weights, frozen, mixed with n-grams and the match: nothing adapts but them."""
    bpb_ttt: float | None = None
    """Bits per byte with test-time training (the fast head, or trained weights), no mixing."""
    bpb_final: float | None = None
    """The score: bits per byte with everything the recipe turns on. A code length."""
    bpb_hedge: float | None = None
    """Bits per byte of the Hedge mixture over the same rows as bpb_final."""
    bpb_logistic: float | None = None
    """Bits per byte of the logistic mixture over the same rows as bpb_final."""
    bpb_published: float | None = None
    """What the published five-expert rule reports. NOT a code length: its probabilities do not sum to 1."""
    published_mass: float | None = None
    """Mean over tokens of the sum of the published rule's probabilities over the vocabulary (1 would be valid)."""
    nats_per_token: float | None = None
    """bpb_final as nats a token."""
    artifact_bytes: int | None = None
    """Size of the artifact file: weights, tokenizer, configuration and memory."""
    memory_bytes: int | None = None
    """Part of artifact_bytes in training text that the n-gram and match experts begin with (0: none)."""
    memory_tokens: int | None = None
    """Tokens of that text."""
    code_bytes: int | None = None
    """train_gpt.py for this recipe: all code from the text to the score, and the settings (`hedgemix submit`)."""
    total_bytes: int | None = None
    """artifact_bytes and code_bytes together."""
    limit_bytes: int | None = None
    """What the recipe allows for total_bytes."""
    within_limits: bool | None = None
    """Whether bytes, training seconds and evaluation seconds all keep the recipe's limits."""
    expert_names: list[str] | None = None
    """The neural model and the experts beside it: n-grams, the match, those of `evaluate.mixer.experts`."""
    expert_weights: list[float] | None = None
    """Their weights in the plain Hedge mixture (bpb_hedge) after the last token."""
    ensemble_names: list[str] | None = None
    """What the ensemble mixes: the neural model and one logistic mixer a gate."""
    ensemble_weights: list[float] | None = None
    """Their Hedge weights after the last token."""
    valid_tokens: int | None = None
    """Scored tokens."""
    valid_bytes: int | None = None
    """Bytes of the scored text."""
    valid_sha256: str | None = None
    """Of the scored tokens (16-bit little-endian)."""
    train_set_tokens: int | None = None
    """Tokens of the training text."""
    valid_overlap_share: float | None = None
    """Share of the validation text's windows that occur in the training text."""
    overlap_window: str | None = None
    """What these windows are: 8 words (data.overlap_words) without case and white space; shards: 13 tokens."""
    train_bytes: int | None = None
    """Bytes of the training text (empty for shards)."""
    train_bytes_removed: int | None = None
    """Bytes left out of the training text, since they repeat validation text (0 for shards)."""
    train_sha256: str | None = None
    """Of each training shard's name, size, first and last megabyte."""
    text_sha256: str | None = None
    """Of all documents, training and validation (empty for shards)."""
    tokenizer_sha256: str | None = None
    """Of the SentencePiece model file."""
    vocab_size: int | None = None
    """Tokens in the vocabulary."""
    artifact_sha256: str | None = None
    """Of the artifact file."""
    artifact_path: str | None = None
    """Where the artifact file lies."""
    train_path: str | None = None
    """Folder of the training's step: result.json and log.jsonl, one line a step."""
    evaluate_path: str | None = None
    """Folder of the evaluation's step: result.json, trace.jsonl and, once audited, audit.json and audit.md."""
    dataset_path: str | None = None
    """Folder of dataset.json, which names the shards."""
    audited: bool | None = None
    """Whether every check of `hedgemix audit` passed under its full plan, or one failed under any; empty when this
    artifact and result were not audited, or passed a weaker plan."""
    audit_plan: str | None = None
    """How much the audit looked at: full, or in what it was weaker than the default; empty before schema version 8."""
    audit_failed: list[str] | None = None
    """The checks that failed."""
    audit_log_sum: float | None = None
    """Largest distance from 1 of the sum of a committed row: 0 is a distribution."""
    audit_published_log_sum: float | None = None
    """Log of the mean sum of the published rule's rows."""
    audit_coded_bits: int | None = None
    """Bits that the audit's stretch of text took when it was really compressed and decoded."""
    audit_reported_bits: float | None = None
    """Bits that the evaluation reports for that stretch."""
    audit_tokens: int | None = None
    """Tokens the audit scored anew, from the beginning of the text."""
    workers: int | None = None
    """Ray Train workers of the training job."""
    hardware: str | None = None
    """What the training job's first worker ran on."""
    hedgemix_version: str | None = None
    """Version of hedgemix that made the last finished step, as are the versions below."""
    code_sha256: str | None = None
    """Of the sources in train_gpt.py, without their documentation; empty when the seed's steps ran different ones."""
    requirements: list[str] | None = None
    """Packages that train_gpt.py needs for this recipe, with their versions."""
    torch_version: str | None = None
    """Version of PyTorch."""
    ray_version: str | None = None
    """Version of Ray."""
    python_version: str | None = None
    """Version of Python."""
    git_commit: str | None = None
    """Of the tree the last finished step was made from; empty outside a git checkout."""
    git_dirty: bool | None = None
    """Whether the tree had changes that are not in git_commit."""
    started_at: str | None = None
    """Start of the first step, UTC, ISO 8601."""
    finished_at: str | None = None
    """End of the last finished step, UTC, ISO 8601."""
    config: str | None = None
    """The whole configuration as JSON."""
    schema_version: int = SCHEMA_VERSION
    """Version of these columns."""


ARROW_TYPES: dict[object, pa.DataType] = {
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    bool: pa.bool_(),
    list[str]: pa.list_(pa.string()),
    list[float]: pa.list_(pa.float64()),
}


READING = (
    "Recipes for pandas: [table.md](table.md). Which tests are made of these numbers and why, and the columns of a\n"
    "study's own table: [reports.md](reports.md)."
)


@cache
def column_docs() -> dict[str, str]:
    """Read each column's documentation from the text under its field."""
    [body] = [node for node in ast.parse(inspect.getsource(Row)).body if isinstance(node, ast.ClassDef)]
    docs, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            docs[name] = ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = " ".join(str(node.value.value).split())
    return docs


def schema() -> pa.Schema:
    """Derive the parquet schema from the fields of `Row`, each column with its documentation as metadata."""
    hints, docs = typing.get_type_hints(Row), column_docs()
    columns = []
    for field in dataclasses.fields(Row):
        options = [option for option in typing.get_args(hints[field.name]) if option is not type(None)]
        plain = hints[field.name] if hints[field.name] in ARROW_TYPES else options[0]
        columns.append(pa.field(field.name, ARROW_TYPES[plain], metadata={"doc": docs[field.name]}))
    return pa.schema(columns, metadata={"hedgemix_schema": str(SCHEMA_VERSION)})


def markdown() -> str:
    """Write docs/results.md: every column with its type and documentation."""
    lines = [
        "# The results table",
        "",
        "One parquet file a record, one row a declared seed; `pandas.read_parquet` reads a file or the whole folder.",
        f"Schema version {SCHEMA_VERSION} (`schema_version` of every row). Columns of steps not done are empty.",
        "",
        "| column | type | what it is |",
        "|---|---|---|",
    ]
    docs = column_docs()
    rows = [f"| `{c.name}` | {c.type} | {docs[c.name]} |" for c in schema()]
    return "\n".join([*lines, *rows, "", READING]) + "\n"
