"""The soak notices what it is for: whatever is left behind, a changed row, a lost attempt, a damaged file."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import disturbances, leaks, record_under_faults, same_record, soak
from benchmarks.faults.disturbances import Bounds, Kill
from benchmarks.faults.leaks import Samples, Trend
from benchmarks.faults.record_under_faults import Disturbed, Plan
from hedgemix.runtime.files import write_json

MARKER = "SOAK_TEST=planted"
LISTENER = """
import socket, time
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    time.sleep(60)
"""


@pytest.fixture
def left() -> Iterator[subprocess.Popen[str]]:
    """A process with the marker, in a session of its own, that listens on a port, which it prints."""
    name, _, value = MARKER.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER],
        env={**os.environ, name: value},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def test_a_left_process_is_found_by_its_marker_or_its_session_with_its_port(left: subprocess.Popen[str]) -> None:
    assert left.stdout is not None
    port = int(left.stdout.readline())
    assert list(leaks.processes(MARKER)) == [left.pid]
    assert list(leaks.processes("SOAK_TEST=other", [left.pid])) == [left.pid]
    assert leaks.processes("SOAK_TEST=other") == {}
    assert leaks.listening([left.pid]) == {port} and leaks.listening([]) == set()
    disturbances.kill([left.pid])
    assert not disturbances.lives(left.pid) and leaks.processes(MARKER, [left.pid]) == {}


def test_shared_memory_is_left_when_no_process_has_it(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.write_bytes(b"x" * 5000)
    assert leaks.used([str(path)]) == set()
    with path.open("rb"):
        assert leaks.used([str(path)]) == {str(path)}


def made(runs: Path, name: str, attempts: int = 1, lost_seconds: float = 0.0) -> Path:
    """A finished step with one file."""
    folder = runs / "_steps" / name
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"weights")
    told = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    write_json(
        folder / "result.json",
        {"attempts": attempts, "lost_seconds": lost_seconds, "files": {"weights.pt": told}},
    )
    return folder


def test_files_that_no_step_claims_are_found(tmp_path: Path) -> None:
    step = made(tmp_path, "train-a")
    claimed = ("clock.json", "step.lock", "checkpoint-7.pt", "checkpoint.json")
    for name in claimed:
        (step / name).write_bytes(b"1")
    write_json(step / "checkpoint.json", {"checkpoints": [{"number": 7}]})
    (tmp_path / "soak.parquet").touch()
    assert leaks.unclaimed(tmp_path) == {}
    unfinished = tmp_path / "_steps" / "score-b" / "clock.json"
    planted = [step / ".weights.pt.host.1.tmp", step / "checkpoint-5.pt", tmp_path / ".soak.parquet.tmp", unfinished]
    for path in planted:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"123")
    assert leaks.unclaimed(tmp_path) == {str(path): 3 for path in planted}


def row(seed: int, **changed: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "status": "done",
        "error": None,
        "retries": 0,
        "lost_seconds": 0.0,
        "artifact_sha256": "a",
        **dict.fromkeys(same_record.BITS, 1.1),
        **changed,
    }


def test_a_row_that_is_another_is_told() -> None:
    expected = {1: row(1)}
    assert same_record.wrong_rows([row(1), row(2)], [1, 2], expected) == []
    for changed, said in (
        ({"bpb_final": 1.1 + 2**-52}, "bpb_final is 1.1000000000000003"),
        ({"bpb_full": None}, "bpb_full is None"),
        ({"status": "failed", "error": "lost"}, "seed 1 is failed: lost"),
        ({"artifact_sha256": "b"}, "another artifact"),
        ({"retries": -1}, "-1 retries"),
        ({"lost_seconds": -1.0}, "-1.0 seconds lost"),
    ):
        [told] = same_record.wrong_rows([row(1, **changed)], [1], expected)
        assert said in told
    assert "rows of seeds [1, 1]" in same_record.wrong_rows([row(1), row(1)], [1], {})[0]
    assert "rows of seeds [1]" in same_record.wrong_rows([row(1)], [1, 2], {})[0]


def test_a_step_that_forgot_a_kill_or_was_damaged_is_told(tmp_path: Path) -> None:
    step = made(tmp_path, "score-a", attempts=2, lost_seconds=1.5)
    assert same_record.wrong_steps(tmp_path, {"score-a": Bounds(2, 1.5)}) == []
    assert "tells 2 attempts" in same_record.wrong_steps(tmp_path, {"score-a": Bounds(3)})[0]
    assert "tells 1.50 seconds" in same_record.wrong_steps(tmp_path, {"score-a": Bounds(2, 1.6)})[0]
    assert "train-b was worked on and is gone" in same_record.wrong_steps(tmp_path, {"train-b": Bounds()})
    times = (step / "weights.pt").stat().st_mtime_ns
    disturbances.flip(step / "weights.pt", random.Random(0))
    assert (step / "weights.pt").stat().st_mtime_ns == times
    assert "weights.pt is not what was written" in same_record.wrong_steps(tmp_path, {})[0]
    (step / "result.json").unlink()
    assert "score-a is not done" in same_record.wrong_steps(tmp_path, {})[0]


HOLDER = """
import fcntl, json, sys, time
with open(sys.argv[1] + "/writer.lock", "a") as lock, open(sys.argv[1] + "/clock.json", "w") as clock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    json.dump({"elapsed_seconds": 0.5, "starts": 1, "discarded_seconds": 0.25, "lost_seconds": 0.25}, clock)
    clock.flush()
    print("at work", flush=True)
    time.sleep(60)
"""


def test_a_kill_is_noted_with_its_step_and_ends_when_the_step_goes_on(tmp_path: Path) -> None:
    step = tmp_path / "_steps" / "score-a"
    step.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, step], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    assert disturbances.holders(tmp_path) == {process.pid: "score-a"}
    began = time.time()
    hit = Kill("task", 0.0, began, "score", ["score-a"], {process.pid})
    disturbances.look([hit], tmp_path)
    assert hit.since >= began and hit.recovered_seconds is None  # still alive: what it writes is no sign
    disturbances.kill([process.pid])
    process.wait()
    bounds: dict[str, Bounds] = {}
    disturbances.note(bounds, tmp_path, ["score-a"])
    assert bounds == {"score-a": Bounds(2, 0.75)}
    disturbances.look([hit], tmp_path)
    assert hit.recovered_seconds is None and hit.lost()
    time.sleep(0.05)
    os.utime(step / "clock.json")
    disturbances.look([hit], tmp_path)
    assert hit.recovered_seconds is not None and hit.recovered_seconds > 0 and not hit.lost()
    assert disturbances.holders(tmp_path) == {}


def test_draws_repeat_with_their_seed() -> None:
    def drawn(seed: int) -> list[str]:
        draw = random.Random(seed)
        return [disturbances.draw_kind(draw, disturbances.WEIGHTS) for _ in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert set(drawn(1)) == set(disturbances.WEIGHTS)


def test_memory_that_grows_is_told_after_three_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 0
    monkeypatch.setattr(leaks, "resident_bytes", lambda pid: size)
    for a_minute, grows in ((0, False), (20, True)):
        samples = Samples()
        for second in range(0, 600, 5):
            size = int((100 + a_minute * second / 60) * 2**20)
            samples.add(second, "raylet", os.getpid())
        trend = samples.trend("raylet", 600)
        assert trend is not None and abs(trend.mib_a_minute - a_minute) < 0.01 and trend.minutes > 4.5
        assert trend.grows() == grows
    assert samples.trend("gcs_server", 600) is None


COMMAND = """
seeds=${@: -2}
echo "$seeds" >> calls
mkdir "${seeds/ /-}" 2> /dev/null && exit 1
[ "$seeds" != "2 3" ] || [ -e killed ] || { touch waiting; exec sleep 60; }
"""


def test_a_command_is_started_again_until_its_seeds_are_done_and_then_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_under_faults, "COMMAND", ["bash", "-c", COMMAND, "bash"])
    (tmp_path / "runs").mkdir()
    record = Disturbed(
        Plan(0, seeds=3, at_once=2), tmp_path, dict(os.environ), None, random.Random(0), random.Random(0)
    )
    while not (tmp_path / "waiting").exists():
        record.step()
    assert record.done == [0, 1] and record.batch == [2, 3] and record.codes == [1, 0, 1]
    (tmp_path / "killed").touch()
    assert record.strike("driver") and record.kills[-1].kind == "driver"
    while record.batch:
        record.step()
    assert record.done == [0, 1, 2, 3] and record.codes == [1, 0, 1, 0]
    assert (tmp_path / "calls").read_text().split("\n")[:-1] == ["0 1"] * 2 + ["2 3"] * 3
    assert (
        record.pids() == [] and not record.strike("worker") and not record.strike("node") and not record.strike("byte")
    )
    monkeypatch.setattr(record_under_faults, "STALLED_MINUTES", 0)
    with pytest.raises(RuntimeError, match="no step ended"):
        record.check_progress()


def test_the_report_counts_what_was_hit_and_says_what_is_wrong() -> None:
    kills = [
        {"kind": "task", "steps": ["score-a"], "recovered_seconds": seconds, "at_seconds": 1.0}
        for seconds in (1.0, 3.0, None)
    ]
    about = {"cpu": "c", "cores": 2, "memory_gib": 8, "load": 1, "torch": "2", "ray": "3", "python": "4"}
    text = soak.markdown(
        {
            "minutes": 10.0, "seed": 0, "seeds": 2, "references": [0], "rows": [row(0), row(1, retries=3)],
            "kills": kills, "missed": [], "commands": 3, "codes": [1, 0], "processes": 9, "ports": [1, 2],
            "trends": {"raylet": Trend(4.0, 100.0, 0.5, 40, 0.0), "driver": None}, "machine": about,
            "wrong": ["seed 1 is another"],
        }
    )  # fmt: skip
    assert "| retries of steps | 3 |" in text
    assert "| task | 3 | 3 | 2 | 2.0 | 3.0 |" in text and "| node | 0 | 0 | 0 | | |" in text
    assert "| raylet | 4.0 | 100 | +0.50 | 40 | +0.00 |" in text and "- WRONG: seed 1 is another" in text
