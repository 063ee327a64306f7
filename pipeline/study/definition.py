"""A study: a recipe and its variants, each a record of its own, and the file that tells its readers which they are.

A record by itself is a study of its base alone, without a name and without a file.

    _studies/<study>/study.json      what follows; renewed by every start, which may add variants and seeds
    _studies/<study>/stopped.json    with --until: {variant: {"seeds": how many it got, "why": why no more}}
    _studies/<study>/study.lock      held by the study's driver
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from hedgemix.config import Recipe, RecipeError, config_hash
from hedgemix.runtime.layout import LOCK
from pipeline.analysis.study import STOPPED, STUDIES, STUDY
from pipeline.storage.lease import Held
from pipeline.storage.lock import hold
from pipeline.storage.store import Storage
from pipeline.study.variants import BASE, Variant

STUDY_LOCK = "study.lock"
LONGEST_RECORD = 120
"""Characters of a record's name, which becomes a file's."""
UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
"""What the name of a variant's record has a hyphen for."""


@dataclass(frozen=True)
class StudyRecord:
    """Names one record of a study, and what it differs in from the base."""

    name: str
    variant: str
    recipe: Recipe
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Holds the records that one start is about; the base comes first."""

    name: str
    """Empty for a record by itself."""
    records: tuple[StudyRecord, ...]

    @property
    def base(self) -> StudyRecord:
        """Return the record of the recipe that the others vary."""
        return self.records[0]

    @property
    def variants(self) -> tuple[StudyRecord, ...]:
        """Return the records of the variants."""
        return self.records[1:]


def default_name(recipe: Recipe) -> str:
    """Name a record, or a study of its variants, by the recipe's name and its configuration's hash."""
    return f"{recipe.recipe}-{config_hash(recipe)[:8]}"


def folder(storage: Storage, study: str) -> Path:
    """Return the folder of what is written about the study of this name."""
    return storage.root / STUDIES / study


def alone(recipe: Recipe, name: str) -> Study:
    """Make the study that one record is."""
    return Study("", (StudyRecord(name, "", recipe),))


def of_variants(storage: Storage, name: str, recipe: Recipe, variants: Iterable[Variant]) -> Study:
    """Name the records of the variants; those that the study's file has keep their names. Raises RecipeError for a
    variant whose name stands there for other fields."""
    known = {each["name"]: each for each in read(storage, name)["variants"]}
    by_fields = {canonical(each["fields"]): each for each in known.values()}
    taken = {name, *(each["record"] for each in known.values())}
    records = [StudyRecord(name, BASE, recipe)]
    for variant in variants:
        if same := by_fields.get(canonical(variant.fields)):
            records.append(StudyRecord(same["record"], same["name"], variant.recipe, variant.fields))
            continue
        if variant.name in known:
            raise RecipeError(
                f"variant {variant.name!r} of study {name} was begun with {canonical(known[variant.name]['fields'])}; "
                "give this one another name"
            )
        record = record_name(name, variant.name, taken)
        taken.add(record)
        records.append(StudyRecord(record, variant.name, variant.recipe, variant.fields))
    return Study(name, tuple(records))


def canonical(values: dict[str, Any]) -> str:
    """Write fields as JSON in one form."""
    return json.dumps(values, sort_keys=True)


def record_name(study: str, variant: str, taken: Iterable[str]) -> str:
    """Name a variant's record: the study's name and the variant's in characters that every storage takes; what is too
    long or taken ends in a hash of the variant's name."""
    safe = UNSAFE.sub("-", variant.replace("=", "-").replace(",", "--")).strip("-.") or "variant"
    whole = f"{study}-{safe}"
    if len(whole) <= LONGEST_RECORD and whole not in taken:
        return whole
    return f"{whole[: LONGEST_RECORD - 9]}-{config_hash(variant)[:8]}"


def read(storage: Storage, study: str) -> dict[str, Any]:
    """Read the study's file; one that is not there, or damaged, has no seeds and no variants."""
    try:
        found = json.loads(storage.read_bytes(folder(storage, study) / STUDY) or b"")
        wanted = {"name": str, "record": str, "fields": dict}
        if isinstance(found["seeds"], list) and all(
            isinstance(each[name], kind) for each in found["variants"] for name, kind in wanted.items()
        ):
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    return {"seeds": [], "variants": []}


def write(storage: Storage, study: Study, seeds: Iterable[int]) -> None:
    """Write the study's file before work starts, with what earlier starts put there."""
    before = read(storage, study.name)
    variants = {each["name"]: each for each in before["variants"]}
    for record in study.variants:
        variants[record.variant] = {"name": record.variant, "record": record.name, "fields": record.fields}
    told = {
        "study": study.name,
        "recipe": study.base.recipe.recipe,
        "base": study.base.name,
        "seeds": list(dict.fromkeys([*before["seeds"], *seeds])),
        "variants": list(variants.values()),
    }
    storage.write_bytes(folder(storage, study.name) / STUDY, (json.dumps(told, indent=1) + "\n").encode())


def write_stopped(storage: Storage, study: str, stopped: dict[str, dict[str, Any]]) -> None:
    """Write why each variant got no more seeds, beside what earlier starts wrote of others."""
    path = folder(storage, study) / STOPPED
    try:
        before = dict(json.loads(storage.read_bytes(path) or b""))
    except (ValueError, TypeError):  # new, or damaged
        before = {}
    storage.write_bytes(path, (json.dumps(before | stopped, indent=1) + "\n").encode())


@contextmanager
def naming(record: StudyRecord) -> Iterator[None]:
    """Raise a RecipeError as one that names the variant, if the record is one's."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"variant {record.variant!r}: {error}" if record.fields else str(error)) from None


def hold_records(held: ExitStack, storage: Storage, study: Study, console: Console) -> dict[str, Held]:
    """Hold the study and each of its records until `held` ends; returns what is had of each lock, by the record's name,
    of the study's by ""."""
    waiting = "another driver holds this record; waiting to see whether it lives"
    locks = {"": folder(storage, study.name) / STUDY_LOCK} if study.name else {}
    locks |= {record.name: storage.record_folder(record.name) / LOCK for record in study.records}
    return {
        name: held.enter_context(hold(storage, lock, lambda: console.print(waiting))) for name, lock in locks.items()
    }
