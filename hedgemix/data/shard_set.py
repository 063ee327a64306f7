"""Shards that others made, as a data set: checked, with their tokenizer; they stay where and as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hedgemix.config import DataConfig, RecipeError
from hedgemix.data import memory, overlap, probes, shards, tokenizer
from hedgemix.data.own_files import DATASET, MadeFiles, OwnFiles
from hedgemix.data.reading import Problems

READ_TOKENS = 1 << 22


def make(config: DataConfig, folder: Path, log: Callable[[str], None]) -> MadeFiles:
    """Check the shards, and write the memory into the folder, if there is to be one.

    Raises RecipeError when the shards or their tokenizer cannot be used, or the folder holds others' files by the names
    of ours.
    """
    source = Path(config.shards_dir)
    own = OwnFiles(folder, (memory.FILE_NAME, DATASET))
    if not config.shards_dir or not source.is_dir():
        raise RecipeError(
            f"data.shards_dir: {config.shards_dir!r} is not a folder; name the folder of the shards, or run "
            f"`hedgemix download --folder {source if config.shards_dir else 'data/fineweb'}` first"
        )
    model = Path(config.tokenizer) if config.tokenizer else _only_tokenizer(source)
    processor = tokenizer.load(model)
    if processor.vocab_size() != config.vocab_size:
        raise RecipeError(
            f"data.vocab_size is {config.vocab_size}, but {model} has {processor.vocab_size()} pieces; "
            "set both to what made the shards"
        )
    if wrong := probes.miscounted(processor):
        raise RecipeError(
            f"data.tokenizer: {model} cannot be scored by the byte: {wrong[0]}; use shards of another tokenizer, one "
            "with pieces that begin with a space"
        )
    if share := probes.changed_share(processor):
        log(f"tokenizer: it does not write every text as it is; of the bytes of probes it changes or loses {share:.1%}")
    side_cars = {*source.glob("*val_bytes_*.bin")}  # bytes of the validation tokens, which are counted here
    paths: dict[str, list[Path]] = {}
    problems = Problems()
    for name in ("train", "val"):
        paths[name] = sorted({*source.glob(f"*_{name}_*.bin"), *source.glob(f"{name}_*.bin")} - side_cars)
        if not paths[name]:
            raise RecipeError(f"data.shards_dir: {source} has no *_{name}_*.bin; `hedgemix download` fetches FineWeb's")
        for path in paths[name]:
            try:
                shards.open_shard(path, config.vocab_size)
            except RecipeError as error:
                problems.add(error)
    problems.tell()
    others = len({*source.glob("*.bin")} - {*paths["train"], *paths["val"]} - side_cars)
    passed = f"; {others} other .bin files there are passed over" if others else ""
    log(f"shards: {len(paths['train'])} for training and {len(paths['val'])} for validation are sound{passed}")
    share = overlap.share_in_tokens(
        shards.TokenStream(paths["val"], config.max_valid_tokens), shards.TokenStream(paths["train"])
    )
    window = f"{overlap.WINDOW_TOKENS} tokens"
    log(f"{share:.2%} of the validation text's windows of {window} are in the training text; others' shards stay whole")
    known = {"valid_overlap_share": share, "overlap_window": window, "train_bytes_removed": 0}
    if config.memory_bytes or own.names:
        own.begin((memory.FILE_NAME, DATASET))
    if config.memory_bytes:
        own.path(memory.FILE_NAME)
    documents = memory.shard_documents(processor, shards.TokenStream(paths["train"]))
    known |= memory.write(documents, config.memory_bytes, processor, folder, log)
    valid = shards.TokenStream(paths["val"], config.max_valid_tokens)
    counts = np.zeros(config.vocab_size, np.int64)
    for start in range(0, len(valid), READ_TOKENS):
        piece = valid.read(start, min(READ_TOKENS, len(valid) - start))
        counts += np.bincount(piece, minlength=config.vocab_size)
    if unknown := counts[processor.unk_id()]:
        log(f"{unknown:,} of the validation tokens are unknown ones: the text they stand for is counted as 0 bytes")
    if not counts[processor.bos_id()] and probes.adds_prefix(processor):
        log(
            "no BOS is in the validation text: the space that the tokenizer puts before each document is counted "
            "as text"
        )
    known |= {"train_documents": 0, "text_sha256": ""}
    return MadeFiles(model, processor, paths["train"], paths["val"], known)


def _only_tokenizer(folder: Path) -> Path:
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise RecipeError(
            f"data.shards_dir: {folder} has {len(models)} .model files; name the one the shards were made with in "
            "data.tokenizer"
        )
    return models[0]
