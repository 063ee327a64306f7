"""The settings that a record was begun with, and which of them another start of it may change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hedgemix.config import Recipe, RecipeError, to_dict
from hedgemix.runtime.layout import STEP_NAMES
from hedgemix.standalone import script
from pipeline.storage.store import Storage

MOVE_NO_NUMBER = frozenset(f"compute.{name}" for name in script.NOT_NEEDED)
"""What neither a step nor train_gpt.py depends on: how often work is begun again, and how often it is saved. Not among
them are CPUs, whose number is part of how training adds up, evaluating ranks, which train_gpt.py starts and seconds
depend on, and limits, which every row is held against."""


def keep_recipe(storage: Storage, path: Path, recipe: Recipe, record: str) -> None:
    """Write the recipe where the record lies, also in place of one that differs in settings that move no number, or of
    which no step was begun, as after a mistake in a path. Raises RecipeError, with every difference, when the record
    was begun with another: its table compares seeds, not settings."""
    now = to_dict(recipe)
    try:
        begun = json.loads(storage.read_bytes(path) or b"")
    except ValueError:  # new, or damaged: nothing else is lost with it
        begun = None
    changed = {} if begun is None else differences(begun, now)
    refused = {name: values for name, values in changed.items() if name not in MOVE_NO_NUMBER}
    left = path.with_name(STEP_NAMES), storage.root / f"{record}.parquet"
    if refused and any(storage.modified(each) is not None for each in left):
        told = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in refused.items())
        raise RecipeError(
            f"record {record} was begun with other settings ({storage.where(path)}): {told}; give this one another "
            "--record, or the settings that it was begun with"
        )
    if begun is None or changed:
        storage.write_bytes(path, (json.dumps(now, indent=1) + "\n").encode())


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Find the fields in which two configurations differ, with both values as JSON ("not there" without)."""
    one, other = dict(flatten(old)), dict(flatten(new))
    return {
        name: (_shown(one, name), _shown(other, name))
        for name in [*one, *(name for name in other if name not in one)]
        if name not in one or name not in other or one[name] != other[name]
    }


def _shown(fields: dict[str, Any], name: str) -> str:
    return json.dumps(fields[name], ensure_ascii=False) if name in fields else "not there"


def flatten(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of a nested configuration with its dotted name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
