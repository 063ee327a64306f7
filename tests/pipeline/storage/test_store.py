"""The runs folder in a folder and in an object store, against a real server."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pandas as pd
import pytest

from hedgemix.config import RecipeError
from pipeline.storage import object_store, store
from pipeline.storage.store import Storage, open_storage
from support.s3_server import BUCKET, KEYS, StoreServer, free_port, store_process, store_server

PACKED = gzip.compress(b"a" * 1000)

__all__ = ["store_process", "store_server"]


def opened(server: StoreServer, scratch: Path, prefix: str = "runs") -> Storage:
    return open_storage(server.uri(prefix), scratch)


def written(storage: Storage, name: str, data: bytes) -> Path:
    path = storage.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_folder_is_its_own_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held = open_storage("runs")
    assert held == Storage("", tmp_path / "runs") and not held.remote
    path = written(held, "_steps/a/result.json", b"{}")
    held.push(path)
    assert held.pull(path) and not held.pull(held.root / "none")
    assert held.read_bytes(path) == b"{}" and held.read_bytes(held.root / "none") is None
    held.write_bytes(held.root / "_steps/a/x.pt", b"123")
    assert held.names(held.root / "_steps") == {"a/result.json": 2, "a/x.pt": 3}
    held.prune(held.root / "_steps/a", "*.pt", keep=["y.pt"])
    assert held.names(held.root) == {"_steps/a/result.json": 2}
    assert held.where(path) == str(path)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="--out .*file/runs cannot be made"):
        open_storage(str(tmp_path / "file/runs"))
    job = tmp_path / "working_dir_files" / "x"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(RecipeError, match="is relative"):
        open_storage("runs")


def test_round_trip(store_server: StoreServer, tmp_path: Path) -> None:
    here, there = opened(store_server, tmp_path / "here"), opened(store_server, tmp_path / "there")
    assert here.uri == there.uri and here.root != there.root
    assert here.names(here.root) == {}  # the trial left nothing
    files = {
        "_steps/train-1/checkpoint-5.pt": os.urandom(20 * 2**20 + 7),
        "_steps/train-1/empty": b"",
        "_steps/train-1/trace.jsonl.gz": PACKED,  # pyarrow would unpack it on the way
        "tiny.zst": b"not zstd",
    }
    for name, data in files.items():
        here.push(written(here, name, data))
    assert here.names(here.root) == {name: len(data) for name, data in files.items()}
    assert here.names(here.root / "_steps/train-1") == {Path(n).name: len(d) for n, d in files.items() if "/" in n}
    assert here.names(here.root / "_steps/train") == {}
    for name, data in files.items():
        assert there.pull(there.root / name)
        assert (there.root / name).read_bytes() == data == there.read_bytes(there.root / name)
    here.push(written(here, "tiny.zst", b"new"))
    assert there.pull(there.root / "tiny.zst") and (there.root / "tiny.zst").read_bytes() == b"new"
    here.remove(here.root / "tiny.zst")
    here.remove(here.root / "tiny.zst")
    assert not there.pull(there.root / "tiny.zst") and there.read_bytes(there.root / "tiny.zst") is None
    with pytest.raises(FileNotFoundError):
        here.push(here.root / "none")
    here.prune(here.root / "_steps/train-1", "checkpoint-*.pt", keep=[])
    assert set(here.names(here.root)) == {"_steps/train-1/empty", "_steps/train-1/trace.jsonl.gz"}
    assert here.where(here.root / "tiny.parquet") == f"s3://{BUCKET}/runs/tiny.parquet"


def test_tables_are_read_in_place(store_server: StoreServer, tmp_path: Path) -> None:
    held = opened(store_server, tmp_path)
    path = held.root / "tiny.parquet"
    pd.DataFrame({"seed": [1, 2]}).to_parquet(path)
    held.push(path)
    held.write_bytes(held.root / "_steps/x/result.json", b"{}")
    for address in (store_server.uri("runs/tiny.parquet"), store_server.uri("runs")):
        assert list(pd.read_parquet(address).seed) == [1, 2]


class Broken(io.BytesIO):
    """A local file whose disk fails, or whose reader is interrupted, after 12 MB."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 12 * 2**20:
            raise KeyboardInterrupt
        return super().read(size)


def test_an_upload_that_breaks_off_leaves_what_was_there(store_server: StoreServer, tmp_path: Path) -> None:
    held = opened(store_server, tmp_path)
    held.write_bytes(held.root / "kept", b"before")
    for name in ("kept", "new"):
        with pytest.raises(KeyboardInterrupt):
            object_store.put(object_store.connect(held.uri), held.key(held.root / name), Broken(bytes(20 * 2**20)))
    assert held.read_bytes(held.root / "kept") == b"before"
    assert held.names(held.root) == {"kept": 6}


BREAKS_OFF = """
import io, sys
from pathlib import Path
from pipeline.storage import object_store
class Broken(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 12 * 2**20:
            raise OSError("disk")
        return super().read(size)
try:
    object_store.put(object_store.connect(sys.argv[1]), sys.argv[2], Broken(bytes(20 * 2**20)))
except OSError as error:
    print(error)
"""


def test_a_process_whose_upload_broke_off_still_ends(store_server: StoreServer, tmp_path: Path) -> None:
    held = opened(store_server, tmp_path)
    command = [sys.executable, "-c", BREAKS_OFF, held.uri, held.key(held.root / "x")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, "PYTHONPATH": "."})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "disk\n", "")
    assert held.names(held.root) == {}


def test_a_pull_that_breaks_off_leaves_what_was_there(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = opened(store_server, tmp_path / "here"), opened(store_server, tmp_path / "there")
    here.push(written(here, "big", os.urandom(20 * 2**20)))
    path = written(there, "big", b"before")
    connect = object_store.connect(there.uri)

    class Dying:
        get_file_info = connect.get_file_info

        def open_input_stream(self, key: str, compression: None) -> object:
            stream = connect.open_input_stream(key, compression=compression)
            read = io.BytesIO(stream.read(store.CHUNK_BYTES))
            store_server.stop()
            assert read.getvalue()
            return stream

    monkeypatch.setattr(store, "connect", lambda uri: Dying())
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        there.pull(path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in there.root.iterdir()] == ["big"]


def test_an_object_replaced_while_it_is_read_comes_whole(store_server: StoreServer, tmp_path: Path) -> None:
    held = opened(store_server, tmp_path)
    path = held.root / "clock.json"
    states = [b"%d" % (10**n) * 50 for n in range(1, 9)]
    held.write_bytes(path, states[0])
    ended = threading.Event()

    def rewrite() -> None:
        turn = 0
        while not ended.is_set():
            held.write_bytes(path, states[turn % 8])
            turn += 1
            time.sleep(0.02)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(60):
            try:
                assert held.read_bytes(path) in states
            except OSError as error:
                assert "was replaced" in str(error)
    finally:
        ended.set()
        writer.join()


def test_what_does_not_work_is_told_before_anything_starts(store_server: StoreServer, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no bucket missing"):
        open_storage(store_server.uri(bucket="missing"), tmp_path)
    store_server.check_credentials(True)
    with pytest.raises(RecipeError, match="refused the credentials") as refused:
        opened(store_server, tmp_path)
    assert "\n" not in str(refused.value)
    assert not any(value in str(refused.value) for value in KEYS.values())
    store_server.check_credentials(False)
    held = opened(store_server, tmp_path)
    store_server.wipe()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        held.push(written(held, "x", b"x"))
    store_server.stop()
    began = time.monotonic()
    with pytest.raises(RecipeError, match="does not answer"):
        opened(store_server, tmp_path)
    assert time.monotonic() - began < 30


@pytest.mark.soak
def test_an_endpoint_that_answers_nothing_is_told_within_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RecipeError, match="does not answer"):
            open_storage(f"s3://records/x?endpoint_override={endpoint}&scheme=http&region=us-east-1", tmp_path)
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIASECRET:topsecret@records/runs",
        "s3://AKIASECRET:top/topsecret@records/runs",
        "s3://AKIASECRET/topsecret",
        "s3://records/runs?access_key=AKIASECRET&secret_key=topsecret",
        "s3://records/runs?session_token=topsecret",
        "s3://records/runs?topsecret",
        "s3://records/runs?endpoint_override=AKIASECRET:topsecret@host",
        "s3://records/runs?endpoint_override=http://topsecret/",
        "s3://records/runs?region=us-east-1#topsecret",
        "s3:/topsecret/runs",
        "gs://topsecret@records/runs",
        "gs://records/a/../topsecret",
        "gs://records//topsecret",
        "https://topsecret.example/x",
        "file:///topsecret",
        "s3://",
    ],
)
def test_addresses_with_secrets_or_of_other_kinds_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--out") as refused:
        open_storage(uri, tmp_path)
    assert "topsecret" not in str(refused.value) and "AKIASECRET" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_addresses() -> None:
    assert object_store.parse_uri("gs://my-bucket") == ("gs", "my-bucket", {})
    options = {"region": "eu-west-1", "endpoint_override": "host.example:9000"}
    found = object_store.parse_uri("s3://my-bucket/a/b/?region=eu-west-1&endpoint_override=host.example:9000")
    assert found == ("s3", "my-bucket/a/b", options)
    assert Storage("gs://b1/x", Path("/r")).where(Path("/r/t.parquet")) == "gs://b1/x/t.parquet"


def test_paths_stay_inside(store_server: StoreServer, tmp_path: Path) -> None:
    held = opened(store_server, tmp_path / "scratch")
    for path in (Path("../x"), tmp_path / "x", held.root / ".." / "x", held.root / "a/../../x"):
        for method in (held.push, held.pull, held.read_bytes, held.remove, held.names, held.where, held.modified):
            with pytest.raises(ValueError, match="is not under"):
                method(path)
        with pytest.raises(ValueError, match="is not under"):
            held.write_bytes(path, b"")
    (held.root / "link").symlink_to(tmp_path)
    held.write_bytes(held.root / "link/x", b"evil")
    with pytest.raises(ValueError, match="by a link"):
        held.pull(held.root / "link/x")
    client = boto3.client("s3", endpoint_url=f"http://{store_server.endpoint}", region_name="us-east-1")
    keys = [f"runs/{name}" for name in ("../x", "a/../../x", "a//b", "a/./b", "/etc/x", "a\\..\\x", "good/x")]
    for key in keys:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"evil")
    assert {found["Key"] for found in client.list_objects_v2(Bucket=BUCKET)["Contents"]} >= set(keys)
    assert held.names(held.root) == {"good/x": 4, "link/x": 4}


def test_scratch_is_this_users_alone(
    store_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEDGEMIX_SCRATCH", str(tmp_path / "disk"))
    held = open_storage(store_server.uri())
    assert held == open_storage(store_server.uri("runs/")) and held.root != open_storage(store_server.uri("other")).root
    assert held.root.is_relative_to(tmp_path / "disk")
    for folder in (held.root, held.root.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    held.root.parent.chmod(0o777)
    held.ready()
    assert held.root.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(store.os, "getuid", lambda: 12345678)
    with pytest.raises(RecipeError, match="belongs to another user"):
        held.ready()


@pytest.fixture
def google_emulator(tmp_path: Path) -> Iterator[str]:
    """The options of a URI that lead to an emulator of Google's store with a bucket `records`."""
    program, port = Path(sys.executable).with_name("gcp-storage-emulator"), free_port()
    arguments = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=records"]
    with open(tmp_path / "emulator.log", "wb") as log:
        process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_google_storage(google_emulator: str, tmp_path: Path) -> None:
    here, there = (open_storage(f"gs://records/runs{google_emulator}", tmp_path / name) for name in ("here", "there"))
    big = os.urandom(20 * 2**20)
    here.push(written(here, "_steps/a/big", big))
    here.write_bytes(here.root / "x.gz", PACKED)
    assert here.names(here.root) == {"_steps/a/big": len(big), "x.gz": len(PACKED)}
    assert there.pull(there.root / "_steps/a/big") and (there.root / "_steps/a/big").read_bytes() == big
    assert there.read_bytes(there.root / "x.gz") == PACKED
    assert (there.modified(there.root / "x.gz") or 0) > time.time() - 60
    with pytest.raises(KeyboardInterrupt):
        object_store.put(object_store.connect(here.uri), here.key(here.root / "x.gz"), Broken(big))
    assert there.read_bytes(there.root / "x.gz") == PACKED
    here.remove(here.root / "x.gz")
    assert not there.pull(there.root / "x.gz") and there.read_bytes(there.root / "x.gz") is None
    with pytest.raises(RecipeError, match="there is no bucket missing"):
        open_storage(f"gs://missing/runs{google_emulator}", tmp_path)
