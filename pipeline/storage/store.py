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
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from pyarrow import ArrowException, fs

from hedgemix.config import RecipeError
from hedgemix.runtime.files import replacing
from hedgemix.runtime.layout import RECORDS
from pipeline.storage import conditional
from pipeline.storage.conditional import Version
from pipeline.storage.object_store import (
    CHUNK_BYTES,
    connect,
    explain_failure,
    is_safe_relative_path,
    parse_uri,
    put,
    put_file,
    run_on_thread,
)

REMOTE_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
READ_ATTEMPTS = 3
"""How often reading begins anew when the object was replaced meanwhile."""


@dataclass(frozen=True)
class Storage:
    """Names where a runs folder lies, and travels by value; paths it is given lie under `root` (ValueError otherwise).
    Methods raise OSError when the store fails."""

    uri: str
    """Empty for a folder."""
    root: Path
    conditional: bool = False
    """Whether the store was tried, and writes on a condition (`put_if`)."""

    @property
    def remote(self) -> bool:
        """Say whether this is an object store."""
        return bool(self.uri)

    def record_folder(self, record: str) -> Path:
        """Return the folder of what is written about the record of this name."""
        return self.root / RECORDS / record

    def relative_path(self, path: Path) -> str:
        """Return the path relative to root, with forward slashes; raises ValueError when it is not under root."""
        full = path if path.is_absolute() else self.root / path
        if ".." in full.parts or not full.is_relative_to(self.root):
            raise ValueError(f"{path} is not under {self.root}")
        return "" if full == self.root else full.relative_to(self.root).as_posix()

    def local_path(self, path: Path) -> Path:
        """Return the file's place under root; raises ValueError as `relative_path` does."""
        return self.root / self.relative_path(path)

    def key(self, path: Path) -> str:
        """Return bucket/prefix/path, as pyarrow names an object."""
        return "/".join(part for part in (parse_uri(self.uri).base, self.relative_path(path)) if part)

    def where(self, path: Path) -> str:
        """Name the file for people and tables: a path, or a URI without its options."""
        return f"{parse_uri(self.uri).scheme}://{self.key(path)}" if self.remote else str(self.local_path(path))

    def ready(self) -> Path:
        """Make the root on this machine and return it; for every node, before the first file is written there."""
        if self.remote:
            make_private_folder(self.root.parent)
            make_private_folder(self.root)
        return self.root

    def push(self, path: Path) -> None:
        """Upload the file whole or not at all; what was under its name stays until then. Raises FileNotFoundError when
        it is not there."""
        if self.remote:
            key = self.key(path)
            run_on_thread(lambda: put_file(connect(self.uri), key, self.root / path))

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write to the store alone (of a folder, to the file), whole or not at all."""
        if self.remote:
            key = self.key(path)
            run_on_thread(lambda: put(connect(self.uri), key, io.BytesIO(data)))
        else:
            with replacing(self.local_path(path)) as file:
                file.write(data)

    def read_bytes(self, path: Path) -> bytes | None:
        """Return what the store holds now, of a small file; None when it is not there."""
        if self.remote:
            content = io.BytesIO()
            return content.getvalue() if self._download(path, content) else None
        try:
            return self.local_path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_version(self, path: Path) -> Version | None:
        """Return what a `conditional` store holds now, of a small file, with its tag; None when it is not there."""
        return conditional.read_version(self.uri, self.key(path))

    def put_if(self, path: Path, data: bytes, tag: str | None) -> str | None:
        """Write to a `conditional` store if the file's tag there is this one (None: if it is not there), and return its
        new tag; None when another has written it. `data` are bytes that nobody else writes."""
        return conditional.put_if(self.uri, self.key(path), data, tag)

    def pull(self, path: Path) -> bool:
        """Fetch to its place, whole or not at all, over what is there; False when the store does not have it."""
        local = self.local_path(path)
        if not self.remote:
            return local.exists()
        self.ready()
        if not local.parent.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"{path} leads out of {self.root} by a link")
        if self._stat(self.key(path)) is None:
            return False
        with replacing(local) as file:
            if self._download(path, file):
                return True
            raise OSError(f"{self.where(path)} was removed while it was read")

    def _stat(self, key: str) -> tuple[int, datetime] | None:
        """Return size in bytes and time of the last write; None when there is no such object."""
        info = connect(self.uri).get_file_info(key)
        return (info.size, info.mtime) if info.type == fs.FileType.File else None

    def _download(self, path: Path, file: BinaryIO) -> bool:
        """Read the object into the file; False when it is not there. Arrow asks for a range at a time, so one that is
        replaced meanwhile would come out mixed or cut short."""
        key = self.key(path)
        for _ in range(READ_ATTEMPTS):
            file.seek(0)
            file.truncate()
            before = self._stat(key)
            if before is None:
                return False
            try:
                with connect(self.uri).open_input_stream(key, compression=None) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        file.write(chunk)
            except FileNotFoundError:
                return False
            if file.tell() == before[0] and self._stat(key) == before:
                return True
        raise OSError(f"{self.where(path)} was replaced {READ_ATTEMPTS} times while it was read")

    def modified(self, path: Path) -> float | None:
        """Return when it was last written, in seconds by the store's clock (S3: whole seconds); None when not there."""
        if not self.remote:
            local = self.local_path(path)
            return local.stat().st_mtime if local.exists() else None
        status = self._stat(self.key(path))
        return None if status is None else status[1].timestamp()

    def names(self, folder: Path, recursive: bool = True) -> dict[str, int]:
        """List the files anywhere under the folder, or directly in it: name relative to it -> bytes. Keys that are no
        safe relative path, which others may have written, are left out."""
        if not self.remote:
            under = self.local_path(folder)
            found = under.rglob("*") if recursive else under.glob("*")
            return {file.relative_to(under).as_posix(): file.stat().st_size for file in found if file.is_file()}
        base = self.key(folder)
        objects = connect(self.uri).get_file_info(fs.FileSelector(base, recursive=recursive, allow_not_found=True))
        files = {info.path.removeprefix(base + "/"): info.size for info in objects if info.type == fs.FileType.File}
        return {name: size for name, size in files.items() if is_safe_relative_path(name)}

    def remove(self, path: Path) -> None:
        """Remove from the store alone (of a folder, the file), if it is there."""
        if not self.remote:
            self.local_path(path).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            connect(self.uri).delete_file(self.key(path))

    def prune(self, folder: Path, pattern: str, keep: Collection[str]) -> None:
        """Remove the files directly in the folder whose names match and are not among `keep`."""
        for name in self.names(folder, recursive=False):
            if fnmatchcase(name, pattern) and name not in keep:
                self.remove(folder / name)


def open_storage(out: str, scratch: Path | None = None, tell: Callable[[str], None] = lambda line: None) -> Storage:
    """Open the storage that --out names, and try it: an object store must take, give back and remove a small object.
    Where it writes on no condition, `tell` is told why, and what that means.

    `scratch` (else $HEDGEMIX_SCRATCH, else the temporary folder) holds the working copy of an object store, at the same
    path on every node. Raises RecipeError with the cause; no message repeats a URI that may hold a secret.
    """
    if not REMOTE_URI.match(out):
        return Storage("", make_local_folder(out))
    storage = storage_at(out, scratch)
    storage.ready()
    with as_recipe_error(storage, "--out"):
        check_access(storage)
        why = conditional.why_not(storage.uri, storage.key(storage.root / f".hedgemix-{secrets.token_hex(8)}"))
    if why:
        tell(f"note: {why}: a lease, weaker than a lock, keeps others off records here (docs/storage.md)")
    return replace(storage, conditional=not why)


def open_existing(out: str) -> Storage:
    """Open the storage that is there already, to read small files of it; makes and writes nothing. Raises
    RecipeError."""
    if not REMOTE_URI.match(out):
        folder = Path(out)
        if not folder.is_dir():
            raise RecipeError(f"--status {out} is no folder; name the runs folder that --out named")
        return Storage("", folder.resolve())
    storage = storage_at(out)
    with as_recipe_error(storage, "--status"):
        storage.modified(storage.root / "any")
    return storage


def storage_at(out: str, scratch: Path | None = None) -> Storage:
    """Return the storage of a URI without trying it. Raises RecipeError for a URI that is none or holds a secret."""
    address, mark, query = out.partition("?")
    uri = address.rstrip("/") + mark + query
    parse_uri(uri)
    above = scratch or Path(os.environ.get("HEDGEMIX_SCRATCH") or tempfile.gettempdir())
    return Storage(uri, above.resolve() / f"hedgemix-{os.getuid()}" / hashlib.sha256(uri.encode()).hexdigest()[:16])


@contextlib.contextmanager
def as_recipe_error(storage: Storage, option: str) -> Iterator[None]:
    """Raise a RecipeError with the cause for a store that fails inside."""
    try:
        yield
    except (OSError, ArrowException) as error:
        bucket = parse_uri(storage.uri).base.partition("/")[0]
        raise RecipeError(f"{option} {storage.where(storage.root)}: {explain_failure(error, bucket)}") from None


def check_access(storage: Storage) -> None:
    """Look at, write, read and remove a small object; raises OSError when one of that fails."""
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


def make_local_folder(out: str) -> Path:
    """Make the folder and return its absolute path. Raises RecipeError where it would vanish with a job's working
    directory or cannot be written to."""
    folder = Path(out)
    if "working_dir_files" in Path.cwd().parts and not folder.is_absolute():
        raise RecipeError(
            f"--out {out} is relative, and a job's working directory is removed after it; give an absolute path on "
            "storage that all nodes share"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {out} cannot be made: {error.strerror}; name another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"--out {out} cannot be written to by this user; permit it, or name another folder")
    return folder.resolve()


def make_private_folder(folder: Path) -> None:
    """Make the folder for this user alone. Raises RecipeError when another made it: temporary folders are
    everybody's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise RecipeError(f"scratch {folder} cannot be made ({error.strerror}); set HEDGEMIX_SCRATCH") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise RecipeError(f"scratch {folder} belongs to another user; set HEDGEMIX_SCRATCH to a folder of yours")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
