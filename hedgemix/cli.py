"""The `hedgemix` command: fetch or prepare data before a run. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from hedgemix import dataset, fineweb
from hedgemix.config import DataConfig, RecipeError


@dataclass(frozen=True)
class Download:
    """Fetch the official FineWeb shards and their tokenizer."""

    folder: Path
    """Where to; files that are there and whole are kept."""
    train_shards: int = 10
    """Training shards of 100 M tokens (200 MB) each."""
    variant: str = "sp1024"
    """The tokenizer the shards were made with: sp and its vocabulary size."""
    repo: str = fineweb.REPOSITORY
    """Dataset repository on the hub."""


@dataclass(frozen=True)
class Prepare:
    """Tokenize text, or check shards, and write down what they are (dataset.json)."""

    folder: Path
    """Where dataset.json goes, and for docs and text the tokenizer and the shards."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)


def main() -> None:
    """Entry point; exits with 2 after a RecipeError."""
    command = tyro.cli(Download | Prepare, prog="hedgemix", description=__doc__)  # type: ignore[call-overload]
    try:
        if isinstance(command, Download):
            _download(command)
        else:
            _prepare(command)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _download(command: Download) -> None:
    fineweb.download(command.folder, command.train_shards, command.variant, command.repo)
    size = command.variant.removeprefix("sp")
    print(f"use it with: --data.source shards --data.shards-dir {command.folder} --data.vocab-size {size}")


def _prepare(command: Prepare) -> None:
    made = dataset.prepare(command.data, command.folder)
    dataset.save(made, command.folder)
    table = Table("", "training", "validation", title=f"{made.source} in {command.folder}", title_justify="left")
    train_documents = f"{made.train_documents:,}" if made.train_documents else "not counted"
    table.add_row("documents", train_documents, f"{made.valid_documents:,}")
    table.add_row("tokens", f"{made.train_tokens:,}", f"{made.valid_tokens:,}")
    table.add_row("bytes of text", "", f"{made.valid_bytes:,}")
    table.add_row("bytes per token", "", f"{made.valid_bytes / max(1, made.valid_tokens - 1):.4f}")
    table.add_row("sha256 of tokens", made.train_sha256[:16], made.valid_sha256[:16])
    if made.text_sha256:
        table.add_row("sha256 of text", made.text_sha256[:16], "")
    table.add_row("sha256 of tokenizer", made.tokenizer_sha256[:16], "")
    Console().print(table)


if __name__ == "__main__":
    main()
