"""Files of a record that storage damages: noticed before anything reads them, and made again with the same numbers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from benchmarks.faults import injection
from benchmarks.faults.cluster import until
from hedgemix.runtime.files import read_json, sha256_of
from support import fault_costs
from support.fault_costs import Faults, Watch
from support.faulty_record import (
    ALWAYS,
    OFTEN,
    Undisturbed,
    again,
    begun,
    command,
    cut,
    ended,
    flip,
    the_step,
)

pytestmark = pytest.mark.soak
HARM: list[Callable[[Path], None]] = [flip, cut]
SAID = {"flip": "a bit flipped", "cut": "cut short"}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_costs_the_work_since_the_one_before(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults, harm: Callable[[Path], None]
) -> None:
    out = tmp_path / "runs"
    killed = injection.Plan(tmp_path / "faults", injection.kill("*/checkpoint*.pt", at=5, machine=True))
    with Watch(out, "train", fault_costs.fired(killed)) as watch:
        assert command(text, tmp_path, *OFTEN, environment=killed.environment())[0] == -signal.SIGKILL
        killed.check()
        folder = the_step(out, "train")
        newest, before = (entry["number"] for entry in read_json(folder / "checkpoint.json")["checkpoints"])
        harm(folder / f"checkpoint-{newest}.pt")
        # Nothing of this plan happens; its marks tell which files were read.
        never = 10**6
        reads = [injection.fail(f"*/checkpoint-{number}.pt", "EIO", never, event="read") for number in (newest, before)]
        seen = injection.Plan(tmp_path / "seen", *reads)
        code, output = command(text, tmp_path, *OFTEN, environment=seen.environment())
    assert code == 0, output
    assert list(seen.folder.glob("fault-1.*")), "the checkpoint before was not read"
    row = ended(out, undisturbed, retries=1)
    assert row.restarts == 1
    told = f"{(watch.again or 0) + newest - before} steps, {row.lost_seconds:.1f} s"
    faults.note(13, f"newest checkpoint {SAID[harm.__name__]}", "after machine and driver were killed", watch, told)


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_artifact_is_made_again_and_the_score_stands(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults, harm: Callable[[Path], None]
) -> None:
    """After everything was done; the artifact comes out the same, so what was scored is it."""
    out = begun(undisturbed, tmp_path)
    artifact = the_step(out, "quantize") / "artifact.hmx"
    scored = the_step(out, "evaluate") / "result.json"
    sha256, before = sha256_of(artifact), scored.stat().st_mtime_ns
    harm(artifact)
    damaged = fault_costs.Now()
    with Watch(out, "quantize", damaged) as watch:
        damaged.say()
        code, output = again(text, tmp_path)
    assert code == 0 and "damaged, made again" in output, output
    assert sha256_of(artifact) == sha256 and scored.stat().st_mtime_ns == before
    ended(out, undisturbed, retries=1)
    name = f"artifact {SAID[harm.__name__]}"
    faults.note(14, name, "after all was done", watch, "quantization; the score stands")


def test_an_artifact_damaged_before_it_is_scored_is_made_again(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults
) -> None:
    """The evaluation is killed once, and finds another artifact when it starts again."""
    out = begun(undisturbed, tmp_path, "evaluate", "quantize")
    plan = injection.Plan(tmp_path / "faults", injection.kill("*/trace.jsonl", at=1, event="write"))
    killed = fault_costs.fired(plan)

    def harm() -> None:
        until(lambda: killed() is not None, 200, lambda: "the evaluation was not killed")
        flip(the_step(out, "quantize") / "artifact.hmx")

    thread = Thread(target=harm, daemon=True)
    thread.start()
    options = ["--compute.checkpoint-seconds", "0", "--compute.max-restarts", "3", *ALWAYS]
    with Watch(out, "quantize", killed) as watch:
        code, output = command(text, tmp_path, *options, environment=plan.environment())
    thread.join()
    assert code == 0 and "damaged, made again" in output, output
    plan.check()
    ended(out, undisturbed, retries=2)
    faults.note(
        14, "artifact a bit flipped, the evaluation killed", "between quantization and score", watch, "quantization"
    )


@pytest.mark.parametrize("harm", HARM)
def test_damaged_weights_are_made_again_from_the_last_checkpoint(
    undisturbed: Undisturbed, text: Path, tmp_path: Path, faults: Faults, harm: Callable[[Path], None]
) -> None:
    out = begun(undisturbed, tmp_path, "quantize", "score", "evaluate")
    weights = the_step(out, "train") / "weights.pt"
    sha256 = sha256_of(weights)
    harm(weights)
    damaged = fault_costs.Now()
    with Watch(out, "train", damaged) as watch:
        damaged.say()
        code, output = again(text, tmp_path)
    assert code == 0 and "damaged, made again" in output, output
    assert sha256_of(weights) == sha256
    row = ended(out, undisturbed, retries=range(2, 4))  # who reads the weights first, or both at once, starts in vain
    assert row.restarts == 1
    told = "averaging and calibration: training goes on from its last checkpoint"
    faults.note(15, f"weights.pt {SAID[harm.__name__]}", "between training and quantization", watch, told)
