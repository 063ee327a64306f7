"""Where the runs folder lies: a local or shared folder, or an object store behind a folder of this machine.

All work is done on files under `root`. A folder is its own storage; of an object store (s3://, gs://) `root` is this
machine's scratch, and what must outlive the machine is pushed to the store and pulled from it by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import ArrowException, fs

from hedgemix.config import RecipeError
from hedgemix.files import replacing
from pipeline.objects import CHUNK_BYTES, apart, cause, connect, place, plain, put, put_file

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
TRIES = 3
"""Of reading an object that is replaced meanwhile."""


@dataclass(frozen=True)
class Storage:
    """Travels by value; paths it is given lie under `root` (ValueError otherwise). Methods raise OSError when the store
    fails."""

    uri: str
    """Empty for a folder."""
    root: Path

    @property
    def remote(self) -> bool:
        return bool(self.uri)

    def inside(self, path: Path) -> str:
        """The path relative to root, with forward slashes."""
        full = path if path.is_absolute() else self.root / path
        if ".." in full.parts or not full.is_relative_to(self.root):
            raise ValueError(f"{path} is not under {self.root}")
        return "" if full == self.root else full.relative_to(self.root).as_posix()

    def key(self, path: Path) -> str:
        """bucket/prefix/path, as pyarrow names it."""
        return "/".join(part for part in (place(self.uri)[1], self.inside(path)) if part)

    def where(self, path: Path) -> str:
        """For people and tables: a path, or a URI without its options."""
        return f"{place(self.uri)[0]}://{self.key(path)}" if self.remote else str(self.root / self.inside(path))

    def ready(self) -> Path:
        """The root, made on this machine; on every node before the first file is written there."""
        if self.remote:
            private_folder(self.root.parent)
            private_folder(self.root)
        return self.root

    def push(self, path: Path) -> None:
        """The file goes up whole or not at all; what was under its name stays until then. FileNotFoundError when it
        is not there."""
        if self.remote:
            key = self.key(path)
            apart(lambda: put_file(connect(self.uri), key, self.root / path))

    def write_bytes(self, path: Path, data: bytes) -> None:
        """To the store alone; of a folder, to the file. Whole or not at all."""
        if self.remote:
            key = self.key(path)
            apart(lambda: put(connect(self.uri), key, io.BytesIO(data)))
        else:
            with replacing(self.root / self.inside(path)) as file:
                file.write(data)

    def read_bytes(self, path: Path) -> bytes | None:
        """What the store holds now, for small files; None when it is not there."""
        if self.remote:
            held = io.BytesIO()
            return held.getvalue() if self._fetch(path, held) else None
        try:
            return (self.root / self.inside(path)).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def pull(self, path: Path) -> bool:
        """Fetch to its place, whole or not at all, over what is there; False when the store does not have it."""
        local = self.root / self.inside(path)
        if not self.remote:
            return local.exists()
        self.ready()
        if not local.parent.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"{path} leads out of {self.root} by a link")
        if self._seen(self.key(path)) is None:
            return False
        with replacing(local) as file:
            if self._fetch(path, file):
                return True
            raise OSError(f"{self.where(path)} was removed while it was read")

    def _seen(self, key: str) -> tuple[int, Any] | None:
        info = connect(self.uri).get_file_info(key)
        return (info.size, info.mtime) if info.type == fs.FileType.File else None

    def _fetch(self, path: Path, file: BinaryIO) -> bool:
        """Arrow asks for a range at a time, so an object replaced meanwhile would come out mixed or cut short."""
        key = self.key(path)
        for _ in range(TRIES):
            file.seek(0)
            file.truncate()
            before = self._seen(key)
            if before is None:
                return False
            try:
                with connect(self.uri).open_input_stream(key, compression=None) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        file.write(chunk)
            except FileNotFoundError:
                return False
            if file.tell() == before[0] and self._seen(key) == before:
                return True
        raise OSError(f"{self.where(path)} was replaced {TRIES} times while it was read")

    def modified(self, path: Path) -> float | None:
        """When it was last written, in seconds by the store's clock (S3: whole seconds); None when not there."""
        if not self.remote:
            local = self.root / self.inside(path)
            return local.stat().st_mtime if local.exists() else None
        seen = self._seen(self.key(path))
        return None if seen is None else seen[1].timestamp()

    def names(self, folder: Path) -> dict[str, int]:
        """Files anywhere under the folder: name relative to it -> bytes. Keys that are no plain relative path, which
        others may have written, are left out."""
        if not self.remote:
            under = self.root / self.inside(folder)
            return {
                file.relative_to(under).as_posix(): file.stat().st_size for file in under.rglob("*") if file.is_file()
            }
        base = self.key(folder)
        found = connect(self.uri).get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        files = {info.path.removeprefix(base + "/"): info.size for info in found if info.type == fs.FileType.File}
        return {name: size for name, size in files.items() if plain(name)}

    def remove(self, path: Path) -> None:
        """From the store alone; of a folder, the file. Not there is well."""
        if not self.remote:
            (self.root / self.inside(path)).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            connect(self.uri).delete_file(self.key(path))

    def prune(self, folder: Path, pattern: str, keep: Collection[str]) -> None:
        """Remove the files directly in the folder whose names match and are not among `keep`."""
        for name in self.names(folder):
            if "/" not in name and fnmatchcase(name, pattern) and name not in keep:
                self.remove(folder / name)


def open_storage(out: str, scratch: Path | None = None) -> Storage:
    """The storage that --out names, tried: an object store must take, give back and remove a small object.

    `scratch` (else $HEDGEMIX_SCRATCH, else the temporary folder) holds the working copy of an object store, at the same
    path on every node. Raises RecipeError with the cause; no message repeats a URI that may hold a secret.
    """
    if not REMOTE.match(out):
        return Storage("", local_folder(out))
    storage = store(out, scratch)
    storage.ready()
    with told(storage, "--out"):
        attempt(storage)
    return storage


def look_at(out: str) -> Storage:
    """The storage that is there already, to read small files of; makes and writes nothing. Raises RecipeError."""
    if not REMOTE.match(out):
        folder = Path(out)
        if not folder.is_dir():
            raise RecipeError(f"--status {out} is no folder; name the runs folder that --out named")
        return Storage("", folder.resolve())
    storage = store(out)
    with told(storage, "--status"):
        storage.modified(storage.root / "any")
    return storage


def store(out: str, scratch: Path | None = None) -> Storage:
    """The storage of an address, not tried."""
    address, mark, query = out.partition("?")
    uri = address.rstrip("/") + mark + query
    place(uri)
    above = scratch or Path(os.environ.get("HEDGEMIX_SCRATCH") or tempfile.gettempdir())
    return Storage(uri, above.resolve() / f"hedgemix-{os.getuid()}" / hashlib.sha256(uri.encode()).hexdigest()[:16])


@contextlib.contextmanager
def told(storage: Storage, option: str) -> Iterator[None]:
    """A store that fails is a RecipeError with the cause."""
    try:
        yield
    except (OSError, ArrowException) as error:
        bucket = place(storage.uri)[1].partition("/")[0]
        raise RecipeError(f"{option} {storage.where(storage.root)}: {cause(error, bucket)}") from None


def attempt(storage: Storage) -> None:
    """Look, write, read and remove a small object."""
    path, data = storage.root / f".hedgemix-{secrets.token_hex(8)}", secrets.token_bytes(16)
    try:
        storage.modified(path)
    except OSError as error:
        if "NETWORK_CONNECTION" in str(error):  # which a write would notice much later
            raise
    storage.write_bytes(path, data)
    if storage.read_bytes(path) != data:
        raise OSError("a small object did not come back as it was written")
    storage.remove(path)


def local_folder(out: str) -> Path:
    """Absolute, made, and refused where it would vanish with a job's working directory."""
    folder = Path(out)
    if "working_dir_files" in Path.cwd().parts and not folder.is_absolute():
        raise RecipeError(
            f"--out {out} is relative, and a job's working directory is removed after it; give an absolute path on "
            "storage that all nodes share"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {out} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"--out {out} cannot be written to by this user")
    return folder.resolve()


def private_folder(folder: Path) -> None:
    """Made for this user alone, and refused when another made it: temporary folders are everybody's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RecipeError(f"scratch {folder} cannot be made ({error.strerror}); set HEDGEMIX_SCRATCH") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RecipeError(f"scratch {folder} belongs to another user; set HEDGEMIX_SCRATCH to a folder of yours")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
