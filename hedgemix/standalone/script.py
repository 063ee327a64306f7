"""train_gpt.py: one file that trains, quantizes and scores a seed of a recipe, made of the library's own source.

It begins with what a person reads and the importer of `importer.py`; then come, compressed, every module that
`hedgemix.standalone.main` can import (`source_bundle.sources`) and the recipe. Seeds are an option of it, so the file
is the recipe's, and its size is the code that a score's bytes count. The same sources and recipe give the same bytes.
"""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from hedgemix import __version__
from hedgemix.config import Recipe, to_dict
from hedgemix.runtime import source_bundle

NAME = "train_gpt.py"
ENTRY = "hedgemix.standalone.main"
PACKAGES = ("numpy", "sentencepiece", "torch", "zstandard")
"""All that the sources import beside Python's own; pyarrow too, for text files, and pyppmd for a memory."""
READERS = {
    "docs": ("docstrings", "text_set"),
    "text": ("text_files", "archive", "text_set"),
    "shards": ("shard_set", "probes"),
}
"""Modules of hedgemix.data that only these sources need: a recipe's file has its own source's."""
NOT_NEEDED = ("max_restarts", "checkpoint_seconds")
"""Of a recipe's compute: they move no number, so their defaults do in the file, which stays the same when a record is
gone on with under others."""
HEADER = '''"""One seed of recipe {name}: trained, quantized and scored by this file alone. Made by hedgemix {version}.

    torchrun --standalone --nproc_per_node={processes} {file} --seed 1337                     a run of its own
    torchrun --standalone --nproc_per_node={processes} {file} --replay train_seed1337.log     the steps of a log again

It needs the packages of requirements.txt; --help tells its options. The score is a code length: each token is charged
before anything learns from it, under a distribution that sums to one, made of the artifact and earlier tokens only.

DATA holds the library without its documentation: `python {file} --unpack DIR` writes it as files. It is written and
tested as the package hedgemix, whose `hedgemix submit` makes this file again.
SPDX-License-Identifier: Apache-2.0
"""
'''
FOOTER = """

BUNDLE = Bundle(__file__, DATA)

if __name__ == "__main__":
    import traceback

    from hedgemix.standalone import main

    sys.excepthook = traceback.print_exception  # Python's own asks no importer for the lines, before 3.13
    sys.exit(main.main(BUNDLE.recipe, BUNDLE.sources, BUNDLE.n_bytes, sys.argv[1:]))
"""
FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]
"""pb 0 is for text."""


def build(recipe: Recipe) -> bytes:
    """Build the file of a recipe."""
    values = to_dict(recipe)
    values["compute"] = {name: value for name, value in values["compute"].items() if name not in NOT_NEEDED}
    return _build(json.dumps(values, separators=(",", ":")))


def n_bytes(recipe: Recipe) -> int:
    """Count the bytes of the recipe's file."""
    return len(build(recipe))


def sha256() -> str:
    """Hash the library code in every file that is built now, SHA-256 in hex; the recipe is not part of it."""
    return source_bundle.digest(ENTRY)


def requirements(recipe: Recipe) -> list[str]:
    """List what the recipe's file needs beside Python, pinned to what is installed here: `name==version`, sorted."""
    names = {*PACKAGES, "pyarrow"} if recipe.data.source == "text" else set(PACKAGES)
    if recipe.data.memory_bytes:
        names.add("pyppmd")
    if recipe.data.source == "docs":
        names.update(name for package in recipe.data.packages for name in distributions().get(package, []))
    # Without the local part: the index has no 2.13.0+cpu, and a machine's own build is taken for 2.13.0.
    return sorted(f"{name}=={metadata.version(name).partition('+')[0]}" for name in names)


@cache
def distributions() -> Mapping[str, list[str]]:
    """Find what is installed, by the packages that it imports as."""
    return metadata.packages_distributions()


@cache
def _build(recipe: str) -> bytes:
    values = json.loads(recipe)
    held = json.dumps({"recipe": values, "sources": _sources(values["data"]["source"])}, separators=(",", ":"))
    data = base64.b85encode(lzma.compress(held.encode(), lzma.FORMAT_ALONE, filters=FILTERS)).decode()
    processes = max(values["compute"]["workers"], values["compute"]["evaluate_workers"])
    header = HEADER.format(name=values["recipe"], version=__version__, processes=processes, file=NAME)
    _, _, importer = Path(__file__).with_name("importer.py").read_text(encoding="utf-8").partition('"""\n')
    return f'{header}{importer}\n\nDATA = "{data}"{FOOTER}'.encode()


def _sources(read: str) -> dict[str, str]:
    needed = set(READERS[read])
    others = {f"hedgemix.data.{name}" for names in READERS.values() for name in names if name not in needed}
    return {name: text for name, text in source_bundle.sources(ENTRY).items() if name not in others}
