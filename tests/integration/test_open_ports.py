"""What our own Ray lets others of the network reach while a record trains (docs/security.md); it trains compiled, as
recipes record and single_gpu do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from pipeline.monitor import status
from pipeline.storage.store import Storage
from support import fault_costs, project_copy, tiny_record


def family(pid: int) -> set[int]:
    """The process and all below it."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> dict[str, int]:
    """Address and port (in hex, as in /proc/net) of every TCP socket on which one of the processes listens."""
    sockets: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets[os.readlink(file)] = pid
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found[fields[1]] = sockets[f"socket:[{fields[9]}]"]
    return found


LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
"""127.0.0.1, the same in IPv6, and ::1."""


STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_our_own_ray_listens_on_loopback_alone_and_refuses_strangers(text: Path, tmp_path: Path) -> None:
    """While a record trains, which its status says; SIGTERM then ends it like Ctrl-C. It trains compiled, which says
    that no process of the compiler meets a module of the script's folder: nothing there comes before a library of its
    name."""
    out, home, project = tmp_path / "runs", tmp_path / "home", project_copy.make(tmp_path / "project")
    home.mkdir()
    steps = [*project_copy.COMPILED, "--train.steps", "100000"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}  # as a user has it
    environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "new")}
    process = subprocess.Popen(
        [sys.executable, str(project / "pipeline" / "record.py"), "laptop", *tiny_record.arguments(text, out, *steps)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**environment, "HOME": str(home)},
    )
    try:
        deadline = time.monotonic() + 400
        while not any(fault_costs.done(folder) >= 3 for folder in out.glob("_steps/train-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert list((tmp_path / "new").rglob("*.so"))
        storage, folder = Storage("", out), out / "_records" / "tiny"
        told = status.read(storage, folder / "steps.json")
        assert told and status.driver(storage, folder / "record.lock") == "a driver is at work"
        at_work = [state.step for _, state in status.states(storage, told, {}) if state.state == "at work"]
        assert "train" in at_work
        pids = family(process.pid)
        found = listening(pids)
        names = {address: Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:2] for address, pid in found.items()}
        assert len(found) > 5
        open_doors = [names[address][0] for address in found if not address.startswith(LOOPBACK)]
        assert open_doors == []  # two workers would meet at one: torch's store knows no address to bind to
        [gcs] = [a for a, command in names.items() if command[0].endswith("gcs_server")]
        address = f"127.0.0.1:{int(gcs.partition(':')[2], 16)}"
        answers = {}
        for mode in ("disabled", "token"):
            client = [sys.executable, "-c", STRANGER, address]
            own = {**environment, "RAY_AUTH_MODE": mode, "HOME": str(home)}
            answers[mode] = subprocess.run(client, env=own, capture_output=True, text=True, check=True).stdout
        assert "Authenticat" in answers["disabled"] or "UNAUTHENTICATED" in answers["disabled"], answers
        assert answers["token"] == "1\n"  # the same question, by one who can read the user's files
        assert (home / ".ray" / "auth_token").exists()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "stopped; the same command goes on from here" in output, output
        assert pd.read_parquet(out / "tiny.parquet").status.tolist() == ["pending"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists() and runs_on(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def runs_on(pid: int) -> bool:
    """Whether it is more than an entry that nobody has collected."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
