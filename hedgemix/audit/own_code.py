"""What an audit was made with: digests of every installed package that takes part, for its report to name.

Of hedgemix every source file is read. Of another package its version and the list that its installer left (RECORD, with
a hash of each file as it was installed) are: a file that was changed after that is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("constriction", "numpy", "pyarrow", "pyppmd", "rich", "sentencepiece", "torch", "tyro", "zstandard")
"""All that hedgemix imports in an audit beside Python's own."""


@cache
def digests() -> dict[str, str]:
    """Name, by package, what is installed here: `python`, `hedgemix` (SHA-256 of its sources, in hex), and of each
    other package its version and its RECORD's SHA-256; `all` is the SHA-256 of all these together."""
    root = Path(__file__).resolve().parent.parent
    sources = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        sources.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    found = {"python": platform.python_version(), "hedgemix": sources.hexdigest()}
    found |= {name: installed(name) for name in PACKAGES}
    return found | {"all": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}


def installed(package: str) -> str:
    """Write a package's version and the SHA-256 of its RECORD; says so where it is not installed."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return "not installed"
    record = distribution.read_text("RECORD") or ""
    return f"{distribution.version} {hashlib.sha256(record.encode()).hexdigest()}"
