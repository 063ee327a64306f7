"""A text whose end is held out, as a data set: for measurements that have no record.

Documents stand in the order of their files. What comes before the end is training text: sorted by hash, as a record's
is, without the paragraphs that repeat what is held out; a tokenizer is trained on it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from hedgemix.config import DataConfig, RecipeError, config_hash
from hedgemix.data import bpb, corpus, overlap, shards, text_files, text_set, tokenizer
from hedgemix.data import dataset as datasets
from hedgemix.data.dataset import Dataset
from hedgemix.data.reading import Reading


def dataset_of(path: Path, data: DataConfig, held_bytes: int, folder: Path) -> Dataset:
    """The data set of a file or folder of documents, tokenized as `data` says into a folder inside `folder`, at the
    first time. Validation is the last documents that have `held_bytes` or more. Raises RecipeError for a text that is
    too short."""
    chosen = config_hash(str(path.resolve()), data.vocab_size, data.case_markers, held_bytes)
    folder = folder / f"{path.name}-{chosen}"
    if not (folder / datasets.FILE_NAME).exists():
        documents = list(text_files.documents([path], data.text_field))
        sizes = np.cumsum([len(document.encode()) for document in documents])
        first = int(np.searchsorted(sizes, sizes[-1] - held_bytes, "right"))
        if not first:
            raise RecipeError(f"{path} has no more than the {sizes[-1]:,} bytes to hold out; lower --held-bytes")
        folder.mkdir(exist_ok=True)
        windows = overlap.of_documents(documents[first:], overlap.WINDOW_WORDS)
        rest = corpus.by_hash(documents[:first], Reading(), folder)
        sides = {"train": list(overlap.without_repeats(rest, windows, overlap.WINDOW_WORDS)), "val": documents[first:]}
        processor = tokenizer.train(sides["train"], data.vocab_size, folder / text_set.MODEL, data.case_markers)
        tables = bpb.byte_tables(processor)
        for name, side in sides.items():
            parts = corpus.batches(side, text_set.BATCH_CHARACTERS)
            tokens = np.concatenate([text_set.encode_part(processor, tables, part) for part in parts])
            shards.write_shard(folder / f"{name}_000000.bin", tokens)
        source = DataConfig(source="shards", shards_dir=str(folder), vocab_size=data.vocab_size)
        made = datasets.prepare(source, folder / "made", lambda line: print(line, file=sys.stderr))
        size = sum(len(document.encode()) for document in sides["train"])
        datasets.save(replace(made, train_bytes=size), folder)
    return datasets.load(folder)
