"""Object stores through pyarrow: addresses, connections, and objects that are whole or absent."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from pyarrow import fs

from hedgemix.config import RecipeError

URI_OPTIONS = ("region", "scheme", "endpoint_override")
"""What may follow the ? of a URI, named as pyarrow and pandas name it; everything else could carry a secret."""
ACCEPTED = "give a folder, s3://bucket/prefix or gs://bucket/prefix"
CHUNK_BYTES = 8 * 2**20
CONNECT_SECONDS, ANSWER_SECONDS, ATTEMPTS = 4, 5, 3
"""Of an endpoint that answers nothing, three attempts to look take 15 s; to write, which waits twice, more."""


class StoreAddress(NamedTuple):
    """Holds the parts of a store's URI."""

    scheme: str
    """s3 or gs."""
    base: str
    """bucket/prefix."""
    options: dict[str, str]


@lru_cache
def parse_uri(uri: str) -> StoreAddress:
    """Take a URI apart. Raises RecipeError, which never repeats what may be a secret."""
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
        or not is_safe_relative_path(parts.path.strip("/"), True)
    ):
        raise RecipeError("--out: a prefix has names of letters, digits and ._=+- between single slashes")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if set(options) - set(URI_OPTIONS):
        raise RecipeError(
            f"--out: only {', '.join(URI_OPTIONS)} may follow the ?; credentials come from environment variables, a "
            "profile or an instance role"
        )
    wrong = [
        options.get("scheme", "http") not in ("http", "https"),
        not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]+)?", options.get("endpoint_override", "host")),
        not re.fullmatch(r"[a-z0-9-]+", options.get("region", "region")),
    ]
    if any(wrong):
        raise RecipeError("--out: after the ?, scheme is http or https, endpoint_override host:port, region a name")
    return StoreAddress(parts.scheme, (parts.netloc + parts.path).rstrip("/"), options)


def is_safe_relative_path(name: str, allow_empty: bool = False) -> bool:
    """Say whether it is a relative path that stays where it is put."""
    if not name:
        return allow_empty
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


@lru_cache
def connect(uri: str) -> Any:
    """Return pyarrow's file system, one a process, with limits under which a dead store is told in half a minute."""
    scheme, base, options = parse_uri(uri)
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
    """Put the file's content as `put` does."""
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


def run_on_thread(work: Callable[[], None]) -> None:
    """Do the work on a thread of its own, where Ctrl-C cannot fall between the opening of a stream and its care, and
    raise what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, name="put", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def explain_failure(error: Exception, bucket: str) -> str:
    """Say in one line why a store failed, without secrets."""
    text = str(error)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "...")
    text = re.sub(r"\s*\(Request ID:.*", "", " ".join(text.split()))
    short = text if len(text) <= 300 else text[:300] + "..."
    if "NO_SUCH_BUCKET" in text or isinstance(error, FileNotFoundError):
        return f"there is no bucket {bucket}"
    if re.search("NETWORK_CONNECTION|UNAVAILABLE|CURL error", text):
        return f"the store does not answer ({short})"
    if re.search(
        "ACCESS_KEY|ACCESS_DENIED|SIGNATURE|TOKEN|InvalidAccessKeyId|PERMISSION_DENIED|UNAUTHENTICATED|403", text
    ):
        return f"the store refused the credentials, or they may not read, write, remove and list there ({short})"
    return short
