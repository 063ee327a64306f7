"""The record that trackers are told of."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from hedgemix.config import Recipe, to_dict
from pipeline.results.settings import flatten
from pipeline.storage.store import Storage


@dataclass(frozen=True)
class TrackedRecord:
    """Holds one record as what follows it sees it."""

    storage: Storage
    record: str
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Return the folder of what is written about the record."""
        return self.storage.record_folder(self.record)

    def settings(self) -> dict[str, str]:
        """Flatten the recipe: {"train.steps": "0", ...}; lists are JSON."""
        return {
            name: json.dumps(value) if isinstance(value, (list, tuple)) else str(value)
            for name, value in flatten(to_dict(self.recipe))
        }

    def identity(self) -> str:
        """Draw at random, the first time, what is the record's for good: names and paths may be the same elsewhere."""
        path = self.folder / "tracked.json"
        try:
            return str(json.loads(self.storage.read_bytes(path) or b"")["id"])
        except (ValueError, KeyError, TypeError):  # new, or damaged
            made = secrets.token_hex(8)
            self.storage.write_bytes(path, (json.dumps({"id": made}) + "\n").encode())
            return made
