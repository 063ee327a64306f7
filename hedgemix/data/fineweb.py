"""The official FineWeb shards and their tokenizer, fetched from the Hugging Face hub.

Notable: files are checked as shards before they get their final name, so a folder only ever holds whole ones, and a
second call fetches what is missing. Interrupted downloads go on where they stopped (huggingface_hub does that).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

import numpy as np
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from sentencepiece import SentencePieceProcessor

from hedgemix.config import RecipeError
from hedgemix.data import bpb, shards, tokenizer

REPOSITORY = "willdepueoai/parameter-golf"
OTHERS = {
    "sp8192": "kevclark/parameter-golf",
    "sp8192_lossless_caps_caseops_v1_reserved": "romeerp/parameter-golf-caseops-v1",
}
"""Repositories of variants that the official one lacks. The second has markers for capitals, and beside its validation
shards files of the bytes of each token."""
VARIANT = re.compile(r"sp(\d+)(_\w+)?")
MOST_DIFFERENT = 1e-3
"""Share of the bytes by which text and its normalised form may differ: web text by 0.007 %."""
READ_TOKENS = 1 << 22
STAGING = ".hedgemix-download"
Result = TypeVar("Result")


def download(
    folder: str | Path,
    train_shards: int,
    variant: str = "sp1024",
    repo: str = "",
    log: Callable[[str], None] = print,
) -> Path:
    """Fetch all validation shards, the first `train_shards` training shards (100 M tokens, 200 MB each) and the
    tokenizer into `folder`, flat; returns the tokenizer's path. Whole files that are there already stay, others by
    these names are put aside. repo: "" is the one known for the variant.

    Use it with DataConfig(source="shards", shards_dir=folder, tokenizer=the returned path, vocab_size=1024).
    Raises RecipeError when the hub cannot be reached, lacks a file or sends a broken one.
    """
    size, repo = VARIANT.fullmatch(variant), repo or OTHERS.get(variant, REPOSITORY)
    if size is None:
        raise RecipeError(f"variant {variant!r} is unknown; use sp and the vocabulary size, as in sp1024")
    if train_shards < 1:
        raise RecipeError(f"train_shards is {train_shards}; ask for at least 1")
    root, vocab_size = Path(folder), int(size[1])
    prefix = f"datasets/datasets/fineweb10B_{variant}"
    listed = _ask(repo, lambda: HfApi().list_repo_files(repo, repo_type="dataset"))
    paths = {
        name: sorted(path for path in listed if re.fullmatch(rf"{prefix}/fineweb_{name}_\d+\.bin", path))
        for name in ("val", "val_bytes", "train")
    }
    if not paths["val"]:
        raise RecipeError(f"{repo} has no validation shards of variant {variant!r}; name another variant or repo")
    if len(paths["train"]) < train_shards:
        raise RecipeError(
            f"{repo} has {len(paths['train'])} training shards of variant {variant!r}, not {train_shards}; "
            "lower train_shards"
        )
    for path in paths["val"] + paths["train"][:train_shards]:
        _fetch(repo, path, root, lambda file: shards.open_shard(file, vocab_size), log)
    for path in paths["val_bytes"]:
        _fetch(repo, path, root, shards.map_shard, log)
    model = f"datasets/tokenizers/fineweb_{vocab_size}_bpe{size[2] or ''}.model"
    _fetch(repo, model, root, lambda file: _check_size(tokenizer.load(file).vocab_size(), vocab_size, model), log)
    shutil.rmtree(root / STAGING, ignore_errors=True)
    if paths["val_bytes"]:
        valid, told = (
            shards.TokenStream([root / Path(path).name for path in paths[name]]) for name in ("val", "val_bytes")
        )
        log(_check_side_cars(tokenizer.load(root / Path(model).name), valid, told))
    return root / Path(model).name


def _check_side_cars(processor: SentencePieceProcessor, valid: shards.TokenStream, told: shards.TokenStream) -> str:
    """Hold the bytes that files beside the validation shards tell of each token against what the tokens decode to,
    which is what counts; say how they differ. A tokenizer that normalises makes other text, so a little is right:
    raises RecipeError for more than MOST_DIFFERENT of all bytes, other lengths, or bytes of a token without text."""
    if len(told) != len(valid):
        raise RecipeError(
            f"data.shards_dir: the *val_bytes_*.bin tell the bytes of {len(told):,} tokens, and there are "
            f"{len(valid):,} of validation; fetch both again, or remove the former"
        )
    tables = bpb.byte_tables(processor)
    counted = given = differ = 0
    for start in range(0, len(valid), READ_TOKENS):
        stop = min(start + READ_TOKENS, len(valid))
        sizes_B, told_B = bpb.token_bytes(tables, valid, start, stop), told.read(start, stop - start)
        without_text_B = (tables.is_marker | tables.is_control)[valid.read(start, stop - start)]
        if (wrong_B := without_text_B & (sizes_B == 0) & (told_B > 0)).any():
            raise RecipeError(
                f"data.shards_dir: the *val_bytes_*.bin give bytes to the token at {start + int(wrong_B.argmax()):,}, "
                "which stands for no text; remove them, or fetch them and the shards again"
            )
        counted += int(sizes_B.sum(dtype=np.int64))
        given += int(told_B.sum(dtype=np.int64))
        differ += int((sizes_B != told_B).sum())
    if abs(given - counted) > MOST_DIFFERENT * counted:
        raise RecipeError(
            f"data.shards_dir: the *val_bytes_*.bin give the validation text {given:,} bytes, and its tokens decode to "
            f"{counted:,}; fetch both again, or remove the former"
        )
    return (
        f"bytes: {counted:,} that the validation tokens decode to, which count; {given:,} by the files beside them, "
        f"which differ at {differ:,} tokens"
    )


def _fetch(repo: str, name: str, root: Path, check: Callable[[Path], object], log: Callable[[str], None]) -> None:
    final = root / Path(name).name
    if final.exists():
        try:
            check(final)
            return
        except RecipeError as error:
            aside = _free(final.with_name(f"{final.name}.aside"))
            final.rename(aside)  # it may be somebody's
            log(f"fetching again, what was there is now {aside.name}: {error}")
    log(f"fetching {final.name}")
    staging = root / STAGING
    fetched = Path(_ask(repo, lambda: hf_hub_download(repo, name, repo_type="dataset", local_dir=staging)))
    try:
        check(fetched)
    except RecipeError:
        fetched.unlink()  # or the hub client would take it for whole the next time
        raise
    os.replace(fetched, final)


def _free(path: Path) -> Path:
    """The path, or with a number behind it the first that nothing has."""
    others = (path.with_name(f"{path.name}{number}") for number in count(2))
    return next(free for free in chain([path], others) if not free.exists())


def _check_size(size: int, expected: int, name: str) -> None:
    if size != expected:
        raise RecipeError(f"tokenizer {name} has {size} pieces, expected {expected}; name another variant")


def _ask(repo: str, request: Callable[[], Result]) -> Result:
    try:
        return request()
    except (HfHubHTTPError, EntryNotFoundError) as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise RecipeError(f"the hub refused {repo} ({_line(error)}); check the name, or set HF_TOKEN") from None
        reason = _line(error)
    # No narrower class: transport errors are those of whichever HTTP library this huggingface_hub was built on.
    except Exception as error:
        reason = _line(error)
    raise RecipeError(
        f"could not reach the hub for {repo} ({reason}); check the network or HF_ENDPOINT and run it again (whole "
        "files are kept), or copy the shards here and set data.shards_dir, or use data.source docs or text, which "
        "need no network"
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
