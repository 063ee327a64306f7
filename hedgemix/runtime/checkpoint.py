"""Checkpoints: states on disk, of which the newest sound one is taken up.

A state is one file, `<name>-<number>.pt`; `<name>.json` lists it with its size and SHA-256 and is replaced last. The
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

from hedgemix.runtime import collectives
from hedgemix.runtime.files import (
    DamagedFileError,
    OnFileWritten,
    load_tensors,
    no_copy,
    read_json,
    save_tensors,
    sha256_of,
    write_json,
)

KEPT = 2


class Checkpoints:
    """Keeps the checkpoints of one piece of work in `folder`, numbered by how far it is. Rank 0 writes, every rank
    loads."""

    def __init__(self, folder: Path, name: str = "checkpoint", kept: OnFileWritten = no_copy) -> None:
        self.folder, self.name, self.kept = folder, name, kept
        self.damaged: list[str] = []
        """What `load` had to pass over."""
        self.failures: list[str] = []
        """Writes that storage refused."""
        self._writing: Thread | None = None
        self._entries = self._read()

    @property
    def pointer(self) -> Path:
        """Name the file that lists the sound ones."""
        return self.folder / f"{self.name}.json"

    def file(self, number: int) -> Path:
        """Name the file of the checkpoint with this number."""
        return self.folder / f"{self.name}-{number}.pt"

    def _read(self) -> list[dict[str, Any]]:
        """number, bytes and sha256 of each, newest first; none when there is no sound list of them."""
        try:
            entries = read_json(self.pointer)["checkpoints"]
            return [
                {"number": int(each["number"]), "bytes": each["bytes"], "sha256": each["sha256"]} for each in entries
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def load(self, device: torch.device | str = "cpu", agree: Callable[[float], list[float]] | None = None) -> Any:
        """Load the newest sound state; None when there is none. Those passed over are named in `damaged` and forgotten.

        agree: gives rank 0's number to every rank, which then loads that very state. Raises OSError when storage fails,
        DamagedFileError on a rank that cannot read what rank 0 took up.
        """
        state, number = None, -1
        while collectives.rank() == 0 and self._entries and state is None:
            try:
                state, number = self._load(self._entries[0], device), self._entries[0]["number"]
            except (FileNotFoundError, DamagedFileError) as error:
                self.damaged.append(str(error))
                self._entries.pop(0)
        if agree is not None:
            number = int(agree(number)[0])
        if collectives.rank() == 0 or number < 0:
            return state
        for entry in self._entries:
            if entry["number"] == number:
                return self._load(entry, device)
        raise DamagedFileError(f"{self.pointer} lists no {self.name} {number} on this rank, which rank 0 took up")

    def _load(self, entry: dict[str, Any], device: torch.device | str) -> Any:
        path = self.file(entry["number"])
        if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise DamagedFileError(f"{path} is not what was written")
        return load_tensors(path, device)

    def save(self, number: int, state: Any) -> None:
        """Copy `state` (nested dicts and lists of tensors and numbers) to the host's memory now and write it beside the
        work, unless the newest has this number. A failed write is told in `failures` and raises nothing: the work goes
        on, with more to lose."""
        self.close()
        if not self._entries or self._entries[0]["number"] != number:
            self._writing = Thread(target=self._write, args=(number, host_copy(state)), name="checkpoint")
            self._writing.start()

    def _write(self, number: int, state: Any) -> None:
        path = self.file(number)
        try:
            save_tensors(path, state)
            self.kept(path)
            entries = [{"number": number, "bytes": path.stat().st_size, "sha256": sha256_of(path)}, *self._entries][
                :KEPT
            ]
            write_json(self.pointer, {"checkpoints": entries})
            self.kept(self.pointer)
            self._entries = entries
            self._remove({self.file(entry["number"]) for entry in entries})
        except OSError as error:
            self.failures.append(f"{type(error).__name__}: {error}")

    def _remove(self, keep: set[Path]) -> None:
        for old in set(self.folder.glob(f"{self.name}-*.pt")) - keep:
            old.unlink(missing_ok=True)

    def close(self) -> None:
        """Wait until what is being written is on disk, or has failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def clear(self) -> None:
        """Forget every checkpoint."""
        self.close()
        self._entries = []
        self.pointer.unlink(missing_ok=True)
        self._remove(set())


def host_copy(state: Any) -> Any:
    """Copy a nest of dicts, lists and tensors with every tensor in the host's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: host_copy(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [host_copy(value) for value in state]
    return state
