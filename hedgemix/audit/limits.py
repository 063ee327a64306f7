"""What a run was allowed, against what it used: bytes, seconds, and text that training must not have read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from hedgemix import stages
from hedgemix.artifact import format as artifact
from hedgemix.artifact.load_model import load_tokenizer
from hedgemix.audit import contamination
from hedgemix.audit.claim import Claim
from hedgemix.audit.findings import Finding
from hedgemix.data import bpb, memory
from hedgemix.data import dataset as datasets
from hedgemix.data.shards import TokenStream, map_shard
from hedgemix.standalone import script

KNOWN_SHARE = 0.5
"""A validation shard of whose windows this share occurs in the training text was trained on."""
READ_TOKENS = 1 << 22


def check_limits(claim: Claim) -> Finding:
    """Check bytes, from the artifact file and the code bundled anew, and the row's seconds, against the recipe's
    limits."""
    row, allowed = claim.row, claim.recipe.limits
    size, code = claim.artifact.stat().st_size, script.n_bytes(claim.recipe)
    wrong = []
    if size != row["artifact_bytes"]:
        wrong.append(f"the artifact has {size:,} bytes, the row says {row['artifact_bytes']:,}")
    wrong += stages.excesses(allowed, size + code, row["train_seconds"], row["evaluate_seconds"])
    statement = (
        f"Artifact ({size:,} bytes) and train_gpt.py, the code and its settings ({code:,}), take {size + code:,} of "
        f"{allowed.total_bytes:,} bytes; training took {row['train_seconds']:.1f} of {allowed.train_seconds:g} s and "
        f"evaluation {row['evaluate_seconds']:.1f} of {allowed.evaluate_seconds:g} s, as the run measured them."
    )
    figures = {
        "artifact_bytes": size,
        "code_bytes": code,
        "code_bytes_reported": row["code_bytes"],
        "limit_bytes": allowed.total_bytes,
        "train_seconds": row["train_seconds"],
        "evaluate_seconds": row["evaluate_seconds"],
        "violations": wrong,
    }
    headline = wrong[0] if wrong else f"{size + code:,} of {allowed.total_bytes:,} bytes; seconds within limits"
    return Finding("limits", not wrong, headline, f"Violated: {wrong[0]}." if wrong else statement, figures)


def unseen(claim: Claim, windows: int, seed: int, charged_N: np.ndarray | None = None) -> Finding:
    """Check that the texts are those of the row, that no validation shard is among the training shards, and that drawn
    windows of the validation text occur neither in the training text nor in the artifact's memory; tells the score of
    the documents that have nothing in common with the training text beside that of all.

    charged_N: what each position of the text's beginning was charged, in nats; NaN where nothing."""
    data = claim.dataset
    train, valid = [Path(shard) for shard in data.train_shards], [Path(shard) for shard in data.valid_shards]
    wrong = other_text(claim)
    wrong += [f"training shard {name} is validation shard {other}" for name, other in shared(train, valid)]
    drawn = contamination.draw([map_shard(path) for path in valid], windows, seed)
    found = artifact.read(claim.artifact)
    memory_M = memory.tokens(load_tokenizer(found), found.memory)
    remembered = contamination.occurring(drawn, [memory_M])
    occurs = contamination.occurring(drawn, [map_shard(path) for path in train]) | remembered
    counts = [int((drawn.shard == number).sum()) for number in range(len(valid))]
    shares = [float(occurs[drawn.shard == number].mean()) if count else 0.0 for number, count in enumerate(counts)]
    for path, share in zip(valid, shares, strict=True):
        if share >= KNOWN_SHARE:
            wrong.append(f"{share:.0%} of the windows of {path.name} occur in the training text or the memory")
    largest = max(shares, default=0.0)
    statement = (
        f"The texts have the hashes of the row, none of {len(valid)} validation shards is among {len(train)} training "
        f"shards, and of {len(occurs)} drawn windows of {contamination.WINDOW} validation tokens {int(occurs.sum())} "
        f"occur "
        f"word for word in the {data.train_tokens:,} training tokens (at most {largest:.1%} of a shard's)"
        + (f", {int(remembered.sum())} in the artifact's memory of {len(memory_M):,}." if len(memory_M) else ".")
    )
    documents = by_document(claim, load_tokenizer(found), charged_N)
    statement += (
        f" {documents['documents_without']:,} of {documents['documents']:,} documents have no window of "
        f"{contamination.SHORT_WINDOW} tokens in common with the training text, "
        f"{documents['documents_mostly_known']:,} half of theirs or more."
    )
    if (without := documents["bpb_of_documents_without"]) is not None:
        statement += f" Those without score {without:.4f} bits per byte, all {documents['bpb_of_all']:.4f}."
    figures = {
        **documents,
        "train_shards": len(train),
        "valid_shards": len(valid),
        "windows": len(occurs),
        "windows_in_training_text": int(occurs.sum()),
        "windows_in_memory": int(remembered.sum()),
        "memory_tokens": len(memory_M),
        "largest_share_of_a_shard": largest,
        "violation_from_share": KNOWN_SHARE,
        "violations": wrong[:8],
    }
    known = f"{int(occurs.sum())} of {len(occurs)} windows known"
    sound = f"{known}; {documents['documents_without']:,} of {documents['documents']:,} documents share nothing"
    headline = wrong[0] if wrong else sound
    return Finding("unseen", not wrong, headline, f"Violated: {wrong[0]}." if wrong else statement, figures)


def by_document(claim: Claim, processor: SentencePieceProcessor, charged_N: np.ndarray | None) -> dict[str, Any]:
    """Count the documents that the training text has nothing of, and half or more of; and score those without."""
    stream, tables = datasets.valid_stream(claim.dataset), bpb.byte_tables(processor)
    tokens_N = stream.read(0, min(len(stream), contamination.MOST_TOKENS))
    train = TokenStream(claim.dataset.train_shards)
    document_N, share_D = contamination.by_document(tokens_N, tables.is_control, train)
    scores: dict[str, float | None] = {"bpb_of_documents_without": None, "bpb_of_all": None}
    if charged_N is not None:
        size = min(len(charged_N), len(tokens_N))
        bytes_N = bpb.token_bytes(tables, tokens_N, 0, size)
        nats_N = np.nan_to_num(charged_N[:size])
        for name, here_N in zip(scores, ((share_D == 0)[document_N[:size]], np.ones(size, bool)), strict=True):
            if n_bytes := int(bytes_N[here_N].sum()):
                scores[name] = bpb.bits_per_byte(float(nats_N[here_N].sum()), n_bytes)
    return {
        "documents": int((~np.isnan(share_D)).sum()),
        "documents_without": int((share_D == 0).sum()),
        "documents_mostly_known": int((share_D >= KNOWN_SHARE).sum()),
        **scores,
    }


def other_text(claim: Claim) -> list[str]:
    """Find which hashes of texts and tokenizer, taken from the files, are not the row's and dataset.json's."""
    data, digest = claim.dataset, hashlib.sha256()
    stream = datasets.valid_stream(data)
    for start in range(1, len(stream), READ_TOKENS):
        digest.update(stream.read(start, min(READ_TOKENS, len(stream) - start)).astype("<u2").tobytes())
    hashes = {
        "valid_sha256": digest.hexdigest(),
        "train_sha256": datasets.edges_sha256(Path(shard) for shard in data.train_shards),
        "tokenizer_sha256": hashlib.sha256(artifact.read(claim.artifact).tokenizer).hexdigest(),
    }
    wrong = []
    for name, value in hashes.items():
        for where, named in (("the row", claim.row[name]), ("dataset.json", getattr(data, name))):
            if named != value:
                wrong.append(f"{name} is {value[:16]}…, {where} says {str(named)[:16]}…")
    return wrong


def shared(train: Sequence[Path], valid: Sequence[Path]) -> list[tuple[str, str]]:
    """Find shards, as (training, validation) names, that are one file, or have equal tokens."""
    pairs = []
    for mine in train:
        for theirs in valid:
            same = mine.samefile(theirs) or (
                mine.stat().st_size == theirs.stat().st_size and np.array_equal(map_shard(mine), map_shard(theirs))
            )
            if same:
                pairs.append((mine.name, theirs.name))
    return pairs
