"""What an audit was made with: digests of every installed package that takes part, for its report to name.

Of hedgemix every source file is read. Of another package its version and the list that its installer left (RECORD, with
a hash a hash of each file as it was installed) are; what a process has really loaded is held against these lists by
`unaccounted`.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import json
import marshal
import os
import platform
import struct
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("constriction", "numpy", "pyarrow", "pyppmd", "rich", "sentencepiece", "torch", "tyro", "zstandard")
"""All that hedgemix imports in an audit beside Python's own."""
LIBRARIES = sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("LIBDIR") or "/lib"
"""Folders of Python itself."""
NO_HASH = "-"
"""Of a file that a RECORD names without one."""
REMEDY = (
    "that does not say that they cheat; packages have to be installed by pip or another installer that leaves a "
    "RECORD, and not changed since, for anybody to know what they are"
)


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


def unaccounted(files: Iterable[str]) -> list[str]:
    """List the files, of code or read beside it, that nothing accounts for: that are no source of hedgemix, not of
    Python's own library or the system's, and not as an installed package's RECORD says they were installed; and the
    bytecode beside a source that Python takes for it though it is another program's."""
    own = str(Path(__file__).resolve().parent.parent) + os.sep
    system = tuple(os.path.realpath(folder) + os.sep for folder in (*LIBRARIES, "/usr/lib", "/lib", "/lib64"))
    found = []
    for file in sorted(set(map(os.path.realpath, files))):
        installed_there = {"site-packages", "dist-packages"} & set(Path(file).parts)
        if file.startswith(system) and not installed_there:
            continue
        if not (file.startswith(own) and file.endswith(".py")) and not noted(file):
            if not installed_there or file not in recorded():
                found.append(f"{file} (no RECORD names it)")
            elif recorded()[file] not in (digest(file), NO_HASH):
                found.append(f"{file} (its RECORD has another hash)")
        if file.endswith(".py") and (bytecode := other_bytecode(file, digest(file))):
            found.append(f"{bytecode} (not the bytecode of its source)")
    return found


def noted(file: str) -> bool:
    """Tell whether a file lies in the notes that building leaves beside sources, and is one that an installer noted
    too: entry points, say, which torch reads of every package."""
    return Path(file).parent.suffix == ".egg-info" and digest(file) in recorded().values()


@cache
def other_bytecode(source: str, content: str) -> str:
    """Find the bytecode beside a source, whose digest is `content`, that Python would run in its place and that is not
    what compiling it gives; empty where there is none."""
    file = importlib.util.cache_from_source(source)
    if not os.path.exists(file):
        return ""
    data, text = Path(file).read_bytes(), Path(source).read_bytes()
    kind, *told = struct.unpack("<III", data[4:16].ljust(12, b"\0"))
    now = os.stat(source)
    stamp = [int(now.st_mtime) & 0xFFFFFFFF, now.st_size & 0xFFFFFFFF]
    hashed = list(struct.unpack("<II", importlib.util.source_hash(text)))
    if data[:4] != importlib.util.MAGIC_NUMBER or told != {0: stamp, 3: hashed}.get(kind, told):
        return ""  # Python passes it over
    try:
        return "" if marshal.loads(data[16:]) == compile(text, source, "exec", dont_inherit=True) else file
    except (EOFError, ValueError, TypeError, SyntaxError):
        return file


def digest(file: str) -> str:
    """Compute a file's SHA-256 as a RECORD writes it; empty for one that cannot be read."""
    try:
        content = Path(file).read_bytes()
    except OSError:
        return ""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@cache
def recorded() -> dict[str, str]:
    """Read the hash of every file that an installed package's RECORD names, by real path; NO_HASH for those that an
    installer writes itself, beside the package's own."""
    hashes = {}
    for distribution in metadata.distributions():
        root = os.path.realpath(str(distribution.locate_file("")))
        for name, value, *_ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
            file = os.path.normpath(os.path.join(root, name))
            if value.startswith("sha256="):
                hashes[file] = value.removeprefix("sha256=")
            elif Path(file).parent.suffix == ".dist-info":
                hashes[file] = NO_HASH
    return hashes
