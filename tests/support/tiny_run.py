"""A finished run of the tiny artifact, as the pipeline leaves one: table, artifact, evaluation, data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hedgemix.artifact import format as artifact
from hedgemix.audit import claim
from hedgemix.audit.claim import Claim
from hedgemix.config import DataConfig, EvaluateConfig, LimitsConfig, Recipe, to_dict
from hedgemix.data import dataset as datasets
from hedgemix.data import shards
from hedgemix.runtime.files import write_json
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


def make(folder: Path, config: EvaluateConfig = CONFIG, remembered: Sequence[str] = ()) -> Record:
    recipe = Recipe("tiny", evaluate=config, limits=LimitsConfig(total_bytes=300_000))
    steps = folder / "_steps"
    case = tiny_artifact.make(steps / "quantize-0", remembered)
    model, data = artifact.read(case.artifact), steps / "data-0"
    data.mkdir()
    shards.write_shard(data / "val_000000.bin", case.tokens)
    other = np.random.default_rng(0).permutation(case.tokens)
    for number in range(2):
        shards.write_shard(data / f"train_{number:06d}.bin", np.roll(other, number))
    (data / "tokenizer.model").write_bytes(model.tokenizer)
    vocab_size = model.header["vocab_size"]
    made = datasets.prepare(DataConfig(source="shards", shards_dir=str(data), vocab_size=vocab_size), data, print)
    datasets.save(made, data)
    with cheats.eager():
        result = asdict(case.score(config, trace=steps / "evaluate-0" / "trace.jsonl"))
    write_json(steps / "evaluate-0" / "result.json", {"key": "0", "result": result})
    row = Row(
        record="tiny",
        recipe="tiny",
        config_hash="0",
        seed=7,
        status="done",
        train_seconds=1.0,
        evaluate_seconds=result["evaluate_seconds"],
        bpb_final=result["bpb_final"],
        bpb_published=result["bpb_published"],
        artifact_bytes=model.n_bytes,
        code_bytes=1000,
        valid_bytes=made.valid_bytes,
        valid_sha256=made.valid_sha256,
        train_sha256=made.train_sha256,
        tokenizer_sha256=made.tokenizer_sha256,
        artifact_sha256=model.sha256,
        artifact_path=str(case.artifact),
        evaluate_path=str(steps / "evaluate-0"),
        dataset_path=str(data),
        config=json.dumps(to_dict(recipe)),
    )
    write_rows(Storage("", folder), [row, replace(row, seed=8, status="failed")])
    return Record(folder)
