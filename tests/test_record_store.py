"""A record whose runs folder is an object store: killed on one machine, finished on another, read with pandas."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import tinyrecord
from objectstore import BUCKET, KEYS, StoreServer, store_process, store_server  # noqa: F401
from pyarrow import fs
from test_faults import bits, undisturbed_bits

from benchmarks import fault

pytestmark = pytest.mark.slow
OPTIONS = ["--compute.checkpoint-seconds", "0", "--seeds", "1", "--record", "tiny"]


def objects(server: StoreServer) -> dict[str, fs.FileInfo]:
    found = server.filesystem().get_file_info(fs.FileSelector(BUCKET, recursive=True))
    return {info.path: info for info in found if info.type == fs.FileType.File}


def test_killed_on_one_machine_a_record_ends_on_another(
    store_server: StoreServer,  # noqa: F811
    undisturbed: tuple[Path, int, str],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_server.make()
    options = tinyrecord.arguments(text, Path("unused"), *OPTIONS)
    options[options.index("unused")] = store_server.uri()
    # The second machine has nothing of the first but the text, whose time and place the data step reads.
    plan = fault.Plan(tmp_path / "faults", fault.kill("*/trace.jsonl", at=3, event="write", machine=True))
    code, output = tinyrecord.run(options, tmp_path, {**plan.environment(), "HEDGEMIX_SCRATCH": str(tmp_path)})
    assert code == -signal.SIGKILL, output
    plan.check()
    before = objects(store_server)
    [trained] = [path for path in before if "/train-" in path and path.endswith("/result.json")]
    assert [path for path in before if "/evaluate-" in path and "/checkpoint-" in path]
    [scratch] = tmp_path.glob("hedgemix-*")
    scratch.rename(tmp_path / "gone with the machine")

    code, output = tinyrecord.run(options, tmp_path, {"HEDGEMIX_SCRATCH": str(tmp_path)})
    assert code == 0, output
    after = objects(store_server)
    assert after[trained].mtime == before[trained].mtime
    table = pq.read_table(f"{BUCKET}/runs/tiny.parquet", filesystem=store_server.filesystem()).to_pandas()
    assert len(table) == 1 and table.status[0] == "done"
    assert bits(table.iloc[0]) == undisturbed_bits(undisturbed)
    assert table.attempts[0] == 5  # the evaluation was started twice
    assert table.artifact_path[0].startswith(f"s3://{BUCKET}/runs/_steps/quantize-")

    # Nothing that was stored or printed holds the secret that all of it was written with.
    secret = KEYS["AWS_SECRET_ACCESS_KEY"].encode()
    for path in after:
        with store_server.filesystem().open_input_stream(path, compression=None) as stream:
            assert secret not in stream.read(), path
    assert secret.decode() not in output and f"s3://{BUCKET}/runs/tiny.parquet" in output

    # A third time there is nothing to do, and a person's pandas reads the folder.
    code, output = tinyrecord.run(options, tmp_path, {"HEDGEMIX_SCRATCH": str(tmp_path)})
    assert code == 0 and "nothing to do" in output
    folder = pd.read_parquet(f"{BUCKET}/runs", filesystem=store_server.filesystem())
    assert list(folder.seed) == [1]


def test_a_bucket_that_vanished_or_wrong_keys_are_told_before_any_work(
    store_server: StoreServer,  # noqa: F811
    text: Path,
    tmp_path: Path,
) -> None:
    options = tinyrecord.arguments(text, Path("unused"), *OPTIONS)
    options[options.index("unused")] = store_server.uri(bucket="vanished")
    environment = {"HEDGEMIX_SCRATCH": str(tmp_path)}
    code, output = tinyrecord.run(options, tmp_path, environment)
    assert code == 2 and "vanished" in output and "Traceback" not in output
    store_server.make()
    store_server.check_credentials(True)
    options[options.index(store_server.uri(bucket="vanished"))] = store_server.uri()
    code, output = tinyrecord.run(options, tmp_path, environment)
    assert code == 2 and "Traceback" not in output and "starting Ray" not in output
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in output
