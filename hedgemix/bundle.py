"""How many bytes of library code a program needs: its imports inside the package, read with ast, compressed as one.

Every import statement counts, also inside functions; those under `if TYPE_CHECKING:` never run and do not. A module
named only at run time (importlib) is not seen. Nothing is imported or executed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import zstandard

from hedgemix.artifact import ArtifactError
from hedgemix.config import EvaluateConfig, Recipe, to_dict

PAGE_BYTES = 4096


@dataclass(frozen=True)
class CodeBundle:
    data: bytes
    """Compressed (lzma or zstd, the shorter): for each module `name NUL source NUL`, UTF-8."""
    modules: tuple[str, ...]
    """Sorted."""

    @property
    def n_bytes(self) -> int:
        return len(self.data)


def code_bytes(entry: str = "hedgemix.evaluate") -> CodeBundle:
    """The modules of entry's own top-level package that entry can import, with the packages they are in, as one.

    Raises ArtifactError where a module of the package is missing or does not parse.
    """
    package = entry.partition(".")[0]
    root = _root(package)
    sources: dict[str, str] = {}
    open_ends = [entry]
    while open_ends:
        name = open_ends.pop()
        if name in sources:
            continue
        path = _file(root, name)
        if path is None:
            raise ArtifactError(f"{name} is imported but is no module under {root}; correct the import or add it")
        sources[name] = path.read_text(encoding="utf-8")
        here = name if path.name == "__init__.py" else name.rpartition(".")[0]
        try:
            wanted = list(_imports(ast.parse(sources[name]), here))
        except SyntaxError as error:
            raise ArtifactError(f"{path} cannot be bundled: {error}") from None
        for module, attribute in [(name, ""), *wanted]:
            if module.partition(".")[0] != package:
                continue
            parts = module.split(".")
            open_ends += [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
            if attribute and _file(root, f"{module}.{attribute}"):
                open_ends.append(f"{module}.{attribute}")
    modules = tuple(sorted(sources))
    plain = "".join(f"{name}\0{sources[name]}\0" for name in modules).encode()
    packed = lzma.compress(plain, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return CodeBundle(min(packed, zstandard.ZstdCompressor(level=22).compress(plain), key=len), modules)


def decoder_bytes(config: EvaluateConfig) -> int:
    """What a decoder needs beside the artifact: the code that evaluation imports, and its settings."""
    settings = json.dumps(to_dict(config), separators=(",", ":")).encode()
    return _library_bytes() + len(lzma.compress(settings, format=lzma.FORMAT_ALONE))


@cache
def _library_bytes() -> int:
    return code_bytes().n_bytes


def artifact_room(recipe: Recipe) -> int:
    """Most bytes of the artifact: `quantize.target_bytes`, or what the limit leaves beside the decoder.

    The decoder counts in whole pages, so that a few bytes more of code or settings do not ask for another artifact.
    """
    pages = -(-decoder_bytes(recipe.evaluate) // PAGE_BYTES)
    return recipe.quantize.target_bytes or recipe.limits.total_bytes - pages * PAGE_BYTES


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # of a top-level name: runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError(f"{package} is not an installed package; run from where it can be imported")
    return Path(next(iter(spec.submodule_search_locations)))


def _file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split(".")[1:])
    candidates = path / "__init__.py", path.with_name(f"{path.name}.py")
    return next((file for file in candidates if file.is_file()), None)


def _imports(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(module, attribute or "") of each import statement below node, relative ones resolved in `package`."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        yield from ((module, alias.name) for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for other in node.orelse:
            yield from _imports(other, package)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package)
