"""A study as its readers take it up: the file its driver wrote, and the record of its base and of every variant.

    _studies/NAME/study.json     name, recipe, record of the base, seeds; every variant's name, record and fields
    _studies/NAME/stopped.json   of variants whose seeds a rule added: how many, and what the rule said last

A variant without a table, or with one that cannot be read, is a variant without seeds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hedgemix.config import RecipeError
from pipeline.analysis import records
from pipeline.analysis.records import Record
from pipeline.results.table import table_path
from pipeline.storage.store import REMOTE_URI, Storage, as_recipe_error, storage_at

STUDIES = "_studies"
"""Folder of the runs folder: one folder a study."""
STUDY, STOPPED = "study.json", "stopped.json"


@dataclass(frozen=True)
class Variant:
    """Holds what is known of one variant, or of the base."""

    name: str
    record: Record
    """Without rows when there is no table, or none that can be read."""
    fields: dict[str, Any]
    """Dotted names of what differs from the base -> values."""
    why_stopped: str = ""
    """What the rule that added seeds said last; empty without one."""


@dataclass(frozen=True)
class Study:
    """Holds a study's variants in their file's order; `base` is none of them."""

    name: str
    recipe: str
    storage: Storage
    base: Variant
    variants: tuple[Variant, ...]

    @property
    def folder(self) -> Path:
        """Return the folder of what is written about the study."""
        return self.storage.root / STUDIES / self.name


def load(run: str) -> Study:
    """Load the study of a study.json (a path, or an address in a store), of its folder, or of a runs folder that holds
    one study alone. Raises RecipeError when there is none, or its file is no study's."""
    return load_named(*find(run))


def load_named(storage: Storage, name: str) -> Study:
    """Load the study of this name in the runs folder. Raises RecipeError when it is not there, or its file is no
    study's."""
    path = storage.root / STUDIES / name / STUDY
    with as_recipe_error(storage, "RUN"):
        content = storage.read_bytes(path)
        stopped = storage.read_bytes(path.with_name(STOPPED)) if content is not None else None
    if content is None:
        raise RecipeError(f"{storage.where(path)} is not there; give the {STUDY} of a study, or the runs folder of one")
    try:
        told, whys = json.loads(content), json.loads(stopped or b"{}")
        base = Variant("base", load_record(storage, told["base"]), {})
        variants = tuple(
            Variant(
                str(each["name"]),
                load_record(storage, each["record"]),
                dict(each["fields"]),
                str(whys.get(each["name"], {}).get("why", "")),
            )
            for each in told["variants"]
        )
        return Study(name, str(told["recipe"]), storage, base, variants)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise RecipeError(f"{storage.where(path)} is no study's file ({why}); run the study's command again") from None


def find(run: str) -> tuple[Storage, str]:
    """Find the study that `run` names: its runs folder, and its name. Raises RecipeError when it names none, or a
    runs folder of several."""
    if REMOTE_URI.match(run):
        address, mark, query = run.partition("?")
        *above, studies, name, file = ["", "", *address.rstrip("/").split("/")]
        if studies != STUDIES or file != STUDY:
            raise RecipeError(f"{address} is no study; give s3://bucket/prefix/{STUDIES}/NAME/{STUDY}")
        storage = storage_at("/".join(above[2:]) + mark + query)
        with as_recipe_error(storage, "RUN"):
            storage.ready()
        return storage, name
    path = Path(run).resolve()
    if path.name == STUDY:
        path = path.parent
    if path.parent.name == STUDIES:
        return Storage("", path.parent.parent), path.name
    names = sorted(file.parent.name for file in (path / STUDIES).glob(f"*/{STUDY}"))
    if len(names) != 1:
        which = f": {', '.join(names)}" if names else ""
        raise RecipeError(f"{run} holds {len(names)} studies{which}; give {STUDIES}/NAME/{STUDY} of one")
    return Storage("", path), names[0]


def load_record(storage: Storage, name: str) -> Record:
    """Load the record of this name; without rows when it has no table, or none that can be read. Raises ValueError for
    a name that leads out of the runs folder."""
    if PurePosixPath(name).name != name:
        raise ValueError(f"{name!r} is no record's name")
    try:
        content = storage.read_bytes(table_path(storage, name))
        return Record(name, storage, [] if content is None else records.rows(content, name))
    except RecipeError:
        return Record(name, storage, [])
