"""Processes killed and writes failed in the middle of a record: the row is the one of an undisturbed record."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tinyrecord

from benchmarks import fault
from pipeline import tasks

BITS = ["bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final", "bpb_published"]
OFTEN = ["--compute.checkpoint-seconds", "0", "--compute.max-restarts", "1", "--seeds", "1", "--record", "tiny"]

Undisturbed = tuple[Path, int, str]


def the_row(out: Path) -> pd.Series:
    """The only row of the record's table."""
    table = pd.read_parquet(out / "tiny.parquet")
    assert len(table) == 1
    return table.iloc[0]


def bits(row: pd.Series) -> dict[str, float]:
    return {column: row[column] for column in BITS}


def undisturbed_bits(undisturbed: Undisturbed) -> dict[str, float]:
    table = pd.read_parquet(undisturbed[0] / "tiny.parquet")
    return bits(table[table.seed == 1].iloc[0])


def run(text: Path, folder: Path, *faults: fault.Fault, options: list[str] = OFTEN) -> tuple[int, str]:
    """A record of seed 1 under these faults, each of which must fire; exit code and output."""
    plan = fault.Plan(folder / "faults", *faults)
    out = folder / "runs"
    out.mkdir()
    code, output = tinyrecord.run(tinyrecord.arguments(text, out, *options), out, plan.environment())
    plan.check()
    return code, output


def again(text: Path, folder: Path) -> tuple[int, str]:
    """The same command, undisturbed."""
    out = folder / "runs"
    return tinyrecord.run(tinyrecord.arguments(text, out, *OFTEN), out)


def write_twice(path: Path, plan: fault.Plan) -> subprocess.CompletedProcess[str]:
    """A process that replaces a file twice, and says which errors it met."""
    code = (
        "import sys; from pathlib import Path; from hedgemix.files import write_json\n"
        "for number in (1, 2):\n"
        "    try: write_json(Path(sys.argv[1]), number)\n"
        "    except OSError as error: print(error.errno)\n"
    )
    environment = {**os.environ, **plan.environment()}
    return subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)


def test_a_fault_comes_at_its_event_and_once_over_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    plan = fault.Plan(tmp_path / "kill", fault.kill("*/a.json", at=2), fault.kill("*/other"))
    assert write_twice(path, plan).returncode == -signal.SIGKILL
    assert path.read_text() == "1\n" and len(list(tmp_path.glob(".a.json.*.tmp"))) == 1  # killed before the rename
    assert write_twice(path, plan).returncode == 0 and path.read_text() == "2\n"
    assert plan.fired(0) == 1
    with pytest.raises(AssertionError, match="never fired"):
        plan.check()

    full = fault.Plan(tmp_path / "full", fault.fail("*/a.json", "ENOSPC", times=2), fault.fail("*/a.json", "EIO", at=3))
    assert write_twice(path, full).stdout.split() == [str(errno.ENOSPC)] * 2
    assert write_twice(path, full).stdout == f"{errno.EIO}\n"
    full.check()
    assert full.fired(0) == 2

    gate = tmp_path / "gate"
    moment = fault.Plan(tmp_path / "moment", fault.fail("*/a.json", "ENOSPC", times=9, during=str(gate)))
    assert write_twice(path, moment).stdout == ""
    gate.touch()
    assert write_twice(path, moment).stdout.split() == [str(errno.ENOSPC)] * 2


def test_pretended_gpus_are_a_test_s_alone() -> None:
    assert tasks.backend(1) == "nccl" and tasks.backend(0) == "gloo"
    code = "from pipeline import stages, tasks; print(tasks.backend(1), stages.pick_device(None))"
    environment = {**os.environ, **fault.pretend_gpus()}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["gloo", "cpu"]


@pytest.mark.slow
def test_every_stage_killed_once_changes_no_number(undisturbed: Undisturbed, text: Path, tmp_path: Path) -> None:
    code, output = run(
        text,
        tmp_path,
        fault.kill("*/checkpoint*.pt", at=2),
        fault.kill("*/artifact.hmx"),
        fault.kill("*/score-*/result.json"),
        fault.kill("*/trace.jsonl", at=3, event="write"),
    )
    assert code == 0, output
    row = the_row(tmp_path / "runs")
    assert row.restarts == 1 and bits(row) == undisturbed_bits(undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("path", ["*/runs/tiny.parquet", "*/evaluate-*/result.json"])
def test_the_machine_or_the_driver_lost_the_same_command_goes_on(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, path: str
) -> None:
    whole = path.endswith("result.json")  # the driver alone writes the table
    code, _ = run(text, tmp_path, fault.kill(path, at=1 if whole else 2, machine=whole))
    assert code == -signal.SIGKILL
    code, output = again(text, tmp_path)
    assert code == 0, output
    assert bits(the_row(tmp_path / "runs")) == undisturbed_bits(undisturbed)


@pytest.mark.soak
def test_a_full_disk_costs_a_checkpoint_not_the_training(undisturbed: Undisturbed, text: Path, tmp_path: Path) -> None:
    code, output = run(text, tmp_path, fault.fail("*/checkpoint*.pt", "ENOSPC", at=2, times=3))
    assert code == 0, output
    row = the_row(tmp_path / "runs")
    assert row.restarts == 0 and bits(row) == undisturbed_bits(undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_weights_that_could_not_be_written_are_trained_again(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, error: str
) -> None:
    code, output = run(text, tmp_path, fault.fail("*/weights.pt", error))
    assert code == 0, output
    row = the_row(tmp_path / "runs")
    assert row.restarts == 1 and bits(row) == undisturbed_bits(undisturbed)


@pytest.mark.soak
def test_a_disk_that_stays_full_is_told_and_the_same_command_goes_on(
    undisturbed: Undisturbed, text: Path, tmp_path: Path
) -> None:
    code, _ = run(text, tmp_path, fault.fail("*/weights.pt", "ENOSPC", times=1000))
    row = the_row(tmp_path / "runs")
    assert code == 1 and row.status == "failed" and "No space left on device" in row.error
    code, output = again(text, tmp_path)
    assert code == 0, output
    assert bits(the_row(tmp_path / "runs")) == undisturbed_bits(undisturbed)


@pytest.mark.soak
def test_one_of_two_ranks_killed_restarts_both(text: Path, tmp_path: Path) -> None:
    """Beside an undisturbed record of two workers: its numbers are not those of one."""
    two = [*OFTEN, "--compute.workers", "2"]
    (tmp_path / "calm").mkdir()
    assert tinyrecord.run(tinyrecord.arguments(text, tmp_path / "calm", *two), tmp_path)[0] == 0
    code, output = run(text, tmp_path, fault.kill("*/checkpoint*.pt", at=2, kill_rank=1), options=two)
    assert code == 0, output
    row = the_row(tmp_path / "runs")
    assert row.restarts == 1 and bits(row) == bits(the_row(tmp_path / "calm"))
