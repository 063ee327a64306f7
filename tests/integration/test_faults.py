"""Processes killed and writes failed in the middle of a record: the row is the one of an undisturbed record.

What each costs is measured on the way, for the table of docs/faults.md (see measured.py).
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayActorError

from benchmarks.faults import injection
from benchmarks.faults.cluster import until
from hedgemix.runtime import clock
from pipeline.execution import failures, tasks, train_job
from support import fault_costs, tiny_record
from support.fault_costs import Faults, Watch, work
from support.faulty_record import (
    ALWAYS,
    LONG,
    OFTEN,
    Undisturbed,
    again,
    begun,
    bits,
    command,
    ended,
    run,
    the_row,
    the_step,
    training_for,
)


def write_twice(path: Path, plan: injection.Plan) -> subprocess.CompletedProcess[str]:
    """A process that replaces a file twice, and says which errors it met."""
    code = (
        "import sys; from pathlib import Path; from hedgemix.runtime.files import write_json\n"
        "for number in (1, 2):\n"
        "    try: write_json(Path(sys.argv[1]), number)\n"
        "    except OSError as error: print(error.errno)\n"
    )
    environment = {**os.environ, **plan.environment()}
    return subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)


def test_a_fault_comes_at_its_event_and_once_over_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    plan = injection.Plan(tmp_path / "kill", injection.kill("*/a.json", at=2), injection.kill("*/other"))
    assert write_twice(path, plan).returncode == -signal.SIGKILL
    assert path.read_text() == "1\n" and len(list(tmp_path.glob(".a.json.*.tmp"))) == 1  # killed before the rename
    assert write_twice(path, plan).returncode == 0 and path.read_text() == "2\n"
    assert plan.fired(0) == 1
    with pytest.raises(AssertionError, match="never fired"):
        plan.check()

    full = injection.Plan(
        tmp_path / "full", injection.fail("*/a.json", "ENOSPC", times=2), injection.fail("*/a.json", "EIO", at=3)
    )
    assert write_twice(path, full).stdout.split() == [str(errno.ENOSPC)] * 2
    assert write_twice(path, full).stdout == f"{errno.EIO}\n"
    full.check()
    assert full.fired(0) == 2

    gate = tmp_path / "gate"
    moment = injection.Plan(tmp_path / "moment", injection.fail("*/a.json", "ENOSPC", times=9, during=str(gate)))
    assert write_twice(path, moment).stdout == ""
    gate.touch()
    assert write_twice(path, moment).stdout.split() == [str(errno.ENOSPC)] * 2


def test_pretended_gpus_are_a_test_s_alone() -> None:
    assert tasks.backend(1) == "nccl" and tasks.backend(0) == "gloo"
    assert train_job.backend(1) == "nccl"
    code = (
        "from hedgemix import stages; from pipeline.execution import tasks, train_job; "
        "print(tasks.backend(1), train_job.backend(1), stages.pick_device(None))"
    )
    environment = {**os.environ, **injection.pretend_gpus()}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["gloo", "gloo", "cpu"]


def test_a_process_lost_below_a_task_is_worth_another_try(ray_session: None) -> None:
    class Dying:
        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    def wait(fails: bool) -> None:
        if fails:
            raise ValueError("the work itself")
        ray.get(ray.remote(num_cpus=0)(Dying).remote().die.remote())

    task = ray.remote(num_cpus=0, max_retries=0)(wait)
    with pytest.raises(RayActorError) as caught:
        ray.get(task.remote(False))
    assert isinstance(failures.classify(caught.value), failures.Retry)
    with pytest.raises(ValueError, match="itself") as failed:
        ray.get(task.remote(True))
    assert isinstance(failures.classify(failed.value), failures.Fail)


@pytest.mark.soak
def test_a_driver_killed_in_training_the_same_command_goes_on(
    undisturbed_long: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    out, options = tmp_path / "runs", ["--compute.checkpoint-seconds", "2", *LONG]
    out.mkdir()
    killed = fault_costs.Now()
    with Watch(out, "train", killed) as watch:
        driver = tiny_record.start(tiny_record.arguments(text, out, *options), out)
        until(lambda: training_for(out, 5), 200, lambda: f"{driver.poll()}")
        killed.say()
        driver.kill()
        code, output = again(text, tmp_path, *options)
        driver.communicate()
    assert code == 0, output
    row = ended(out, undisturbed_long, retries=1)
    assert row.restarts == 1 and row.lost_seconds <= 2 + clock.BEAT_SECONDS + 1
    faults.note(7, "driver killed", "in training, checkpoints every 2 s", watch, work(watch, row.lost_seconds))


@pytest.mark.soak
def test_a_machine_lost_whole_the_same_command_goes_on(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    plan = injection.Plan(tmp_path / "faults", injection.kill("*/trace.jsonl", 5, "write", machine=True))
    with Watch(tmp_path / "runs", "evaluate", fault_costs.fired(plan)) as watch:
        code, _ = command(text, tmp_path, *OFTEN, environment=plan.environment())
        assert code == -signal.SIGKILL
        plan.check()
        code, output = again(text, tmp_path)
    assert code == 0, output
    row = ended(tmp_path / "runs", undisturbed, retries=1)
    assert row.restarts == 0
    faults.note(8, "driver and all of its Ray killed", "in the third chunk", watch, work(watch, row.lost_seconds))


@pytest.mark.soak
def test_a_full_disk_costs_a_checkpoint_not_the_training(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    plan = injection.Plan(tmp_path / "faults", injection.fail("*/checkpoint*.pt", "ENOSPC", at=2, times=3))
    with Watch(tmp_path / "runs", "train", fault_costs.fired(plan), checkpoint=True) as watch:
        code, output = command(text, tmp_path, *OFTEN, environment=plan.environment())
    assert code == 0, output
    plan.check()
    row = ended(tmp_path / "runs", undisturbed)
    assert row.restarts == 0 and row.checkpoint_failures == 3 and row.lost_seconds == 0
    faults.note(10, "disk full for three checkpoints", "training", watch, "none")


@pytest.mark.soak
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_weights_that_could_not_be_written_are_made_again(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults, error: str
) -> None:
    plan = injection.Plan(tmp_path / "faults", injection.fail("*/weights.pt", error))
    with Watch(tmp_path / "runs", "train", fault_costs.fired(plan)) as watch:
        code, output = command(text, tmp_path, *OFTEN, environment=plan.environment())
    assert code == 0, output
    plan.check()
    row = ended(tmp_path / "runs", undisturbed, retries=1)
    assert row.restarts == 1
    name = "disk full" if error == "ENOSPC" else "disk reports an error (EIO)"
    faults.note(11, name, "writing weights.pt", watch, "averaging and calibration")


@pytest.mark.soak
def test_a_disk_that_stays_full_is_told_and_the_same_command_goes_on(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    code, _ = run(text, tmp_path, injection.fail("*/weights.pt", "ENOSPC", times=1000))
    row = the_row(tmp_path / "runs")
    assert code == 1 and row.status == "failed" and "No space left on device" in row.error
    room = fault_costs.Now()
    with Watch(tmp_path / "runs", "train", room) as watch:
        room.say()
        code, output = again(text, tmp_path)
    assert code == 0, output
    ended(tmp_path / "runs", undisturbed, retries=2)
    faults.note(12, "disk stays full", "writing weights.pt", watch, "averaging and calibration")


@pytest.mark.soak
def test_one_of_two_ranks_killed_restarts_both(text: Path, tmp_path: Path, faults: Faults) -> None:
    """Beside an undisturbed record of two workers: its numbers are not those of one."""
    two = [*OFTEN, "--compute.workers", "2"]
    (tmp_path / "calm").mkdir()
    assert tiny_record.run(tiny_record.arguments(text, tmp_path / "calm", *two), tmp_path)[0] == 0
    plan = injection.Plan(tmp_path / "faults", injection.kill("*/checkpoint*.pt", at=3, kill_rank=1))
    with Watch(tmp_path / "runs", "train", fault_costs.fired(plan)) as watch:
        code, output = command(text, tmp_path, *two, environment=plan.environment())
    assert code == 0, output
    plan.check()
    row = the_row(tmp_path / "runs")
    assert row.restarts == 1 and row.retries == 1 and bits(row) == bits(the_row(tmp_path / "calm"))
    faults.note(2, "one of two training ranks killed", "at a checkpoint", watch, work(watch, row.lost_seconds))


@pytest.mark.soak
def test_one_of_two_evaluating_ranks_killed_goes_on_from_its_chunk(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    two = [*OFTEN, "--compute.evaluate-workers", "2"]
    calm = begun(undisturbed, tmp_path / "calm", "evaluate")
    assert command(text, tmp_path / "calm", *two)[0] == 0
    out = begun(undisturbed, tmp_path, "evaluate")
    plan = injection.Plan(tmp_path / "faults", injection.kill("*/trace.jsonl", at=5, event="write", kill_rank=1))
    with Watch(out, "evaluate", fault_costs.fired(plan)) as watch:
        code, output = command(text, tmp_path, *two, environment=plan.environment())
    assert code == 0, output
    plan.check()
    row = the_row(out)
    assert row.retries == 1 and row.evaluate_workers == 2 and bits(row) == bits(the_row(calm))
    assert "was lost, starts again" in output
    assert watch.again is not None and watch.again < fault_costs.done(the_step(out, "evaluate"))
    faults.note(6, "one of two evaluating ranks killed", "in the third chunk", watch, work(watch, row.lost_seconds))


@pytest.mark.soak
def test_a_second_driver_is_refused_at_once(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    out = tmp_path / "runs"
    out.mkdir()
    options = tiny_record.arguments(text, out, *OFTEN)
    first = tiny_record.start(options, out)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("_steps/train-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        began = time.monotonic()
        code, told = tiny_record.run(options, out)
        seconds = time.monotonic() - began
        assert code == 2 and "another driver is at work on this record" in told and "starting Ray" not in told
        assert first.poll() is None, "the first had ended before"
        output, _ = first.communicate(timeout=300)
    finally:
        first.kill()
    assert first.returncode == 0, output
    row = ended(out, undisturbed)
    assert row.lost_seconds == 0
    faults.note(16, "second driver on one record", "during training", seconds, "none: the second is refused")


BUDGET_SECONDS = 6.0


@pytest.mark.soak
def test_a_budget_is_not_granted_twice(text: Path, tmp_path: Path, faults: Faults) -> None:
    """Killed after about half of it, by this test's own clock: both starts together use the budget once."""
    timed = ["--train.steps", "0", "--train.budget-seconds", f"{BUDGET_SECONDS:g}", "--train.reserve-seconds", "1"]
    timed += ["--compute.checkpoint-seconds", "1", "--compute.max-restarts", "1", *ALWAYS]
    plan = injection.Plan(tmp_path / "faults", injection.kill("*/checkpoint*.pt", at=3))
    with Watch(tmp_path / "runs", "train", fault_costs.fired(plan)) as watch:
        code, output = command(text, tmp_path, *timed, environment=plan.environment())
    assert code == 0, output
    plan.check()
    row, step = the_row(tmp_path / "runs"), the_step(tmp_path / "runs", "train")
    assert row.status == "done" and row.restarts == 1 and row.retries == 1
    came, starts = fault_costs.fired(plan)(), watch.starts
    assert came is not None and len(starts) == 2
    used = came - starts[0] + (step / "moments.pt").stat().st_mtime - starts[1]
    assert used - clock.BEAT_SECONDS - 0.5 <= row.train_seconds <= BUDGET_SECONDS + 1
    assert used <= BUDGET_SECONDS + clock.BEAT_SECONDS + 1
    assert 0 <= row.lost_seconds <= 1 + clock.BEAT_SECONDS
    told = f"{row.lost_seconds:.1f} s; charged {row.train_seconds:.1f} s of a budget of {BUDGET_SECONDS:g} s"
    faults.note(1, "training worker killed, timed", "after half the budget", watch, told, equal=False)
