"""The README.md of a submission."""

from __future__ import annotations

from typing import Any

from hedgemix.config import Recipe
from hedgemix.standalone import script
from pipeline.analysis.records import Record
from pipeline.submission.eligibility import About, audited

NO_YES, FAILED_PASSED = ("no", "yes"), ("failed", "passed")
README = """# {name}

{blurb}

Track {track}; {author} ({github_id}), {date}.

| seed | val_bpb | val_loss | steps | ms a step | training s | evaluation s | bytes |
|---|---|---|---|---|---|---|---|
{table}

val_loss is nats a token, val_bpb is bits a byte of the text: {valid}. Bytes are the artifact
and `{file}`, of {limit}. Every declared seed is here.

## The score is a code length

Before each token is known, every expert and the mixture of them give a distribution over the whole vocabulary that sums
to one, made of the artifact and earlier tokens only. The token is charged -log2 of its probability, once; only then do
counts, mixing weights and, a chunk later, the model's weights learn from it. So an arithmetic coder with this artifact
could write the text in that many bits, and a decoder would get it back. The audit of {audited} ran the evaluation
again, summed rows, changed the text at and after positions to see that nothing before moved, and really coded a part:

{checks}

## Run it

    pip install -r requirements.txt
    torchrun --standalone --nproc_per_node={processes} {file} --seed {seed}

trains a seed under the clock, quantizes it, evaluates it and prints its scores, bytes and seconds; exit code 1: it is
over a limit. The text: {data}.

    torchrun --standalone --nproc_per_node={processes} {file} --replay {log}

repeats the logged run: each step takes the share of the clock that it had then. On the same kind of machine, with as
many threads, it gives the same weights, artifact (sha256 in submission.json) and val_bpb, to the bit on CPUs. Of a run
by the clock on GPUs the sums are in no fixed order, and agree up to rounding.

The logs are of {hardware}; {versions}.

`{file}` is {code_bytes} bytes: an importer, and the library compressed without its comments.
`python {file} --unpack DIR` writes it as files.

## Compliance

{facts}

The largest total is {bytes_total} bytes. All digits, and the hashes of texts and artifacts, are in submission.json.
"""


VERSIONS = {"torch": "torch_version", "Python": "python_version", "hedgemix": "hedgemix_version"}
"""What a submission ran on, and what submission.json calls it."""


def log_name(row: dict[str, Any]) -> str:
    """Name the file of the seed's log."""
    return f"train_seed{row['seed']}.log"


def readme(record: Record, about: About, submission: dict[str, Any]) -> str:
    """Write the submission's README.md; `submission` is its submission.json."""
    rows = record.done
    table = [
        f"| {row['seed']} | {row['bpb_final']:.6f} | {row['nats_per_token']:.6f} | {row['steps']:,} "
        f"| {row['ms_per_step']:.1f} | {row['train_seconds']:.1f} | {row['evaluate_seconds']:.1f} "
        f"| {row['artifact_bytes'] + submission['bytes_code']:,} |"
        for row in rows
    ]
    spread = [
        f"{submission[name]:.6f}" if submission[name] is not None else "" for name in ("val_bpb_std", "val_loss_std")
    ]
    table += [
        f"| mean | {submission['val_bpb']:.6f} | {submission['val_loss']:.6f} | | | | | |",
        f"| sample std | {spread[0]} | {spread[1]} | | | | | |",
    ]
    compute = record.recipe.compute
    return README.format(
        name=about.name,
        blurb=about.blurb,
        track=about.track,
        author=about.author,
        github_id=about.github_id,
        date=about.date,
        table="\n".join(table),
        file=script.NAME,
        log=log_name(rows[0]),
        processes=max(compute.workers, compute.evaluate_workers),
        seed=rows[0]["seed"],
        data=data_line(record.recipe),
        hardware=machine(rows[0]),
        versions=", ".join(f"{name} {submission[column]}" for name, column in VERSIONS.items()),
        facts="\n".join(f"- {fact.replace('_', ' ')}: {NO_YES[so]}" for fact, so in submission["compliance"].items()),
        code_bytes=f"{submission['bytes_code']:,}",
        bytes_total=f"{submission['bytes_total']:,}",
        limit=f"{record.recipe.limits.total_bytes:,}",
        checks="\n".join(f"- {name}: {FAILED_PASSED[so]}" for name, so in audited(rows).items()),
        audited=f"{min(row['audit_tokens'] for row in rows):,} of {rows[0]['valid_tokens'] + 1:,} tokens",
        valid=f"{rows[0]['valid_tokens']:,} tokens, {rows[0]['valid_bytes']:,} bytes",
    )


def machine(row: dict[str, Any]) -> str:
    """Write how many workers ran, on which hardware."""
    return f"{row['workers']} worker{'s' * (row['workers'] > 1)}, {row['hardware']}"


def data_line(recipe: Recipe) -> str:
    """Say where the text comes from, and the option that says where it lies elsewhere."""
    data = recipe.data
    if data.source == "docs":
        return f"the docstrings of {', '.join(data.packages)}, as requirements.txt pins them"
    place = data.shards_dir if data.source == "shards" else ", ".join(data.paths)
    return f"the {data.source} in {place}; `--data` names another place"
