"""Checkpoints: states on disk, of which the newest sound one is taken up.

A state is one file, `<name>-<number>.pt`; `<name>.json` names it with its size and SHA-256 and is replaced last. The
one before is kept too, so a file that storage damaged costs the work between two checkpoints, not all of it. The sums
are our own because torch's format does not notice a flipped bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from hedgemix.files import DamagedFileError, load_tensors, read_json, save_tensors, sha256_of, write_json

KEPT = 2

Kept = Callable[[Path], None]
"""Told of every file a restart needs, each time it is whole on disk; on any thread, oldest first."""


def nothing(path: Path) -> None:
    """Keeps no copy."""


class Checkpoints:
    """The checkpoints of one piece of work in `folder`. One process writes them; every rank may load."""

    def __init__(self, folder: Path, name: str = "checkpoint", kept: Kept = nothing) -> None:
        self.folder, self.name, self.kept = folder, name, kept
        self.damaged: list[str] = []
        """What `load` had to pass over."""
        self.failure = ""
        """Why the last write failed; empty when it did not."""
        self._writing: Thread | None = None
        self._entries: list[dict[str, Any]] = self._read()

    @property
    def pointer(self) -> Path:
        return self.folder / f"{self.name}.json"

    def _read(self) -> list[dict[str, Any]]:
        """The entries on disk, newest first; none when there is no sound list of them."""
        try:
            entries = read_json(self.pointer)["checkpoints"]
            return [
                {"file": Path(entry["file"]).name, **{key: entry[key] for key in ("bytes", "sha256")}}
                for entry in entries
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The newest sound state, or None; damaged ones are named in `damaged`. Raises OSError when storage fails."""
        for entry in self._entries:
            path = self.folder / entry["file"]
            try:
                if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                    raise DamagedFileError(f"{path} is not what was written")
                return load_tensors(path, device)
            except (FileNotFoundError, DamagedFileError) as error:
                self.damaged.append(str(error))
        return None

    def busy(self) -> bool:
        """Whether a state is still being written."""
        return self._writing is not None and self._writing.is_alive()

    def save(self, number: int, state: Any) -> None:
        """Copy `state` (nested dicts and lists of tensors and numbers) to the host's memory now and write it beside the
        work. A failed write is told in `failure` and raises nothing: the work goes on, with more to lose."""
        self.wait()
        copied = host_copy(state)
        self._writing = Thread(target=self._write, args=(number, copied), name="checkpoint")
        self._writing.start()

    def _write(self, number: int, state: Any) -> None:
        path = self.folder / f"{self.name}-{number}.pt"
        try:
            save_tensors(path, state)
            self.kept(path)
            new = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            entries = [new, *(entry for entry in self._entries if entry["file"] != path.name)]
            write_json(self.pointer, {"checkpoints": entries[:KEPT]})
            self.kept(self.pointer)
            self._entries = entries[:KEPT]
            named = {entry["file"] for entry in self._entries}
            for old in self.folder.glob(f"{self.name}-*.pt"):
                if old.name not in named:
                    old.unlink(missing_ok=True)
            self.failure = ""
        except OSError as error:
            self.failure = f"{type(error).__name__}: {error}"

    def wait(self) -> None:
        """Until what is being written is on disk, or has failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def clear(self) -> None:
        """Forget every checkpoint."""
        self.wait()
        self._entries = []
        self.pointer.unlink(missing_ok=True)
        for old in self.folder.glob(f"{self.name}-*.pt"):
            old.unlink(missing_ok=True)


def host_copy(state: Any) -> Any:
    """The same nest with every tensor copied into the host's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: host_copy(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [host_copy(value) for value in state]
    return state
