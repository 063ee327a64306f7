"""A record as a folder to hand in: train_gpt.py, what it needs, a log a seed, submission.json and README.md.

Only what can be checked is handed in (`eligibility`), otherwise nothing is written. The logs repeat the run:
`train_gpt.py --replay`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from hedgemix.config import RecipeError, to_dict
from hedgemix.standalone import script
from pipeline.analysis import records
from pipeline.analysis.records import Record
from pipeline.analysis.significance import summary
from pipeline.submission.eligibility import About, Seed, audited, check, logs, obstacles
from pipeline.submission.readme import log_name, machine, readme

SEEDS = 3
"""What the challenge asks for."""


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


def describe(record: Record, about: About, code_bytes: int) -> dict[str, Any]:
    """Make the content of submission.json."""
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
    """Say what can be said of every seed. The first six are refused when they are not so."""
    rows = record.done
    passed = audited(rows)
    return {
        "train_under_limit": True,
        "artifact_under_limit": True,
        "evaluation_under_limit": True,
        "audit_passed": all(row["audited"] for row in rows),
        "score_first": passed["order"] and passed["streamed"],
        "normalised": passed["streamed"],
        "audit_covers_all_tokens": all(row["audit_tokens"] > row["valid_tokens"] for row in rows),
        "three_seeds": len(rows) >= SEEDS,
        "code_committed": all(row["git_dirty"] is False for row in rows),
    }


def finite(value: float) -> float | None:
    """Return the value, None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def log(record: Record, seed: Seed) -> str:
    """Write a seed's log: lines for people, and the JSON lines that `standalone.replayed` reads."""
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


ROUNDS = ("bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final")
TOLD = (
    "seed", "record", "config_hash", "train_sha256", "valid_sha256", "tokenizer_sha256", "hardware", "workers",
    "evaluate_workers", "hedgemix_version", "torch_version", "ray_version", "python_version", "git_commit",
    "code_sha256", "requirements",
)  # fmt: skip


def write(out: Path, files: dict[str, str]) -> None:
    """Write the folder with all its files, or not at all. Raises OSError."""
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
