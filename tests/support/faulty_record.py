"""Records under faults: the command with a plan, and its row beside that of an undisturbed record."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

from benchmarks.faults import injection
from hedgemix.runtime import clock
from support import tiny_record

BITS = ["bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final", "bpb_published"]
ALWAYS = ["--seeds", "1", "--record", "tiny"]
OFTEN = ["--compute.checkpoint-seconds", "0", "--compute.max-restarts", "1", *ALWAYS]
"""A checkpoint after every step and chunk."""
LONG = ["--train.steps", "600", *ALWAYS]
"""Training of a quarter of a minute or more, so that there is work to lose."""

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


def command(text: Path, folder: Path, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of the command with the runs folder `runs` in this folder."""
    out = folder / "runs"
    out.mkdir(exist_ok=True)
    return tiny_record.run(tiny_record.arguments(text, out, *options), out, environment)


def run(text: Path, folder: Path, *faults: injection.Fault, options: list[str] = OFTEN) -> tuple[int, str]:
    """A record of seed 1 under these faults, each of which must fire; exit code and output."""
    plan = injection.Plan(folder / "faults", *faults)
    told = command(text, folder, *options, environment=plan.environment())
    plan.check()
    return told


def again(text: Path, folder: Path, *options: str) -> tuple[int, str]:
    """The same command, undisturbed."""
    return command(text, folder, *(options or OFTEN))


def ended(out: Path, undisturbed: Undisturbed, *, retries: int | range = 0) -> pd.Series:
    """The row, which must be done with the undisturbed record's bits after so many retries of its steps."""
    row = the_row(out)
    assert row.status == "done", f"{row.status}: {row.error}"
    assert bits(row) == undisturbed_bits(undisturbed), (bits(row), undisturbed_bits(undisturbed))
    assert row.retries in (retries if isinstance(retries, range) else [retries]), f"{row.retries} retries"
    return row


def begun(undisturbed: Undisturbed, folder: Path, *without: str) -> Path:
    """A copy of the undisturbed record's runs folder for other options, without seed 1's steps of these kinds."""
    out = folder / "runs"
    shutil.copytree(undisturbed[0], out)
    (out / "tiny.parquet").unlink()
    shutil.rmtree(out / "_records")
    for path in out.glob("_steps/*"):
        if path.name.split("-")[0] in without or not (path / "result.json").exists():
            shutil.rmtree(path)
    return out


def the_step(out: Path, kind: str) -> Path:
    """The folder of the only step of this kind."""
    [path] = out.glob(f"_steps/{kind}-*")
    return path


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def training_for(out: Path, seconds: float) -> bool:
    """Whether training below this runs folder has noted so many seconds."""
    return any(clock.read(path)["elapsed_seconds"] >= seconds for path in out.glob("_steps/train-*/clock.json"))
