"""The claim of a finished run: a row of its record's table, and the files that the row names.

The table is read and its audit columns are written with pyarrow alone, so an audit needs the library and the files,
not what made them. A runs folder may have been moved or copied: a path that is not there is looked for under the folder
of the table, from `_steps` on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hedgemix.artifact import format as artifact
from hedgemix.config import Recipe, RecipeError, from_dict
from hedgemix.data import dataset as datasets
from hedgemix.data.dataset import Dataset
from hedgemix.runtime.files import read_json, replacing
from hedgemix.runtime.layout import AUDIT, LOG, RESULT, STEPS, TRACE

NAMES = ("final", "published")
PATHS = ("artifact_path", "evaluate_path", "dataset_path", "train_path")
AUDITED = {
    "audited": "audited",
    "audit_plan": "audit_plan",
    "audit_failed": "failed",
    "audit_log_sum": "log_sum",
    "audit_published_log_sum": "published_log_sum",
    "audit_coded_bits": "coded_bits",
    "audit_reported_bits": "reported_bits",
    "audit_tokens": "tokens",
}
"""The columns an audit fills, and where they stand in audit.json."""
ADDED = ("audit_plan",)
"""Those that the table of an older hedgemix lacks, which is read as if they were empty."""


@dataclass(frozen=True)
class Claim:
    """Holds a row of a table, what it says of itself in its files, and the number that is taken for its score."""

    table: Path
    seed: int
    name: str
    """final or published: the number that is taken for the score."""
    row: dict[str, Any]
    recipe: Recipe
    dataset: Dataset
    artifact: Path
    evaluation: Path
    """Folder of the evaluation's step."""
    result: dict[str, Any]
    """What its result.json reports."""
    trace: list[dict[str, Any]]
    training: Path
    """Folder of the training's step."""
    trained: dict[str, Any]
    """What the training's result.json reports."""
    log: list[dict[str, Any]]
    """Of the training, a step each."""
    quantized: dict[str, Any]
    """What the result.json beside the artifact reports."""
    header: dict[str, Any]
    """What the artifact itself says of its making."""

    @property
    def score(self) -> float:
        """Give the bits per byte that the evaluation reports."""
        return float(self.result[f"bpb_{self.name}"])

    def path(self, suffix: str) -> Path:
        """Say where findings go: audit.json, audit.md beside the result; those about another number than the score are
        named after it."""
        return self.evaluation / (f"audit{suffix}" if self.name == "final" else f"audit_{self.name}{suffix}")


def claims(table: Path, seeds: Sequence[int] = (), name: str = "final") -> list[Claim]:
    """Read the claims of the table's finished rows, or of these seeds'.

    Raises RecipeError when one cannot be audited.
    """
    rows = read_rows(table)
    if name not in NAMES:
        raise RecipeError(f"--claim {name!r}: one of {', '.join(NAMES)}")
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        raise RecipeError(f"{table} has no finished row to audit; finish the record first")
    missing = sorted(set(seeds) - {row["seed"] for row in done})
    if missing:
        there = ", ".join(str(row["seed"]) for row in done)
        raise RecipeError(f"{table} has no finished row of seed {missing[0]}; finished are {there}")
    return [load(table, row, name) for row in done if not seeds or row["seed"] in seeds]


def read_rows(table: Path) -> list[dict[str, Any]]:
    """Read a results table, a dictionary a row; raises RecipeError for a file that is none, or lacks columns."""
    try:
        content = pq.read_table(table) if table.is_file() else None
    except (OSError, pa.ArrowInvalid) as error:
        raise RecipeError(f"{table} is no parquet file ({str(error).splitlines()[0]}); give a record's") from None
    if content is None:
        raise RecipeError(f"{table} is no file; give the parquet file that the record prints as its table")
    there = {*content.column_names, *ADDED}
    lacking = [column for column in (*PATHS, *AUDITED, "config") if column not in there]
    if lacking:
        raise RecipeError(
            f"{table} has no column {lacking[0]}: it is no record's table, or an older hedgemix wrote it; run its "
            "record command again, which repeats no finished step"
        )
    return [dict.fromkeys(ADDED) | row for row in content.to_pylist()]


def load(table: Path, row: dict[str, Any], name: str) -> Claim:
    """Load the claim of one row, its files found and the artifact's checksum compared; raises RecipeError where that
    fails."""
    seed = row["seed"]
    places = {column: find(table, row, column) for column in PATHS}
    evaluation, file, training = (places[column] for column in ("evaluate_path", "artifact_path", "train_path"))
    result, trace = step_result(seed, evaluation), step_lines(seed, evaluation / TRACE)
    try:
        claimed = result[f"bpb_{name}"], [line["bits"][name] for line in trace]
    except (KeyError, TypeError) as error:
        raise RecipeError(f"seed {seed}: {evaluation} has no sound result.json and trace.jsonl ({error!r})") from None
    if not trace or not isinstance(claimed[0], float):
        raise RecipeError(f"seed {seed}: {evaluation} reports no bpb_{name} and no chunks")
    try:
        loaded = artifact.read(file)
    except (artifact.ArtifactError, OSError) as error:
        raise RecipeError(f"seed {seed}: {error}") from None
    if loaded.sha256 != row["artifact_sha256"]:
        raise RecipeError(
            f"seed {seed}: {file} is not the artifact of the row: its sha256 is {loaded.sha256[:16]}…, the row's "
            f"{str(row['artifact_sha256'])[:16]}…"
        )
    recipe = from_dict(Recipe, json.loads(row["config"]))
    data = datasets.load(places["dataset_path"])
    for shard in (*data.valid_shards, *data.train_shards):
        if not Path(shard).is_file():
            raise RecipeError(f"seed {seed}: shard {shard} is not there; put back what dataset.json names")
    return Claim(
        table=table,
        seed=seed,
        name=name,
        row=row,
        recipe=recipe,
        dataset=data,
        artifact=file,
        evaluation=evaluation,
        result=result,
        trace=trace,
        training=training,
        trained=step_result(seed, training),
        log=step_lines(seed, training / LOG),
        quantized=step_result(seed, file.parent),
        header=loaded.header,
    )


def step_result(seed: int, folder: Path) -> dict[str, Any]:
    """Read what the result.json of a step's folder reports; raises RecipeError where there is no sound one."""
    try:
        return dict(read_json(folder / RESULT)["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"seed {seed}: {folder} has no sound {RESULT} ({error!r})") from None


def step_lines(seed: int, path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; raises RecipeError where there is none, or one that is no object a line."""
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"seed {seed}: {path.parent} has no sound {path.name} ({error!r})") from None


def find(table: Path, row: dict[str, Any], column: str) -> Path:
    """Find the row's path, or the same place under the table's own folder."""
    path = Path(row[column] or "")
    if row[column] and path.exists():
        return path
    parts = path.parts
    moved = table.resolve().parent.joinpath(*parts[parts.index(STEPS) :]) if STEPS in parts else None
    if moved is None or not moved.exists():
        where = f" nor at {moved}" if moved else ""
        raise RecipeError(f"seed {row['seed']}: {column} {path} is not there{where}; copy the runs folder as a whole")
    return moved


def columns(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Make the audit columns of a row from the content of audit.json."""
    return {column: verdict[name] for column, name in AUDITED.items()}


def read_columns(evaluation: Path, artifact_sha256: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Read the audit columns from the audit.json in the folder of an evaluation; empty when there is none, when it is
    about another artifact or another result, or an older hedgemix wrote it."""
    try:
        verdict = read_json(evaluation / AUDIT)
        same = verdict["artifact_sha256"] == artifact_sha256 and verdict["result"] == result
        return columns(verdict) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_columns(table: Path, seed: int, values: Mapping[str, Any]) -> None:
    """Set columns of a seed's row; the table stays whole whatever happens."""
    content = pq.read_table(table)
    rows = [row | values if row["seed"] == seed else row for row in content.to_pylist()]
    schema = content.schema
    for column in ADDED:
        if column in values and column not in schema.names:
            schema = schema.append(pa.field(column, pa.string()))
    with replacing(table) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
