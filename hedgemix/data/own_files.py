"""Which files of a data folder are ours: nothing else there is ever replaced or removed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from hedgemix.config import RecipeError
from hedgemix.data.reading import MOST_TOLD
from hedgemix.runtime.files import read_json, write_json

DATASET = "dataset.json"
BEGUN = "begun.json"
"""Names the files of a data set that is being made, before each is written: with dataset.json gone and this there, the
making was stopped."""
PATTERNS = ("train_*.bin", "val_*.bin", "tokenizer.model", "memory.ppmd", DATASET)


@dataclass(frozen=True)
class MadeFiles:
    """Says which files a data set has."""

    model: Path
    processor: SentencePieceProcessor
    train: list[Path]
    valid: list[Path]
    known: dict[str, Any]
    """Fields of a `Dataset` that are known by now."""


class OwnFiles:
    """Knows the files that earlier makings left in a folder, and notes those of this one before they are written."""

    def __init__(self, folder: Path, patterns: Iterable[str] = PATTERNS) -> None:
        """Raises RecipeError when the folder is none, cannot be written to, or holds files by the names we use that are
        not ours."""
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"{folder} is not a folder; name one, or a place where one can be made")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise RecipeError(f"{folder} cannot be written to ({error.strerror}); permit it, or name another") from None
        self.names = _named(folder)
        self.shards: dict[str, list[tuple[int, int]]] = {}
        """Where each shard that is whole ends, by train and val: batch, and tokens of it."""
        self._key = ""
        self._resume()
        there = {path.name for pattern in (*patterns, BEGUN) for path in folder.glob(pattern)}
        if others := sorted(there - self.names):
            raise RecipeError(
                f"{folder} holds {', '.join(others[:MOST_TOLD])}{' and others' * (len(others) > MOST_TOLD)}, which no "
                f"{DATASET} there names as made by hedgemix; name another folder, or move them away"
            )

    def begin(self, names: Iterable[str] | None = None, key: str = "") -> None:
        """Remove what an earlier making left (`names`: only these of it), but for the shards that one under the same
        `key` finished before it was stopped."""
        if not key or key != self._key:
            self._key, self.shards = key, {}
        kept = {shard_name(name, number) for name, ends in self.shards.items() for number in range(len(ends))}
        old = (self.names if names is None else self.names & set(names)) - kept - {BEGUN}
        self._note({BEGUN})
        for name in sorted(old):
            (self.folder / name).unlink(missing_ok=True)
        self.names -= old

    def path(self, name: str) -> Path:
        """Note that a file of this name is about to be written, and return its path."""
        self._note({name})
        return self.folder / name

    def shard_is_whole(self, name: str, batch: int, tokens: int) -> None:
        """Note that the next shard of this name is written: up to so many tokens of the batch of this number."""
        self.shards.setdefault(name, []).append((batch, tokens))
        self._note(set())

    def _note(self, names: set[str]) -> None:
        self.names |= names
        write_json(self.folder / BEGUN, {"files": sorted(self.names), "key": self._key, "shards": self.shards})

    def _resume(self) -> None:
        try:
            begun = read_json(self.folder / BEGUN)
            found = {str(name): [(int(batch), int(at)) for batch, at in ends] for name, ends in begun["shards"].items()}
            self._key, self.shards = str(begun["key"]), found
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass


def shard_name(name: str, number: int) -> str:
    """Name the file of the shard of this number, of train or val."""
    return f"{name}_{number:06d}.bin"


def finish(folder: Path) -> None:
    """Say that the making is done: dataset.json names its files."""
    (folder / BEGUN).unlink(missing_ok=True)


def _named(folder: Path) -> set[str]:
    """Names in the folder that its dataset.json, or one that was begun, gives as made there."""
    names: set[str] = set()
    for file in (DATASET, BEGUN):
        try:
            told = read_json(folder / file)
            if file == BEGUN:
                found = told["files"]
            else:
                made = told["source"] != "shards" and [*told["train_shards"], *told["valid_shards"], told["tokenizer"]]
                found = [*(made or []), told.get("memory", "")]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        names |= {file, *(name for name in found if isinstance(name, str) and name and Path(name).name == name)}
    return names
