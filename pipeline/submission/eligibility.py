"""Whether a record may be handed in: the file that is built now holds the code that every step ran, the audit passed,
logs are whole, all of it keeps the limits, and no file contradicts another (`evidence`)."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from hedgemix import __version__, stages
from hedgemix.audit.plan import FULL
from hedgemix.config import RecipeError
from hedgemix.runtime.layout import LOG, TRACE
from hedgemix.standalone import script
from pipeline.analysis.records import Record
from pipeline.analysis.significance import mixed
from pipeline.submission.evidence import AUDITED, contradictions


@dataclass(frozen=True)
class About:
    """Holds what no table knows."""

    author: str
    github_id: str
    name: str
    blurb: str
    track: str
    date: str
    """YYYY-MM-DD."""


@dataclass(frozen=True)
class Seed:
    """Holds a finished seed's row and its logs, a dict a line."""

    row: dict[str, Any]
    steps: list[dict[str, Any]]
    """log.jsonl."""
    chunks: list[dict[str, Any]]
    """trace.jsonl."""


def obstacles(record: Record) -> list[str]:
    """Say why the record cannot be handed in as it is, a sentence each; empty when it can."""
    code_bytes = script.n_bytes(record.recipe)
    return [
        *unfinished(record),
        *mixed(record.done),
        *code_mismatches(record, code_bytes),
        *over_limits(record, code_bytes),
        *unaudited(record),
        *(why for seed in logs(record) for why in cut_short(seed)),
        *contradictions(record),
    ]


def logs(record: Record) -> list[Seed]:
    """Read the logs of every finished seed."""
    return [Seed(row, *(record.lines(row, *place) for place in LOGS)) for row in record.done]


LOGS = (("train_path", LOG), ("evaluate_path", TRACE))


def check(about: About) -> None:
    """Raise RecipeError for a field that is empty, and for a date that is none."""
    for field, value in vars(about).items():
        if not value.strip():
            raise RecipeError(f"--{field.replace('_', '-')} is empty; submission.json has to say it")
    try:
        datetime.date.fromisoformat(about.date)
    except ValueError:
        raise RecipeError(f"--date {about.date!r} is no date; write it as 2026-11-23") from None


def unfinished(record: Record) -> list[str]:
    """Name the seeds that are not done. Every declared seed is handed in, or none: leaving out a bad one would be
    choosing the score."""
    again = "run the record's command again"
    return [f"seed {row['seed']} is {row['status']}; {again}" for row in record.rows if row["status"] != "done"]


def code_mismatches(record: Record, code_bytes: int) -> list[str]:
    """Name the seeds that ran other code, or with other packages, than what would be handed in."""
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


def over_limits(record: Record, code_bytes: int) -> list[str]:
    """Name the limits that a seed is over."""
    limits = record.recipe.limits
    return [
        f"seed {row['seed']}: {line}"
        for row in record.done
        for line in stages.excesses(
            limits, row["artifact_bytes"] + code_bytes, row["train_seconds"], row["evaluate_seconds"]
        )
    ]


def unaudited(record: Record) -> list[str]:
    """Name the seeds that were not audited, failed, or passed another plan than the full one."""
    missing = [str(row["seed"]) for row in record.done if row["audited"] is None and row["audit_plan"] is None]
    why = [f"not audited: seed {', '.join(missing)}; run hedgemix audit {record.table}"] if missing else []
    for row in record.done:
        if row["audited"] is False:
            failed = ", ".join(row["audit_failed"] or [])
            why.append(f"seed {row['seed']} failed its audit ({failed}); audit.md beside its evaluation says why")
        elif row["audit_plan"] != FULL and str(row["seed"]) not in missing:
            weak = row["audit_plan"] or "by an older hedgemix"
            why.append(f"seed {row['seed']} was not audited in full ({weak}); run hedgemix audit {record.table}")
    return why


def cut_short(seed: Seed) -> list[str]:
    """Say which of the seed's logs are not whole: such a log repeats nothing."""
    row, why = seed.row, []
    if [line.get("step") for line in seed.steps] != list(range(1, row["steps"] + 1)):
        why.append(f"seed {row['seed']}: its log.jsonl has not each of {row['steps']:,} steps")
    if sum(line.get("tokens", 0) for line in seed.chunks) != row["valid_tokens"]:
        why.append(f"seed {row['seed']}: its trace.jsonl has not all {row['valid_tokens']:,} tokens")
    return why


def audited(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Say of each check of the audit whether it passed for all seeds."""
    return {name: all(row["audited"] and name not in row["audit_failed"] for row in rows) for name in AUDITED}
