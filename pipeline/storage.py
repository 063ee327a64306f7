"""Where the runs folder lies: a local or shared folder, or an object store behind a folder of this machine.

All work is done on files under `root`. A folder is its own storage; of an object store (s3://, gs://) `root` is this
machine's scratch, and what must outlive the machine is pushed to the store and pulled from it by name.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from pyarrow import fs

from hedgemix.config import RecipeError
from hedgemix.files import replacing

OPTIONS = ("region", "scheme", "endpoint_override")
"""What may follow the ? of a URI, named as pyarrow and pandas name it; everything else could carry a secret."""
ACCEPTED = "give a folder, s3://bucket/prefix or gs://bucket/prefix"
CHUNK_BYTES = 8 * 2**20
CONNECT_SECONDS, ANSWER_SECONDS, ATTEMPTS = 4, 4, 3
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
        except FileNotFoundError:
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
        try:
            connect(self.uri).delete_file(self.key(path))
        except FileNotFoundError:
            pass

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
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", out):
        return Storage("", local_folder(out))
    uri = out.rstrip("/") if "?" not in out else out
    _, base, _ = place(uri)
    above = scratch or Path(os.environ.get("HEDGEMIX_SCRATCH") or tempfile.gettempdir())
    root = above.resolve() / f"hedgemix-{os.getuid()}" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    storage = Storage(uri, root)
    storage.ready()
    trial, held = Path(f".hedgemix-{secrets.token_hex(8)}"), secrets.token_bytes(16)
    try:
        storage.write_bytes(trial, held)
        if storage.read_bytes(trial) != held:
            raise OSError("a small object did not come back as it was written")
        storage.remove(trial)
    except OSError as error:
        raise RecipeError(f"--out {storage.where(root)}: {cause(error, base.partition('/')[0])}") from None
    return storage


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


@lru_cache
def place(uri: str) -> tuple[str, str, dict[str, str]]:
    """Scheme, bucket/prefix and options of a URI. Raises RecipeError, which never repeats what may be a secret."""
    parts = urlsplit(uri)
    if parts.scheme not in ("s3", "gs") or not uri.startswith(f"{parts.scheme}://"):
        raise RecipeError(f"--out: this kind of address is not supported; {ACCEPTED}")
    if "@" in uri:
        raise RecipeError(
            "--out has a user or a key before an @; give credentials by environment variables, a profile or an "
            "instance role: an address ends in logs and tables"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,221}", parts.netloc):
        raise RecipeError(f"--out: what follows {parts.scheme}:// is not the name of a bucket; {ACCEPTED}")
    if (
        parts.fragment
        or not re.fullmatch(r"(/[A-Za-z0-9_=+.-]+)*/?", parts.path)
        or not plain(parts.path.strip("/"), True)
    ):
        raise RecipeError("--out: a prefix has names of letters, digits and ._=+- between single slashes")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - set(OPTIONS)):
        named = ", ".join(name for name in unknown if name.isidentifier())
        raise RecipeError(
            f"--out: the option {named or 'after the ?'} is not taken (only {', '.join(OPTIONS)}); credentials come "
            "from environment variables, a profile or an instance role"
        )
    return parts.scheme, (parts.netloc + parts.path).rstrip("/"), options


def plain(name: str, empty: bool = False) -> bool:
    """Whether it is a relative path that stays where it is put."""
    if not name:
        return empty
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


@lru_cache
def connect(uri: str) -> Any:
    """pyarrow's file system, one a process, with limits under which a dead store is told in half a minute."""
    scheme, base, options = place(uri)
    if scheme == "gs":
        # An open wire is an emulator's: no token goes over it.
        limit = timedelta(seconds=15)
        return fs.GcsFileSystem(anonymous=options.get("scheme") == "http", retry_time_limit=limit, **options)
    if "region" not in options and "endpoint_override" not in options:
        options = {**options, "region": fs.resolve_s3_region(base.partition("/")[0])}
    return fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=ANSWER_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small object is one request
        **options,
    )


def put_file(filesystem: Any, key: str, path: Path) -> None:
    with open(path, "rb") as file:
        put(filesystem, key, file)


def put(filesystem: Any, key: str, file: BinaryIO) -> None:
    """Write the object whole or not at all.

    Closing a stream of pyarrow, or only dropping it, completes the upload with what was written so far, and it has no
    abort: after a failure the stream must never be closed. It is leaked on purpose; one kept in a list hangs the
    interpreter's exit.
    """
    stream = filesystem.open_output_stream(key, compression=None)  # the default compresses what is named .gz
    try:
        while chunk := file.read(CHUNK_BYTES):
            stream.write(chunk)
        stream.close()
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))
        raise


def apart(work: Callable[[], None]) -> None:
    """Do it on a thread of its own, where Ctrl-C cannot fall between the opening of a stream and its care."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run, name="put", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


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


def cause(error: OSError, bucket: str) -> str:
    """One line about why a store failed, without secrets."""
    text = str(error)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "...")
    text = re.sub(r"\s*\(Request ID:.*", "", " ".join(text.split()))[:300]
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return f"there is no bucket {bucket}"
    if re.search("ACCESS_KEY|ACCESS_DENIED|SIGNATURE|TOKEN|InvalidAccessKeyId|HTTP (response code )?403", text):
        return f"the store refused the credentials, or they may not read, write and remove there ({text})"
    if "NETWORK_CONNECTION" in text:
        return f"the store does not answer ({text})"
    return text
