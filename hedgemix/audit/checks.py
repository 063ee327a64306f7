"""The judge: findings from what a witness told and what the record claims. Nothing is computed here but comparisons.

Bits of another number of ranks, or of another machine, differ by rounding: 1e-6 of them is tolerated. What rows have to
be is in `streamed`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hedgemix.audit import own_code
from hedgemix.audit.claim import Claim
from hedgemix.audit.findings import Finding
from hedgemix.audit.sandbox import Confined

SAME_MACHINE = 1e-9

Record = Mapping[str, Any]


def order(claim: Claim, replay: Record, tokens: int) -> Finding:
    """Check that each target is scored once, in order, before anything learned from it, and that the counts are the
    text's."""
    wrong = disorder(replay["events"], tokens)
    expected = {"tokens": tokens - 1, "charged": tokens - 1, "bytes": replay["text_bytes"]}
    wrong += [f"{name}: {replay[name]} instead of {value}" for name, value in expected.items() if replay[name] != value]
    if relative(replay["nats"], replay["nats_of_spans"]) > SAME_MACHINE:
        wrong.append(f"the total of {replay['nats']} nats is not the sum of the spans', {replay['nats_of_spans']}")
    if tokens == claim.dataset.valid_tokens:
        reported = {"tokens": claim.dataset.valid_tokens - 1, "bytes": claim.dataset.valid_bytes}
        wrong += [f"dataset.json says {value} {name}" for name, value in reported.items() if replay[name] != value]
    spans = [event for event in replay["events"] if event["event"] == "score"]
    learned = sum(event["event"] == "learn" for event in replay["events"])
    statement = f"{len(spans)} spans follow each other from the first target to the last, each target charged once, "
    statement += "with counts and mixing weights that stood at the span's beginning and model weights that had learned "
    statement += f"from finished chunks only ({learned} of them)."
    figures = {
        "spans": len(spans),
        "chunks_learned": learned,
        "tokens": replay["tokens"],
        "bytes": replay["bytes"],
        "violations": wrong[:8],
    }
    headline = wrong[0] if wrong else f"{replay['tokens']:,} targets in {len(spans)} spans, {learned} chunks learned"
    return Finding("order", not wrong, headline, wrong_or(wrong, statement), figures, replay["seconds"])


def disorder(events: Sequence[Record], tokens: int) -> list[str]:
    """Find what is wrong with the order of events in a text of so many tokens; empty when nothing is."""
    wrong: list[str] = []
    done, learned, weights, opened = 1, 1, None, None
    for event in events:
        kind, start, stop = event["event"], event["start"], event["stop"]
        span = f"{start:,}..{stop - 1:,}"
        if kind in ("open", "close"):
            now = event["frozen"], event["scorer"]
            weights = weights or (event["frozen"], event["frozen"])
            if now != weights:
                wrong.append(f"weights moved outside of learning, by the {kind} of chunk {span}")
            weights, opened = now, span if kind == "open" else None
        elif kind == "score":
            if opened is None:
                wrong.append(f"targets {span} were scored outside of a chunk")
            if start != done:
                wrong.append(f"targets {span} were scored when {done:,} was next")
            if (event["before"], event["after"]) != (start, stop):
                wrong.append(f"counts stood at {event['before']:,} when rows from {start:,} on were made")
            if event["charged"] != stop - start:
                wrong.append(f"targets {span} were charged {event['charged']:,} times instead of {stop - start:,}")
            done = max(done, stop)
        elif kind == "learn":
            if stop > done:
                wrong.append(f"chunk {span} was learned when only targets before {done:,} were scored")
            if start != learned:
                wrong.append(f"chunk {span} was learned when {learned:,} was the next to learn")
            if weights is not None:
                if learned > 1 and event["before"] != weights[1]:
                    wrong.append(f"weights moved before chunk {span} was learned")
                weights = weights[0], event["after"]
            learned = max(learned, stop)
    if done != tokens:
        wrong.append(f"targets {done:,}..{tokens - 1:,} were not scored")
    return wrong


def bits(claim: Claim, replay: Record, tolerance: float) -> Finding:
    """Check that the re-derived bits are the claim's: every chunk and name of the trace, result.json and the row."""
    lines, trace, wrong = replay["lines"], claim.trace, []
    worst, equal = 0.0, True
    for mine, theirs in zip(lines, trace, strict=False):
        for name in ("tokens", "bytes"):
            if mine[name] != theirs.get(name):
                wrong.append(f"chunk {mine['chunk']} has {mine[name]} {name}, the trace says {theirs.get(name)}")
        for name, value in mine["bits"].items():
            off = relative(value, theirs["bits"].get(name, math.nan))
            worst, equal = max(worst, off), equal and off == 0
            if not off <= tolerance:
                wrong.append(
                    f"chunk {mine['chunk']}: {value:.3f} {name} bits, the trace says {theirs['bits'].get(name)}"
                )
    if len(lines) > len(trace):
        wrong.append(f"the text has {len(lines)} chunks and the trace {len(trace)}")
    total = sum(line["bits"][claim.name] for line in trace)
    size = sum(line["bytes"] for line in trace)
    summed = total / max(1, size)
    if relative(claim.score, summed) > SAME_MACHINE:
        wrong.append(f"result.json says bpb_{claim.name} {claim.score:.6f}, its trace adds up to {summed:.6f}")
    stored = claim.row[f"bpb_{claim.name}"]
    if stored != claim.score:
        wrong.append(f"the table says bpb_{claim.name} {stored}, result.json {claim.score}")
    if (size, claim.row["valid_bytes"]) != (claim.dataset.valid_bytes,) * 2:
        wrong.append(
            f"the trace has {size} bytes, the row {claim.row['valid_bytes']}, the text {claim.dataset.valid_bytes}"
        )
    how = "bitwise equal" if equal else "equal within 1e-9" if worst <= SAME_MACHINE else f"equal within {tolerance:g}"
    mine_bits = sum(line["bits"][claim.name] for line in lines)
    statement = (
        f"The bits of all {len(lines)} chunks audited, computed anew from the artifact, are {how} to the trace's, the "
        "trace adds up to result.json's score, and the table says the same."
    )
    figures = {
        "bits": mine_bits,
        f"bpb_{claim.name}_of_the_audited_tokens": mine_bits / max(1, replay["bytes"]),
        f"bpb_{claim.name}_reported": claim.score,
        "largest_relative_difference": worst,
        "tolerance": tolerance,
        "torch": replay["torch"],
        "violations": wrong[:8],
    }
    headline = wrong[0] if wrong else f"{len(lines)} chunks {how}; largest difference {worst:.1e}"
    return Finding("bits", not wrong, headline, wrong_or(wrong, statement), figures)


def self_contained(confined: Confined | None, error: str, allowed: int, seconds: float) -> Finding:
    """Check that the replay opened nothing else. confined: what the guards of its process saw; None when it failed with
    `error`."""
    refused = confined.refused if confined else [error]
    unknown = own_code.unaccounted(confined.loaded if confined else ())
    refused = refused + [f"unknown code: {file}" for file in unknown]
    by, weakness = (confined.guarded_by(), confined.weakness()) if confined else ("what refused it", "")
    statement = (
        f"The replay ran in a process that could open the artifact and the validation shards ({allowed} files) and "
        f"Python's own library only; {'nothing else was asked for' if not refused else 'it asked for more'}."
    )
    if unknown:
        statement += f" {len(unknown)} files are not as a package's RECORD says: {own_code.REMEDY}."
    figures = {
        "files_allowed": allowed,
        "files_opened": sorted(set(confined.opened)) if confined else [],
        "refused": refused[:8],
        "guarded_by": by,
        "left_open": weakness or "nothing known",
        "files_of_code_loaded": len(confined.loaded) if confined else 0,
    }
    headline = refused[0] if refused else f"nothing but {allowed} files, by {by}"
    return Finding("self-contained", not refused, headline, statement, figures, seconds)


def world_size(replay: Record, ranks: Sequence[Record], tolerance: float) -> Finding:
    """Check that one process (the replay) and these ranks charge the same."""
    wrong, worst = [], 0.0
    chunks = len(ranks[0]["bits"])
    for mine, theirs in zip(replay["lines"], ranks[0]["bits"], strict=False):
        for name, value in mine["bits"].items():
            off = relative(value, theirs[name])
            worst = max(worst, off)
            if not off <= tolerance:
                wrong.append(f"chunk {mine['chunk']}: {value:.3f} {name} bits on one rank, {theirs[name]:.3f} on two")
    for number, rank in enumerate(ranks[1:], start=1):
        if rank["bits"] != ranks[0]["bits"]:
            wrong.append(f"ranks 0 and {number} charge different bits")
        if rank["weights"] != ranks[0]["weights"]:
            wrong.append(f"ranks 0 and {number} ended with different weights")
    statement = (
        f"{len(ranks)} ranks charge for the first {chunks} chunks what one charges (largest relative difference "
        f"{worst:.1e}), and agree among themselves to the bit, weights included."
    )
    figures = {
        "ranks": len(ranks),
        "chunks": chunks,
        "largest_relative_difference": worst,
        "tolerance": tolerance,
        "violations": wrong[:8],
    }
    headline = wrong[0] if wrong else f"{chunks} chunks on 1 and {len(ranks)} ranks; largest difference {worst:.1e}"
    return Finding("world-size", not wrong, headline, wrong_or(wrong, statement), figures)


def coded(written: Record, back: Record, tokens: int, sha256: str, reported_bits: float) -> Finding:
    """Check that real coding takes the reported bits and gives the text back. written: what the compressor wrote; back:
    what the decompressor read; sha256: of the tokens that went in."""
    allowed = 0.001 * reported_bits + 64
    same = back["sha256"] == sha256 and back["tokens"] == tokens
    off = written["payload_bits"] - reported_bits
    passed = same and abs(off) <= allowed
    statement = (
        f"{tokens:,} tokens really compressed take {written['payload_bits']:,} bits, the evaluation reports "
        f"{reported_bits:,.1f} for them, and a process that could open the artifact and the coded file only "
        f"{'got them back' if same else 'did NOT get them back'}."
    )
    figures = {
        "tokens": tokens,
        "coded_bits": written["payload_bits"],
        "reported_bits": reported_bits,
        "difference_bits": off,
        "allowed_difference_bits": allowed,
        "decoded_equal": same,
    }
    headline = f"{written['payload_bits']:,} bits coded, {reported_bits:,.1f} reported, " + (
        "decoded equal" if same else "NOT decoded"
    )
    return Finding("coded", passed, headline, statement, figures)


def not_done(name: str, error: str) -> Finding:
    """Report a check that could not be made, and why: it failed."""
    return Finding(name, False, error, f"Could not be checked: {error}.")


def wrong_or(wrong: Sequence[str], statement: str) -> str:
    """Say the first violation and how many more there are, or else the statement."""
    if not wrong:
        return statement
    more = f" ({len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
    return f"Violated: {wrong[0]}{more}."


def relative(value: float, other: float) -> float:
    """Compare: |value - other| as a share of the larger; infinite when either is no number."""
    if not (math.isfinite(value) and math.isfinite(other)):
        return math.inf
    return abs(value - other) / max(abs(value), abs(other), 1e-300)
