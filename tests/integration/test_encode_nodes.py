"""Text encoded on a cluster of several machines, of which one is lost meanwhile."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import cluster as clusters
from hedgemix.data import text_set
from support import text_data

pytestmark = pytest.mark.soak

PROGRAM = """
import hashlib, json, sys
from pathlib import Path
from pipeline.execution.ray_session import ray, ray_started
from rich.console import Console
from pipeline.execution import encode

model, batches = Path("model").read_bytes(), json.loads(Path("batches").read_text())

def fed():
    for number, batch in enumerate(batches):
        if number == 8:  # all before are under way, or done and on the machine that did them
            print("ready", flush=True)
            sys.stdin.readline()
        yield batch

with ray_started(Console(stderr=True)):
    done = [hashlib.sha256(tokens.tobytes()).hexdigest() for tokens in encode.encode_by_tasks(model, fed())]
    print(json.dumps(done))
"""


def test_what_a_lost_machine_did_is_done_again(tmp_path: Path) -> None:
    documents = list(text_data.documents())
    batches = [documents[number:] + documents[:number] for number in range(12)]  # of which tokens are 200 KB and more
    model = text_data.processor().serialized_model_proto()
    expected = [hashlib.sha256(tokens.tobytes()).hexdigest() for tokens in text_set.encode_here(model, iter(batches))]
    (tmp_path / "model").write_bytes(model)
    (tmp_path / "batches").write_text(json.dumps(batches))
    with clusters.cluster(0) as cluster:
        first, _ = cluster.add(cpus=4, gpus=0), cluster.add(cpus=4, gpus=0)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=tmp_path,
            env=cluster.command_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
        first.kill()
        told, _ = process.communicate("\n", timeout=200)
        assert process.returncode == 0 and json.loads(told.splitlines()[-1]) == expected and len(set(expected)) == 12
