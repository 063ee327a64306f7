"""A finished run of the tiny artifact, as the pipeline leaves one: table, artifact, evaluation, data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hedgemix.artifact import format as artifact
from hedgemix.audit import claim
from hedgemix.audit.claim import Claim
from hedgemix.config import (
    DataConfig,
    EvaluateConfig,
    LimitsConfig,
    Recipe,
    TrainConfig,
    config_hash,
    to_dict,
)
from hedgemix.data import dataset as datasets
from hedgemix.data import shards
from hedgemix.runtime.files import write_json
from hedgemix.standalone import script
from pipeline.results.schema import Row
from pipeline.results.table import write_rows
from pipeline.storage.store import Storage
from support import cheats, tiny_artifact
from support.tiny_artifact import CONFIG


@dataclass
class Record:
    folder: Path

    @property
    def table(self) -> Path:
        return self.folder / "tiny.parquet"

    def claim(self, name: str = "final") -> Claim:
        [found] = claim.claims(self.table, (), name)
        return found

    def evaluation(self) -> Path:
        return self.folder / "_steps" / "evaluate-0"

    def moved(self, folder: Path) -> Record:
        """A copy whose table names paths of another folder that is not there, as a reviewer gets it."""
        own = Record(shutil.copytree(self.folder, folder))
        row = claim.read_rows(own.table)[0]
        here = str(self.folder)
        own.change(**{column: row[column].replace(here, "/elsewhere/runs") for column in claim.PATHS})
        return own

    def change(self, **values: Any) -> None:
        claim.write_columns(self.table, 7, values)


def make(
    folder: Path,
    config: EvaluateConfig = CONFIG,
    remembered: Sequence[str] = (),
    texts: int = 4,
) -> Record:
    train, steps = TrainConfig(steps=4, batch_tokens=512), folder / "_steps"
    case = tiny_artifact.make(steps / "quantize-0", remembered, texts, recipe="tiny", seed=7)
    model, data = artifact.read(case.artifact), steps / "data-0"
    data.mkdir()
    shards.write_shard(data / "val_000000.bin", case.tokens)
    other = np.random.default_rng(0).permutation(case.tokens)
    for number in range(2):
        shards.write_shard(data / f"train_{number:06d}.bin", np.roll(other, number))
    (data / "tokenizer.model").write_bytes(model.tokenizer)
    vocab_size = model.header["vocab_size"]
    source = DataConfig(source="shards", shards_dir=str(data), vocab_size=vocab_size)
    limits = LimitsConfig(total_bytes=300_000)
    recipe = Recipe("tiny", data=source, train=train, evaluate=config, limits=limits)
    made = datasets.prepare(source, data, print)
    datasets.save(made, data)
    with cheats.eager():
        result = asdict(case.score(config, trace=steps / "evaluate-0" / "trace.jsonl"))
    code_bytes = script.n_bytes(recipe)
    quantized = {"artifact_bytes": model.n_bytes, "artifact_sha256": model.sha256}
    trained = training(steps / "train-0", train)
    finish(steps / "evaluate-0", result | {"code_bytes": code_bytes, "evaluate_workers": 2}, result["evaluate_seconds"])
    finish(steps / "quantize-0", quantized, 1.0)
    known = {**asdict(made), **trained, **quantized, **result, "valid_tokens": made.valid_tokens - 1}
    row = Row(
        **{field.name: known[field.name] for field in fields(Row) if field.name in known},
        record="tiny",
        recipe="tiny",
        config_hash=config_hash(recipe),
        seed=7,
        status="done",
        order=config.order,
        workers=recipe.compute.workers,
        evaluate_workers=2,
        code_bytes=code_bytes,
        total_bytes=model.n_bytes + code_bytes,
        limit_bytes=recipe.limits.total_bytes,
        train_set_tokens=made.train_tokens,
        code_sha256=script.sha256(),
        requirements=script.requirements(recipe),
        artifact_path=str(case.artifact),
        evaluate_path=str(steps / "evaluate-0"),
        train_path=str(steps / "train-0"),
        dataset_path=str(data),
        config=json.dumps(to_dict(recipe)),
    )
    write_rows(Storage("", folder), [row, replace(row, seed=8, status="failed")])
    return Record(folder)


def finish(folder: Path, result: dict[str, Any], seconds: float) -> None:
    """What the end of a step leaves: its result, and the clock that ran along."""
    write_json(folder / "result.json", {"key": "0", "result": result})
    write_json(folder / "clock.json", {"elapsed_seconds": seconds, "starts": 1})


def training(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The log of a training that took a second; returns its result."""
    folder.mkdir()
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": step * config.batch_tokens,
            "elapsed_seconds": 0.2 * (step - 1),
            "fraction": (step - 1) / config.steps,
            "loss_nats": 6.0 - step,
        }
        for step in range(1, config.steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "steps": config.steps,
        "tokens": lines[-1]["tokens"],
        "train_loss_nats": lines[-1]["loss_nats"],
        "train_seconds": 1.0,
        "loop_seconds": 0.8,
        "calibrate_seconds": 0.2,
        "warmup_seconds": 0.5,
        "ms_per_step": 200.0,
    }
    finish(folder, result, 1.0)
    return result
