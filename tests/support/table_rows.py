"""Records made of one row, a real one or one made up: other seeds, scores, settings, as their readers meet them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from hedgemix import recipes
from hedgemix.config import config_hash, to_dict
from pipeline.analysis import records
from pipeline.analysis.records import Record
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.storage.store import Storage


def folder(undisturbed: Path, place: Path) -> Path:
    """A copy of the record `tiny` of seed 1, without its failed seed."""
    out = Path(shutil.copytree(undisturbed, place / "runs", ignore=shutil.ignore_patterns("step.lock", "figures")))
    row = records.load(str(out / "tiny.parquet")).done[0]
    (out / "tiny.parquet").unlink()
    write(out, "tiny", [row["bpb_final"]], row)
    return out


def made_up(**other: Any) -> dict[str, Any]:
    """A finished seed's row of recipe laptop, of which no step was ever run."""
    recipe = recipes.laptop()
    known = Row(
        record="made-up", recipe="laptop", config_hash=config_hash(recipe), seed=1, status="done",
        bpb_final=2.5, nats_per_token=1.5, train_seconds=60.0, evaluate_seconds=27.0, quantize_seconds=2.0,
        total_bytes=1_390_000, artifact_bytes=1_290_000, limit_bytes=recipe.limits.total_bytes, within_limits=True,
        valid_tokens=100_000, valid_bytes=220_000, valid_sha256="a" * 64, text_sha256="b" * 64,
        train_sha256="c" * 64, tokenizer_sha256="d" * 64, artifact_sha256="e" * 64, hardware="a processor",
        workers=2, hedgemix_version="0.1.0", torch_version="2.13.0", train_path="runs/_steps/train-0",
        config=json.dumps(to_dict(recipe)),
    )  # fmt: skip
    return asdict(known) | other


def setting(fields: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a row of recipe laptop with these fields."""
    config = to_dict(recipes.laptop())
    for name, value in fields.items():
        *above, last = name.split(".")
        held = config
        for each in above:
            held = held[each]
        held[last] = value
    return {"config": json.dumps(config), "config_hash": json.dumps(fields)}


def study(out: Path, base: Sequence[float], variants: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]]) -> Path:
    """The file of a study `rates` as its driver leaves it, with a record of seeds 1, 2, ... for its base, and for every
    variant: fields, final scores. A variant without scores has no table yet."""
    write(out, "rates-base", base, made_up())
    listed = []
    for name, (fields, scores) in variants.items():
        listed.append({"name": name, "record": f"rates-{name}", "fields": fields})
        if scores:
            write(out, f"rates-{name}", scores, made_up(), **setting(fields))
    seeds = list(range(1, len(base) + 1))
    told = {"study": "rates", "recipe": "laptop", "base": "rates-base", "seeds": seeds, "variants": listed}
    path = out / "_studies" / "rates" / "study.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))
    return path


def write(out: Path, name: str, scores: Sequence[float], row: dict[str, Any] | None = None, **other: Any) -> Record:
    """A record whose seeds 1, 2, ... have these final scores, else the row of `tiny`."""
    row = row or records.load(str(out / "tiny.parquet")).done[0]
    rows = [
        Row(**row | {"record": name, "seed": seed, "bpb_final": score} | other)
        for seed, score in enumerate(scores, start=1)
    ]
    write_rows(Storage("", out), rows)
    return records.load(str(out / f"{name}.parquet"))


def change(out: Path, name: str, seed: int, **values: Any) -> Record:
    """The record with other values in one seed's row."""
    found = records.load(str(out / f"{name}.parquet"))
    [row] = [row for row in found.rows if row["seed"] == seed]
    write_rows(Storage("", out), [Row(**row | values)])
    assert len(pd.read_parquet(out / f"{name}.parquet")) == len(found.rows)
    return records.load(str(out / f"{name}.parquet"))
