"""A record as a folder to hand in: train_gpt.py, what it needs, a log a seed, submission.json and README.md.

Only what can be checked is handed in: the file that is built now holds the code that every step ran, the audit passed,
and all of it keeps the limits. Otherwise nothing is written. The logs repeat the run: `train_gpt.py --replay`.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hedgemix import __version__, script, stages
from hedgemix.config import Recipe, RecipeError, to_dict
from pipeline import records
from pipeline.records import Record
from pipeline.significance import mixed, summary
from pipeline.templates import README

AUDITED = (
    "normalised", "order", "bits", "blind-to-target", "blind-to-future", "self-contained", "world-size", "limits",
    "unseen", "coded",
)  # fmt: skip
"""The checks of `hedgemix audit`."""
SEEDS = 3
"""What the challenge asks for."""


@dataclass(frozen=True)
class About:
    """What no table knows."""

    author: str
    github_id: str
    name: str
    blurb: str
    track: str
    date: str
    """YYYY-MM-DD."""


@dataclass(frozen=True)
class Seed:
    row: dict[str, Any]
    steps: list[dict[str, Any]]
    """log.jsonl."""
    chunks: list[dict[str, Any]]
    """trace.jsonl."""


def submit(run: str, out: Path, about: About) -> dict[str, Any]:
    """Write the folder `out` about the record `run` (see `records.load`), whole or not at all; returns submission.json.

    Raises RecipeError with every reason why not.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} is there and not empty; name another folder")
    check(about)
    record = records.load(run)
    if reasons := obstacles(record):
        raise RecipeError(f"record {record.name} cannot be submitted: " + "; ".join(reasons))
    code, seeds = script.build(record.recipe), logs(record)
    told = describe(record, about, len(code))
    files = {
        script.NAME: code.decode(),
        "submission.json": json.dumps(told, indent=2) + "\n",
        "requirements.txt": "".join(f"{line}\n" for line in record.rows[0]["requirements"]),
        "README.md": readme(record, about, told),
    }
    files |= {log_name(seed.row): log(record, seed) for seed in seeds}
    write(out, files)
    return told


def obstacles(record: Record) -> list[str]:
    """Why the record cannot be handed in as it is, a sentence each; empty when it can."""
    code_bytes = script.n_bytes(record.recipe)
    return [
        *unfinished(record),
        *mixed(record.done),
        *other_code(record, code_bytes),
        *unkept(record, code_bytes),
        *unaudited(record),
        *(why for seed in logs(record) for why in cut_short(seed)),
    ]


def logs(record: Record) -> list[Seed]:
    return [Seed(row, *(record.lines(row, *place) for place in LOGS)) for row in record.done]


LOGS = (("train_path", "log.jsonl"), ("evaluate_path", "trace.jsonl"))


def check(about: About) -> None:
    for field, value in vars(about).items():
        if not value.strip():
            raise RecipeError(f"--{field.replace('_', '-')} is empty; submission.json has to say it")
    try:
        datetime.date.fromisoformat(about.date)
    except ValueError:
        raise RecipeError(f"--date {about.date!r} is no date; write it as 2026-11-23") from None


def unfinished(record: Record) -> list[str]:
    """Every declared seed is handed in, or none: leaving out a bad one would be choosing the score."""
    again = "run the record's command again"
    return [f"seed {row['seed']} is {row['status']}; {again}" for row in record.rows if row["status"] != "done"]


def other_code(record: Record, code_bytes: int) -> list[str]:
    """Whether what would be handed in is what ran."""
    why = []
    for row in record.done:
        seed, here = row["seed"], f"hedgemix {__version__} as it is installed here"
        if row["hedgemix_version"] != __version__ or row["code_sha256"] != script.sha256():
            at = f" (git {row['git_commit'][:12]})" if row["git_commit"] else ""
            why.append(f"seed {seed} ran other code than {here}{at}; take that version, or run the record anew")
        elif row["code_bytes"] != code_bytes:
            why.append(
                f"seed {seed} was evaluated for a record with other settings, whose {script.NAME} has "
                f"{row['code_bytes']:,} bytes and not {code_bytes:,}; run this one in a runs folder of its own"
            )
        if not row["requirements"] or row["requirements"] != record.done[0]["requirements"]:
            why.append(f"seed {seed} ran with other packages than the first seed, or it is not known with which")
    return why


def unkept(record: Record, code_bytes: int) -> list[str]:
    """The limits that a seed is over."""
    limits = record.recipe.limits
    return [
        f"seed {row['seed']}: {line}"
        for row in record.done
        for line in stages.excesses(
            limits, row["artifact_bytes"] + code_bytes, row["train_seconds"], row["evaluate_seconds"]
        )
    ]


def unaudited(record: Record) -> list[str]:
    missing = [str(row["seed"]) for row in record.done if row["audited"] is None]
    why = [f"not audited: seed {', '.join(missing)}; run hedgemix audit {record.table}"] if missing else []
    for row in record.done:
        if row["audited"] is False:
            failed = ", ".join(row["audit_failed"] or [])
            why.append(f"seed {row['seed']} failed its audit ({failed}); audit.md beside its evaluation says why")
    return why


def cut_short(seed: Seed) -> list[str]:
    """A log that is not whole repeats nothing."""
    row, why = seed.row, []
    if [line.get("step") for line in seed.steps] != list(range(1, row["steps"] + 1)):
        why.append(f"seed {row['seed']}: its log.jsonl has not each of {row['steps']:,} steps")
    if sum(line.get("tokens", 0) for line in seed.chunks) != row["valid_tokens"]:
        why.append(f"seed {row['seed']}: its trace.jsonl has not all {row['valid_tokens']:,} tokens")
    return why


def describe(record: Record, about: About, code_bytes: int) -> dict[str, Any]:
    """submission.json."""
    rows, first, limits = record.done, record.done[0], record.recipe.limits
    loss, bpb = (summary([row[name] for row in rows]) for name in ("nats_per_token", "bpb_final"))
    return {
        "author": about.author,
        "github_id": about.github_id,
        "name": about.name,
        "blurb": about.blurb,
        "date": about.date,
        "track": about.track,
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        "val_loss_std": finite(loss.deviation),
        "val_bpb_std": finite(bpb.deviation),
        "seeds": [row["seed"] for row in rows],
        "seed_results": {
            str(row["seed"]): {
                "val_loss": row["nats_per_token"],
                "val_bpb": row["bpb_final"],
                "steps": row["steps"],
                "ms_per_step": row["ms_per_step"],
                "bytes_total": row["artifact_bytes"] + code_bytes,
                "artifact_bytes": row["artifact_bytes"],
                "artifact_sha256": row["artifact_sha256"],
                "train_seconds": row["train_seconds"],
                "evaluate_seconds": row["evaluate_seconds"],
            }
            for row in rows
        },
        "bytes_total": max(row["artifact_bytes"] for row in rows) + code_bytes,
        "bytes_code": code_bytes,
        "limits": to_dict(limits),
        "hardware": first["hardware"],
        "torch_version": first["torch_version"],
        "python_version": first["python_version"],
        "ray_version": first["ray_version"],
        "hedgemix_version": first["hedgemix_version"],
        "git_commit": first["git_commit"],
        "code_sha256": first["code_sha256"],
        "data": {
            name: first[name]
            for name in ("valid_tokens", "valid_bytes", "valid_sha256", "train_sha256", "tokenizer_sha256")
        },
        "compliance": compliance(record),
    }


def compliance(record: Record) -> dict[str, bool]:
    """What can be said of every seed. The first six are refused when they are not so."""
    rows = record.done
    passed = audited(rows)
    return {
        "train_under_limit": True,
        "artifact_under_limit": True,
        "evaluation_under_limit": True,
        "audit_passed": all(row["audited"] for row in rows),
        "score_first": passed["order"] and passed["blind-to-target"] and passed["blind-to-future"],
        "normalised": passed["normalised"],
        "audit_covers_all_tokens": all(row["audit_tokens"] > row["valid_tokens"] for row in rows),
        "three_seeds": len(rows) >= SEEDS,
        "code_committed": all(row["git_dirty"] is False for row in rows),
    }


def audited(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each check of the audit passed for all seeds."""
    return {name: all(row["audited"] and name not in row["audit_failed"] for row in rows) for name in AUDITED}


def finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def log_name(row: dict[str, Any]) -> str:
    return f"train_seed{row['seed']}.log"


def log(record: Record, seed: Seed) -> str:
    """A seed's log: lines for people, and the JSON lines that `alone.replayed` reads."""
    row = seed.row
    told = {name: row[name] for name in TOLD} | {"recipe": json.loads(row["config"])}
    lines = [
        f"seed {row['seed']} of record {record.name}, recipe {row['recipe']}",
        f"{row['started_at']} to {row['finished_at']}, {machine(row)}",
        f"hedgemix {row['hedgemix_version']}, torch {row['torch_version']}, Python {row['python_version']}",
        json.dumps({"run": told}),
        "",
        f"training: {row['steps']:,} steps in {row['train_seconds']:.1f} s",
        *(json.dumps(line) for line in seed.steps),
        "",
        f"evaluation: {row['valid_tokens']:,} tokens, {row['valid_bytes']:,} bytes in {row['evaluate_seconds']:.1f} s",
        *(json.dumps(line) for line in seed.chunks),
        "",
        *(f"{name}: {row[name]!r}" for name in ROUNDS if row[name] is not None),
        f"bytes: artifact {row['artifact_bytes']:,} + code {row['code_bytes']:,} = {row['total_bytes']:,} "
        f"of {row['limit_bytes']:,}",
        f"artifact_sha256: {row['artifact_sha256']}",
        f"seed:{row['seed']} val_loss:{row['nats_per_token']!r} val_bpb:{row['bpb_final']!r}",
    ]
    return "".join(f"{line}\n" for line in lines)


NO_YES, FAILED_PASSED = ("no", "yes"), ("failed", "passed")
ROUNDS = ("bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final")
TOLD = (
    "seed", "record", "config_hash", "train_sha256", "valid_sha256", "tokenizer_sha256", "hardware", "workers",
    "evaluate_workers", "hedgemix_version", "torch_version", "ray_version", "python_version", "git_commit",
    "code_sha256", "requirements",
)  # fmt: skip


def readme(record: Record, about: About, told: dict[str, Any]) -> str:
    rows = record.done
    table = [
        f"| {row['seed']} | {row['bpb_final']:.6f} | {row['nats_per_token']:.6f} | {row['steps']:,} "
        f"| {row['ms_per_step']:.1f} | {row['train_seconds']:.1f} | {row['evaluate_seconds']:.1f} "
        f"| {row['artifact_bytes'] + told['bytes_code']:,} |"
        for row in rows
    ]
    spread = [f"{told[name]:.6f}" if told[name] is not None else "" for name in ("val_bpb_std", "val_loss_std")]
    table += [
        f"| mean | {told['val_bpb']:.6f} | {told['val_loss']:.6f} | | | | | |",
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
        versions=f"torch {told['torch_version']}, Python {told['python_version']}, hedgemix {told['hedgemix_version']}",
        facts="\n".join(f"- {fact.replace('_', ' ')}: {NO_YES[so]}" for fact, so in told["compliance"].items()),
        code_bytes=f"{told['bytes_code']:,}",
        bytes_total=f"{told['bytes_total']:,}",
        limit=f"{record.recipe.limits.total_bytes:,}",
        checks="\n".join(f"- {name}: {FAILED_PASSED[so]}" for name, so in audited(rows).items()),
        audited=f"{min(row['audit_tokens'] for row in rows):,} of {rows[0]['valid_tokens'] + 1:,} tokens",
        valid=f"{rows[0]['valid_tokens']:,} tokens, {rows[0]['valid_bytes']:,} bytes",
    )


def machine(row: dict[str, Any]) -> str:
    return f"{row['workers']} worker{'s' * (row['workers'] > 1)}, {row['hardware']}"


def data_line(recipe: Recipe) -> str:
    """Where the text comes from, and the option that says where it lies elsewhere."""
    data = recipe.data
    if data.source == "docs":
        return f"the docstrings of {', '.join(data.packages)}, as requirements.txt pins them"
    place = data.shards_dir if data.source == "shards" else ", ".join(data.paths)
    return f"the {data.source} in {place}; `--data` names another place"


def write(out: Path, files: dict[str, str]) -> None:
    """The folder appears with all its files, or not at all. Raises OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        for name, text in files.items():
            (beside / name).write_text(text, encoding="utf-8")
        os.rename(beside, out)  # over an empty folder too
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
