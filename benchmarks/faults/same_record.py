"""Whether a disturbed record is what an undisturbed one would have been: its rows, its steps, their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.faults.disturbances import Bounds
from hedgemix import stages
from hedgemix.runtime.files import read_json, sha256_of, write_json
from hedgemix.runtime.layout import RESULT
from hedgemix.standalone import script
from pipeline import record
from pipeline.storage.store import Storage

BITS = ("bpb_full", "bpb_quantized", "bpb_mixed", "bpb_ttt", "bpb_final", "bpb_hedge", "bpb_logistic", "bpb_published")
TIMEOUT = timedelta(hours=1)


def reference(rank: int, folder: str, seeds: Sequence[int], arguments: list[str]) -> None:
    """These seeds' steps as plain functions, without Ray, the evaluation in two ranks; rank 0 writes reference.json:
    the results of each seed, by its number as text."""
    from hedgemix.runtime import collectives

    torch.set_num_threads(1)
    root, found = Path(folder), dict[str, dict[str, Any]]()
    recipe, _ = record.parse(arguments)
    room = stages.artifact_room(recipe, script.n_bytes(recipe))

    def dataset() -> Any:
        return record.prepare(recipe, Storage("", root), record.Console(quiet=True))[0]

    if rank == 0:
        data = dataset()
        given: Any = {"recipe": recipe, "dataset": data}
        stages.counts_stage(**given, folder=root)
        for seed in seeds:
            here = root / str(seed)
            stages.train_stage(**given, seed=seed, folder=here)
            found[str(seed)] = asdict(stages.score_stage(**given, train_folder=here))
            quantized = stages.quantize_stage(**given, seed=seed, train_folder=here, folder=here, room_bytes=room)
            found[str(seed)] |= asdict(quantized)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2, timeout=TIMEOUT)
    collectives.barrier()
    for seed in seeds:
        here = root / str(seed)
        result = stages.evaluate_stage(
            recipe=recipe,
            dataset=dataset(),
            artifact_path=here / stages.ARTIFACT,
            index_folder=root / stages.INDEX,
            folder=here,
        )
        if rank == 0:
            found[str(seed)] |= asdict(result)
    if rank == 0:
        write_json(root / "reference.json", found)
    dist.destroy_process_group()


def undisturbed(folder: Path, seeds: Sequence[int], arguments: list[str]) -> dict[int, dict[str, Any]]:
    """`reference` in two processes of its own; the results by seed."""
    torch.multiprocessing.spawn(reference, (str(folder), list(seeds), arguments), nprocs=2, daemon=True)
    return {int(seed): found for seed, found in read_json(folder / "reference.json").items()}


def wrong_rows(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], expected: Mapping[int, Mapping[str, Any]]
) -> list[str]:
    """What is wrong with a table: every seed has one row, is done, and has the expected bits, bit by bit."""
    found = []
    if (there := sorted(row["seed"] for row in rows)) != sorted(seeds):
        found.append(f"the table has rows of seeds {there}, not of {sorted(seeds)}")
    for row in rows:
        if row["status"] != "done":
            found.append(f"seed {row['seed']} is {row['status']}: {row['error']}")
            continue
        for name in BITS:
            value = row[name]
            if value is None or not 0 < value < 20:
                found.append(f"seed {row['seed']}: {name} is {value}")
            elif row["seed"] in expected and value != expected[row["seed"]][name]:
                found.append(f"seed {row['seed']}: {name} is {value!r}, undisturbed {expected[row['seed']][name]!r}")
        if row["seed"] in expected and row["artifact_sha256"] != expected[row["seed"]]["artifact_sha256"]:
            found.append(f"seed {row['seed']}: another artifact than undisturbed")
        if not row["retries"] >= 0 or not row["lost_seconds"] >= 0:
            found.append(f"seed {row['seed']}: {row['retries']} retries, {row['lost_seconds']} seconds lost")
    return found


def wrong_steps(folder: Path, bounds: Mapping[str, Bounds]) -> list[str]:
    """What is wrong with the steps of a runs folder: all are done, their files are what they wrote, and they tell at
    least the attempts and lost seconds that `bounds` asks for, which were read when they were hit."""
    found = []
    for path in sorted(folder.glob("_steps/*")):
        try:
            told = read_json(path / RESULT)
        except (OSError, ValueError) as error:
            found.append(f"{path.name} is not done: {error}")
            continue
        for name, file in told["files"].items():
            if not (path / name).is_file() or sha256_of(path / name) != file["sha256"]:
                found.append(f"{path.name}: {name} is not what was written")
        bound = bounds.get(path.name, Bounds())
        if told["attempts"] < bound.attempts:
            found.append(f"{path.name} tells {told['attempts']} attempts; it was started {bound.attempts} times")
        if told["lost_seconds"] < bound.lost_seconds:
            lost = f"{told['lost_seconds']:.2f} seconds lost; it lost {bound.lost_seconds:.2f}"
            found.append(f"{path.name} tells {lost}")
    missing = sorted(set(bounds) - {path.name for path in folder.glob("_steps/*")})
    return found + [f"{name} was worked on and is gone" for name in missing]
