"""Objects that are written only if nobody has written them meanwhile: what a lock between machines rests on.

Arrow's clients write on no condition. Amazon S3, and most stores of its protocol, do; botocore asks them so, with the
credentials that Arrow finds too: of the environment, a profile, or the role of an instance.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

from pyarrow import fs

from pipeline.storage.object_store import ANSWER_SECONDS, ATTEMPTS, CONNECT_SECONDS, parse_uri

CHANGED = ("PreconditionFailed", "412", "NoSuchKey", "404")
CONFLICT = ("ConditionalRequestConflict", "409")
"""Two writes at once: S3 asks for another try."""
CONFLICT_SECONDS = (0.1, 0.4, 1.6)
EXTRA = "pip install 'hedgemix[s3]'"


class Version(NamedTuple):
    """Holds an object as it was at one moment."""

    data: bytes
    tag: str
    """Another one after every write of other bytes (S3: the ETag)."""


class RefusedError(OSError):
    """Tells that the store answered with this code, which is the first argument."""


def read_version(uri: str, key: str) -> Version | None:
    """Read bucket/name, a small object; None when it is not there. Raises OSError when the store fails."""
    try:
        with told_as_os_errors():
            answer = connect(uri).get_object(**place(key))
            return Version(answer["Body"].read(), answer["ETag"])
    except RefusedError as refused:
        if refused.args[0] in CHANGED:
            return None
        raise


def put_if(uri: str, key: str, data: bytes, tag: str | None) -> str | None:
    """Write bucket/name if its tag is this one (None: if it is not there) and return its new tag; None when another has
    written or removed it. Raises OSError when the store fails, which may then have written it or not.

    A write whose answer was lost is sent again, and refused for what it wrote itself; so a refusal is looked into, and
    `data` has to be bytes that nobody else writes.
    """
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    for seconds in (*CONFLICT_SECONDS, None):
        try:
            with told_as_os_errors():
                return str(connect(uri).put_object(Body=data, **place(key), **condition)["ETag"])
        except RefusedError as refused:
            if refused.args[0] in CONFLICT and seconds is not None:
                time.sleep(seconds)
                continue
            if refused.args[0] not in CHANGED:
                raise
            now = read_version(uri, key)
            return now.tag if now is not None and now.data == data else None
    raise AssertionError("unreachable")


def why_not(uri: str, key: str) -> str:
    """Say why this store is not asked to write on a condition, by trying it with the object `key`, which is removed
    again; empty when it keeps to conditions."""
    if parse_uri(uri).scheme != "s3":
        return "Google Cloud Storage is asked through Arrow, which writes on no condition"
    if find_spec("botocore") is None:
        return f"botocore is not installed; {EXTRA}"
    first, second, third = (secrets.token_bytes(16) for _ in range(3))
    try:
        tag = put_if(uri, key, first, None)
        kept = (
            tag is not None
            and put_if(uri, key, second, None) is None
            and (tag := put_if(uri, key, second, tag)) is not None
            and put_if(uri, key, third, f'"{secrets.token_hex(16)}"') is None
            and read_version(uri, key) == (second, tag)
        )
        with told_as_os_errors():
            connect(uri).delete_object(**place(key))
    except OSError as error:
        return f"it refuses to write on a condition ({error})"
    return "" if kept else "it takes conditions and does not keep to them"


@lru_cache
def connect(uri: str) -> Any:
    """Return botocore's client of an S3 store, one a process, with the limits that Arrow's has."""
    from botocore.config import Config
    from botocore.session import get_session

    _, base, options = parse_uri(uri)
    endpoint = options.get("endpoint_override")
    region = options.get("region") or ("us-east-1" if endpoint else fs.resolve_s3_region(base.partition("/")[0]))
    settings = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        s3={"addressing_style": "path"} if endpoint else {},
        request_checksum_calculation="when_required",  # other stores than Amazon's refuse the newer sums
        response_checksum_validation="when_required",
    )
    url = f"{options.get('scheme', 'https')}://{endpoint}" if endpoint else None
    return get_session().create_client("s3", region_name=region, endpoint_url=url, config=settings)


def place(key: str) -> dict[str, str]:
    """Name bucket/name as botocore does."""
    bucket, _, name = key.partition("/")
    return {"Bucket": bucket, "Key": name}


@contextmanager
def told_as_os_errors() -> Iterator[None]:
    """Raise what botocore raises as RefusedError, when the store answered, else as OSError."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    try:
        yield
    except ClientError as error:
        raise RefusedError(error.response.get("Error", {}).get("Code", ""), str(error)) from None
    except (BotoCoreError, HTTPClientError) as error:
        raise OSError(str(error)) from None
