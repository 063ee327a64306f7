"""Files of text to token shards, in processes of their own, while the first sections run.

Documents are held out by the hash of their content, as in any data set of hedgemix: no document is on both sides. The
tokenizer is given (the official one normalises text, so bytes are counted from the tokens, as FineWeb's are).

    python -m benchmarks.gpu.text FOLDER TOKENIZER SHARDS VALID_FRACTION PROCESSES FILE...
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hedgemix.config import DataConfig, RecipeError, config_hash
from hedgemix.data import corpus, dataset, shards, text_files, text_set, tokenizer
from hedgemix.data.dataset import Dataset

BATCH_CHARACTERS = 1_000_000
"""Of the documents that a process is given at once."""


@dataclass(frozen=True)
class Text:
    """Files of text, and a folder of shards with the tokenizer that made them."""

    files: tuple[Path, ...]
    shards: Path
    tokenizer: Path
    valid_fraction: float
    folder: Path
    """Of the files' own shards and dataset.json."""

    def given(self) -> Dataset:
        """The folder of shards."""
        return dataset.prepare(self.config(self.shards), self.folder / "given", log=lambda line: None)

    def config(self, folder: Path) -> DataConfig:
        size = tokenizer.load(self.tokenizer).vocab_size()
        return DataConfig(source="shards", shards_dir=str(folder), tokenizer=str(self.tokenizer), vocab_size=size)

    def start(self) -> None:
        """Begin to tokenize, unless an earlier call did."""
        if (self.folder / dataset.FILE_NAME).exists() or self.running():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = [self.folder, self.tokenizer, self.shards, self.valid_fraction, processes(), *self.files]
        with open(self.folder / "log.txt", "w") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.text", *map(str, arguments)], stdout=log, stderr=log
            )
        (self.folder / "pid").write_text(str(child.pid))

    def running(self) -> bool:
        try:
            state = Path(f"/proc/{int((self.folder / 'pid').read_text())}/stat").read_text()
        except (OSError, ValueError):
            return False
        return state.rpartition(")")[2].split()[0] != "Z"  # nobody may have waited for it yet

    def wait(self) -> Dataset:
        """The files' tokens, with the given training shards beside them; RuntimeError where tokenizing failed."""
        while self.running():
            time.sleep(0.1)
        if not (self.folder / dataset.FILE_NAME).exists():
            log = self.folder / "log.txt"
            raise RuntimeError(f"tokenizing failed: {log.read_text()[-1500:] if log.exists() else 'it never began'}")
        return dataset.load(self.folder)


def find_model(folder: Path) -> Path:
    """The folder's only tokenizer; raises RecipeError where it has none, or several."""
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise RecipeError(f"--shards: {folder} has {len(models)} .model files; name one with --tokenizer")
    return models[0]


def find(files: Sequence[Path], folder: Path, model: Path, valid_fraction: float, work: Path) -> Text:
    """Raises RecipeError for files that are not there."""
    for path in files:
        if not path.is_file():
            raise RecipeError(f"--text: {path} is no file; name the files themselves")
    named = [[path.name, path.stat().st_size] for path in files]
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    key = config_hash(named, sha256, valid_fraction)
    places = tuple(path.resolve() for path in files), folder.resolve(), model.resolve()
    return Text(*places, valid_fraction, work / f"text-{key}")


def processes() -> int:
    """Most of the machine's cores: some are left for the first sections."""
    return max(1, 3 * len(os.sched_getaffinity(0)) // 4)


def main(folder: Path, model: Path, given: Path, valid_fraction: float, count: int, files: Sequence[Path]) -> None:
    """Write the shards of both sides, then dataset.json."""
    began = time.monotonic()
    sides = corpus.split(corpus.distinct(text_files.documents(files)), valid_fraction)
    print(f"{time.monotonic() - began:.1f} s: {len(sides[0]):,} documents, {len(sides[1]):,} held out", flush=True)
    with multiprocessing.Pool(count, load, [model]) as pool:
        for name, documents in zip(("train", "val"), sides, strict=True):
            tokens = np.concatenate(pool.map(encode, batches(documents), chunksize=1))
            for number, start in enumerate(range(0, len(tokens), text_set.SHARD_TOKENS)):
                part = tokens[start : start + text_set.SHARD_TOKENS]
                shards.write_shard(folder / f"text_{name}_{number:06d}.bin", part)
    for path in given.glob("*_train_*.bin"):
        shutil.copyfile(path, folder / f"given_{path.name}")
    size = tokenizer.load(model).vocab_size()
    config = DataConfig(source="shards", shards_dir=str(folder), tokenizer=str(model), vocab_size=size)
    dataset.save(dataset.prepare(config, folder), folder)
    print(f"{time.monotonic() - began:.1f} s in all, {count} processes", flush=True)


def batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if sum(map(len, batch)) >= BATCH_CHARACTERS:
            yield batch
            batch = []
    if batch:
        yield batch


def load(model: Path) -> None:
    global processor
    processor = tokenizer.load(model)


def encode(documents: list[str]) -> np.ndarray:
    return np.concatenate(tokenizer.encode_batch(processor, documents))


if __name__ == "__main__":
    if len(sys.argv) < 7:
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & {*sys.argv[1:]} else 2)
    to, model_path, given_folder, fraction, number, *paths = sys.argv[1:]
    main(Path(to), Path(model_path), Path(given_folder), float(fraction), int(number), [Path(path) for path in paths])
