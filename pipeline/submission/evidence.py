"""Whether what is handed in is what its files hold: artifact, trace, log, results and audit of every seed are read.

The table is taken for nothing. Its rows are built anew from the result.json files of the steps that the recipe and the
seed name, whose files are hashed; what a row, a file or an audit says otherwise is a contradiction. Whoever forges all
of them alike is not found out here, but by anybody who runs `hedgemix audit` on the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from hedgemix import stages
from hedgemix.audit import own_code, plan
from hedgemix.audit.agreement import brief, trace_faults, unpinned
from hedgemix.audit.claim import PATHS
from hedgemix.audit.seconds import steps_told
from hedgemix.config import Recipe, RecipeError, config_hash, from_dict
from hedgemix.data import dataset as datasets
from hedgemix.evaluate.scoring_order import chunks
from hedgemix.runtime.layout import AUDIT, LOG, RESULT, STEP_NAMES, STEPS, TRACE
from hedgemix.standalone import script
from pipeline.analysis.records import Record, parse_json_lines
from pipeline.results.row import build_row
from pipeline.steps.graph import RecordPlan, SeedSteps, plan_record
from pipeline.steps.step import Step

AUDITED = (
    "order", "bits", "streamed", "self-contained", "world-size", "limits", "unseen", "bytes", "claim", "seconds",
    "coded",
)  # fmt: skip
"""The checks of `hedgemix audit`."""
KEPT = (("quantize", stages.ARTIFACT), ("train", LOG), ("evaluate", TRACE))
"""What is read of each seed, by the kind of the step that made it."""
REPORT = "audit.md"


def contradictions(record: Record) -> list[str]:
    """Name every contradiction between the rows of the finished seeds and their files, a line each: which seed, which
    file, what it says against what. Empty when there is none."""
    why = [*undeclared(record), *shared_artifacts(record)]
    try:
        named = planned(record)
    except (RecipeError, OSError, ValueError, KeyError, TypeError) as error:
        return [*why, f"the steps of record {record.name} cannot be named: {str(error) or repr(error)}"]
    for row in record.done:
        why += [f"seed {row['seed']}: {line}" for line in of_seed(record, named, row)]
    return why


def undeclared(record: Record) -> Iterator[str]:
    """Yield the seeds that the record was started with and the table does not have."""
    path = record.folder / STEP_NAMES
    try:
        declared = {int(seed) for seed in json.loads(record.storage.read_bytes(path) or b"")["seeds"]}
    except (ValueError, KeyError, TypeError):
        yield f"{record.storage.where(path)} is not there, or is none: it names the seeds that were declared"
        return
    there = [row["seed"] for row in record.rows]
    for seed in sorted(declared - {*there}):
        yield f"seed {seed} was declared ({STEP_NAMES}) and the table has no row of it; run the record's command again"
    for seed in sorted({*there} - declared):
        yield f"seed {seed} has a row in the table and was never declared ({STEP_NAMES})"
    for seed in sorted({seed for seed in there if there.count(seed) > 1}):
        yield f"seed {seed} has {there.count(seed)} rows in the table"


def shared_artifacts(record: Record) -> Iterator[str]:
    """Yield the artifacts that are given for more than one seed."""
    seeds: dict[str, list[str]] = {}
    for row in record.done:
        content = record.content(row, "artifact_path")
        if content is not None:
            seeds.setdefault(hashlib.sha256(content).hexdigest(), []).append(str(row["seed"]))
    for sha256, which in seeds.items():
        if len(which) > 1:
            yield f"seeds {', '.join(which)} have one artifact, of sha256 {sha256}: each is trained by itself"


def planned(record: Record) -> RecordPlan:
    """Name the steps that the recipe of the record asks for, from its dataset.json; raises RecipeError, OSError and
    ValueError where that cannot be read."""
    first = record.done[0] if record.done else record.rows[0]
    folder = record.place(first, "dataset_path")
    if folder is None or not record.storage.pull(folder / datasets.FILE_NAME):
        raise RecipeError(f"dataset_path {first['dataset_path']} has no {datasets.FILE_NAME}")
    kind, _, key = folder.name.partition("-")
    made = plan_record(
        record.name,
        from_dict(Recipe, json.loads(first["config"])),
        datasets.load(folder),
        Step(kind, key, record.storage),
        [row["seed"] for row in record.rows],
    )
    return made


def of_seed(record: Record, named: RecordPlan, row: dict[str, Any]) -> Iterator[str]:
    """Yield the contradictions of one seed."""
    steps, standing = named.seeds[row["seed"]], named.seeds[row["seed"]].records()
    lacking = [step for step in steps.all() if step.kind not in standing]
    for step in lacking:
        yield f"{step.name}/{RESULT}, which recipe and seed name, is not there, or is of other files than its parent's"
    if lacking:
        return
    files: dict[str, bytes] = {}
    for kind, name in KEPT:
        step = next(step for step in steps.all() if step.kind == kind)
        content, entry = named.storage.read_bytes(step.folder / name), standing[kind]["files"].get(name)
        files[name] = content or b""
        yield from file_faults(f"{step.name}/{name}", content, entry)
    found = standing["quantize"]["result"]["artifact_sha256"]
    if hashlib.sha256(files[stages.ARTIFACT]).hexdigest() != found:
        yield f"{steps.quantize.name}/{stages.ARTIFACT} is not the artifact of sha256 {found} in its {RESULT}"
    yield from row_faults(named, steps, standing, row)
    yield from line_faults(named, standing, files)
    yield from (
        f"it names {line!r} as a requirement, not name==version" for line in unpinned(row["requirements"] or ())
    )
    if row["audited"]:
        yield from audit_faults(named, steps, standing, files[stages.ARTIFACT])


def file_faults(name: str, content: bytes | None, entry: dict[str, Any] | None) -> Iterator[str]:
    """Yield what a file of a step has otherwise than its entry in result.json."""
    if content is None or entry is None:
        yield f"{name} is not there" if content is None else f"{RESULT} names no {name}"
    elif (len(content), sha256 := hashlib.sha256(content).hexdigest()) != (entry["bytes"], entry["sha256"]):
        yield (
            f"{name} has {len(content):,} bytes and sha256 {sha256[:16]}…, {RESULT} says {entry['bytes']:,} and "
            f"{entry['sha256'][:16]}…"
        )


def row_faults(
    named: RecordPlan, steps: SeedSteps, standing: dict[str, dict[str, Any]], row: dict[str, Any]
) -> Iterator[str]:
    """Yield the columns that are not what the results of the seed's steps make of them."""
    named.storage.pull(steps.evaluate.folder / AUDIT)
    built = asdict(build_row(named, row["seed"], standing, named.counts.record(), None))
    for name, value in built.items():
        said = row[name]
        if name in PATHS:  # the folder may have been moved: from _steps on they are the same
            said, value = (STEPS + str(path).partition(f"/{STEPS}")[2] for path in (said, value))
        if said != value and name not in ("schema_version", "study", "variant"):  # these tell of no step
            yield f"the table says {name} {brief(said)}, its steps' {RESULT} and {AUDIT} {brief(value)}"


def line_faults(named: RecordPlan, standing: dict[str, dict[str, Any]], files: dict[str, bytes]) -> Iterator[str]:
    """Yield where the trace's sums are not the evaluation's result, and the log's steps not the training's."""
    config, total = named.recipe.evaluate, named.dataset.valid_tokens
    places = [piece.stop - piece.start for piece in chunks(total, config.chunk_tokens)]
    yield from trace_faults(parse_json_lines(files[TRACE]), standing["evaluate"]["result"], places)
    try:
        yield from steps_told(parse_json_lines(files[LOG]), standing["train"]["result"], named.recipe.train)
    except (KeyError, TypeError, IndexError) as error:
        yield f"{LOG} cannot be read as a log of steps ({error!r})"


def audit_faults(
    named: RecordPlan, steps: SeedSteps, standing: dict[str, dict[str, Any]], artifact: bytes
) -> Iterator[str]:
    """Yield what the seed's audit.json is about instead of this seed, and what it did not look at."""
    storage, folder = named.storage, steps.evaluate.folder
    try:
        verdict = json.loads(storage.read_bytes(folder / AUDIT) or b"")
        asked = plan.from_json(verdict["plan"])
        passed = {finding["name"]: finding["passed"] is True for finding in verdict["findings"]}
    except (ValueError, KeyError, TypeError) as error:
        yield f"{steps.evaluate.name}/{AUDIT} is not there, or is none of this hedgemix ({error!r}); audit it again"
        return
    report = storage.read_bytes(folder / REPORT) or b""
    expected = {
        "seed": steps.seed,
        "claim": "final",
        "config_hash": config_hash(named.recipe),
        "code_sha256": script.sha256(),
        "artifact_sha256": hashlib.sha256(artifact).hexdigest(),
        "artifact_bytes": len(artifact),
        "result": standing["evaluate"]["result"],
        "tokens": named.dataset.valid_tokens,
        "passed": True,
        "failed": [],
        "report_sha256": hashlib.sha256(report).hexdigest(),
        "audited_with": own_code.digests() | {},
    }
    for name, value in expected.items():
        said = verdict.get(name)
        if name == "audited_with":  # packages may be other ones here; the audit's own code may not
            said, value = ((each or {}).get("hedgemix") for each in (said, value))
        if said != value:
            yield f"{steps.evaluate.name}/{AUDIT} says {name} {brief(said)}, it is {brief(value)}"
    yield from (f"its audit did not pass {name}" for name in AUDITED if not passed.get(name))
    yield from (f"its audit was weaker: {way}" for way in plan.weaker(asked, named.dataset.valid_tokens))
