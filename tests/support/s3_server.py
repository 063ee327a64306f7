"""A real S3-compatible server (moto) on this machine, for tests of what lies in an object store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs

from pipeline.storage import conditional, object_store

BUCKET = "records"
ATOMIC_MOTO = """
import threading
from moto import server
from moto.s3.responses import S3Response

one_at_a_time, put_object = threading.Lock(), S3Response.put_object

def put(self):
    with one_at_a_time:
        return put_object(self)

S3Response.put_object = put
server.main()
"""
"""moto looks at a put's condition and then writes, on a thread each: two at once could both find theirs to hold. In S3
they cannot."""
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAOFTHETESTS000000", "AWS_SECRET_ACCESS_KEY": "secret/of+the+tests"}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclass
class StoreServer:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def uri(self, prefix: str = "runs", bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{prefix}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def filesystem(self) -> fs.S3FileSystem:
        """Not ours: one that may do everything."""
        return fs.S3FileSystem(
            endpoint_override=self.endpoint,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            allow_bucket_deletion=True,
        )

    def post(self, action: str, body: bytes = b"") -> None:
        request = urllib.request.Request(f"http://{self.endpoint}/moto-api/{action}", data=body, method="POST")
        request.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(request, timeout=10).close()

    def make(self) -> None:
        self.filesystem().create_dir(BUCKET)

    def wipe(self) -> None:
        """The buckets vanish."""
        self.post("reset")

    def check_credentials(self, check: bool) -> None:
        """From now on keys that no user of the server has are refused, as S3 does."""
        self.post("reset-auth", b"0" if check else b"1000000000")

    def pause(self) -> None:
        """It takes connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def start(log: Path) -> StoreServer:
    port = free_port()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", ATOMIC_MOTO, "-H", "127.0.0.1", "-p", str(port)],
            stdout=file,
            stderr=file,
            env={**os.environ, **KEYS, "INITIAL_NO_AUTH_ACTION_COUNT": "1000000000"},
        )
    server = StoreServer(port, process)
    until = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(f"http://{server.endpoint}/moto-api/data.json", timeout=1).close()
            return server
        except OSError:
            if time.monotonic() > until or process.poll() is not None:
                server.stop()
                raise RuntimeError(f"moto did not start: {log.read_text()}") from None
            time.sleep(0.05)


RUNNING: list[StoreServer] = []
"""At most one, kept from test to test: it takes a second or two to start."""


@pytest.fixture(scope="session")
def store_process() -> Iterator[None]:
    yield
    while RUNNING:
        RUNNING.pop().stop()


@pytest.fixture
def store_server(
    store_process: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StoreServer]:
    """A running server with nothing but an empty bucket `records`, and credentials for it in the environment. A test
    may stop it."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if not RUNNING:
        RUNNING.append(start(tmp_path_factory.mktemp("moto") / "log"))
    server = RUNNING[0]
    server.wipe()
    server.make()
    yield server
    object_store.connect.cache_clear()
    conditional.connect.cache_clear()
    if server.process.poll() is not None:
        RUNNING.remove(server)
    else:
        server.resume()
        server.check_credentials(False)
