"""Whether all that a record says of a seed is what the replay found, what its files hold, and what is recomputed here.

What is said, and held against what:

- trace.jsonl: chunks of the whole text, each once and in order; their sums are result.json's numbers;
- result.json: every number of the evaluation is the replay's;
- the row: every column that a result.json, dataset.json or the recipe has says the same, and hash and size of the
  artifact, hash and size of the code, the recipe's hash and the requirements are computed anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hedgemix.audit.checks import SAME_MACHINE, relative, wrong_or
from hedgemix.audit.claim import Claim
from hedgemix.audit.findings import Finding
from hedgemix.config import config_hash
from hedgemix.evaluate.scoring_order import chunks
from hedgemix.runtime.files import sha256_of
from hedgemix.runtime.layout import RESULT
from hedgemix.standalone import script

BITS = ("quantized", "mixed", "ttt", "final", "hedge", "logistic", "published")
"""The names under which a chunk's bits stand in a trace."""
LOOSE = 1e-3
"""Of mixing weights, and of the published rule's mass: exponentials of sums of nats, whose rounding they multiply; no
score is made of what result.json says of them."""
NOT_REPLAYED = {"code_bytes", "evaluate_workers"}
"""What the step adds to the evaluation's result: of the record, and of the machine."""
LOOSE_NAMES = ("expert_weights", "ensemble_weights", "published_mass")
OF_DATASET = (
    "memory_bytes", "memory_tokens", "valid_bytes", "valid_sha256", "valid_overlap_share", "train_bytes",
    "train_bytes_removed", "train_sha256", "tokenizer_sha256", "vocab_size", "text_sha256",
)  # fmt: skip
"""Columns that are named like their field of dataset.json."""
PINNED = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?==[0-9][A-Za-z0-9.!]*")
"""name==version, and nothing else that pip would read: no option, no address, no second condition."""


def check_agreement(claim: Claim, replay: Mapping[str, Any], tokens: int, tolerance: float) -> Finding:
    """Check that trace, result.json and row say what the replay of so many tokens found, and what is recomputed."""
    whole = tokens == claim.dataset.valid_tokens
    places = [
        piece.stop - piece.start for piece in chunks(claim.dataset.valid_tokens, claim.recipe.evaluate.chunk_tokens)
    ]
    wrong = [
        *trace_faults(claim.trace, claim.result, places),
        *(result_faults(claim.result, replay["result"], tolerance) if whole else ()),
        *row_faults(claim),
    ]
    if replay["artifact_sha256"] != claim.row["artifact_sha256"]:
        wrong.append(f"the replay read an artifact of sha256 {replay['artifact_sha256']}, the row's is another")
    statement = (
        f"The trace has the text's {len(places)} chunks in their order, which add up to result.json's numbers; "
        + ("all of these are the replay's" if whole else "only a part was replayed, so they are not held against it")
        + "; the row says what the files of its steps say, and hashes and sizes of artifact, code and recipe, and the "
        "requirements, are what is computed here."
    )
    figures = {
        "chunks": len(claim.trace),
        "numbers_of_result_json": len(claim.result),
        "config_hash": config_hash(claim.recipe),
        "code_sha256": script.sha256(),
        "violations": wrong[:8],
    }
    headline = wrong[0] if wrong else f"{len(claim.result)} numbers, {len(places)} chunks and the row agree"
    return Finding("claim", not wrong, headline, wrong_or(wrong, statement), figures)


def trace_faults(trace: Sequence[Mapping[str, Any]], result: Mapping[str, Any], places: Sequence[int]) -> list[str]:
    """Find where a trace is not that of a text whose chunks have so many tokens, or its sums are not the result's. A
    line or a number that is not there counts as one that is wrong."""
    wrong = []
    if len(trace) != len(places):
        wrong.append(f"trace.jsonl has {len(trace)} chunks, the text {len(places)}")
    for number, (line, tokens) in enumerate(zip(trace, places, strict=False)):
        if (line.get("chunk"), line.get("tokens")) != (number, tokens):
            wrong.append(
                f"line {number + 1} of trace.jsonl is chunk {line.get('chunk')} of {line.get('tokens')} tokens, and "
                f"should be chunk {number} of {tokens}"
            )
        names = sorted(line.get("bits") or ())
        if names != sorted(BITS):
            wrong.append(f"line {number + 1} of trace.jsonl has bits of {', '.join(names)}; they are {', '.join(BITS)}")
    if wrong:
        return wrong
    try:
        return list(sum_faults(trace, result))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        return [f"trace.jsonl and {RESULT} cannot be added up ({error!r})"]


def sum_faults(trace: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Iterator[str]:
    """Yield which numbers of an evaluation's result are not what the trace's lines add up to."""
    size, tokens = sum(line["bytes"] for line in trace), sum(line["tokens"] for line in trace)
    bits = {name: math.fsum(line["bits"][name] for line in trace) for name in BITS}
    exact = {"scored_bytes": size, "scored_tokens": tokens}
    for field, name in (("expert_weights", "hedge"), ("ensemble_weights", "ensemble")):
        exact[field] = trace[-1]["weights"][name]
    for name, value in exact.items():
        if result[name] != value:
            yield f"{RESULT} says {name} {brief(result[name])}, the trace {brief(value)}"
    rates = {f"bpb_{name}": value / size for name, value in bits.items()}
    rates["nats_per_token"] = bits["final"] * math.log(2) / tokens
    for name, value in rates.items():
        if not (name == "bpb_ttt" and result[name] is None) and not relative(result[name], value) <= SAME_MACHINE:
            yield f"{RESULT} says {name} {result[name]!r}, its trace adds up to {value!r}"


def result_faults(result: Mapping[str, Any], replayed: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    """Yield which fields of an evaluation's result.json are not the replay's: numbers within the tolerance, all else
    equal. Seconds are no part of it."""
    for name in sorted({*result, *replayed} - NOT_REPLAYED):
        if name not in result or name not in replayed:
            yield f"{RESULT} has {name}, the replay not" if name in result else f"{RESULT} lacks {name}"
        elif not name.endswith("_seconds") and not same(name, result[name], replayed[name], tolerance):
            yield f"{RESULT} says {name} {brief(result[name])}, the replay {brief(replayed[name])}"


def same(name: str, value: Any, replayed: Any, tolerance: float) -> bool:
    """Compare a field of two results."""
    if isinstance(value, list) and isinstance(replayed, list) and name in LOOSE_NAMES:
        return len(value) == len(replayed) and all(abs(a - b) <= LOOSE for a, b in zip(value, replayed, strict=True))
    if isinstance(value, float) and isinstance(replayed, float):
        return relative(value, replayed) <= (LOOSE if name in LOOSE_NAMES else tolerance)
    return type(value) is type(replayed) and value == replayed


def row_faults(claim: Claim) -> Iterator[str]:
    """Yield which columns of the row are not what its steps' files say, or what is computed here."""
    row, recipe = claim.row, claim.recipe
    for told in (claim.result, claim.quantized, claim.trained):
        for name in told:
            if name in row and row[name] != told[name]:
                yield f"the row says {name} {brief(row[name])}, {RESULT} {brief(told[name])}"
    n_bytes, code_bytes, limit = claim.artifact.stat().st_size, script.n_bytes(recipe), recipe.limits.total_bytes
    values = {name: getattr(claim.dataset, name) for name in OF_DATASET} | {
        "valid_tokens": claim.dataset.valid_tokens - 1,
        "train_set_tokens": claim.dataset.train_tokens,
        "recipe": recipe.recipe,
        "config_hash": config_hash(recipe),
        "order": recipe.evaluate.order,
        "workers": recipe.compute.workers,
        "artifact_sha256": sha256_of(claim.artifact),
        "artifact_bytes": n_bytes,
        "code_bytes": code_bytes,
        "total_bytes": n_bytes + code_bytes,
        "limit_bytes": limit,
        "code_sha256": script.sha256(),
        "requirements": script.requirements(recipe),
    }
    for name, value in values.items():
        if row[name] != value:
            yield f"the row says {name} {brief(row[name])}, it is {brief(value)}"
    for name, value in (("seed", claim.seed), ("recipe", recipe.recipe)):
        if claim.header.get(name) != value:
            yield f"the artifact says it is of {name} {claim.header.get(name)}, the row {value}"


def unpinned(requirements: Sequence[Any]) -> list[str]:
    """List what is no requirement of the form name==version."""
    return [str(line) for line in requirements if not PINNED.fullmatch(str(line))]


def brief(value: Any) -> str:
    """Write a value so that a difference is seen, and a line stays one."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
