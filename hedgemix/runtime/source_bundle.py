"""The library code that a program needs: its imports inside the package, read with ast, without what only people read.

Every import statement counts, also inside functions; those under `if TYPE_CHECKING:` never run and do not. A module
named only at run time (importlib) is not seen. Nothing is imported or executed. What comes out does not depend on the
version of Python, as `ast.unparse` would.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from hedgemix.config import RecipeError

INDENT = 4
"""Spaces of one level in the sources."""


@cache
def sources(entry: str) -> Mapping[str, str]:
    """Collect by their names, sorted, the modules of entry's own top-level package that entry can import, and the
    packages they are in: each source as `squeezed` leaves it.

    Raises RecipeError where a module of the package is missing or does not parse.
    """
    package = entry.partition(".")[0]
    root = _root(package)
    squeezed_by_name: dict[str, str] = {}
    open_ends = [entry]
    while open_ends:
        name = open_ends.pop()
        if name in squeezed_by_name:
            continue
        path = _file(root, name)
        if path is None:
            raise RecipeError(f"{name} is imported but is no module under {root}; correct the import or add it")
        here = name if path.name == "__init__.py" else name.rpartition(".")[0]
        text = path.read_text(encoding="utf-8")
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise RecipeError(f"{path} cannot be bundled: {error}") from None
        squeezed_by_name[name] = squeezed(text, tree)
        for module, attribute in [(name, ""), *_imports(tree, here)]:
            if module.partition(".")[0] != package:
                continue
            parts = module.split(".")
            open_ends += [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
            if attribute and _file(root, f"{module}.{attribute}"):
                open_ends.append(f"{module}.{attribute}")
    return {name: squeezed_by_name[name] for name in sorted(squeezed_by_name)}


def imports(source: str) -> set[str]:
    """Find the dotted names of the modules that a source imports, at its top or deeper."""
    return {module for module, _ in _imports(ast.parse(source), "")}


def digest(entry: str) -> str:
    """Hash `sources`, SHA-256 in hex: equal for two versions that do the same, however they are documented."""
    return hashlib.sha256(json.dumps(sources(entry)).encode()).hexdigest()


def squeezed(text: str, tree: ast.Module) -> str:
    """Strip a source of docstrings and other statements that are only a string, comments and blank lines, indented by
    one space. tree: of the text. What is left says the same, in the same order, and can be read."""
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    dropped, inside = set[int](), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            inside.update(range(node.lineno, node.end_lineno or 0))  # all but its first line, counted from 0
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if not isinstance(statements, list):  # of a lambda, or of a conditional expression
                continue
            strings = [each for each in statements if _is_string(each)]
            for each in strings:
                dropped.update(range(each.lineno - 1, each.end_lineno or 0))
            if strings and len(strings) == len(statements):
                dropped.remove(strings[0].lineno - 1)
                lines[strings[0].lineno - 1] = " " * strings[0].col_offset + "pass"
    remaining = []
    for number, line in enumerate(lines):
        if number in dropped or (number not in inside and not line.strip()):
            continue
        code = line if number in inside else line.lstrip()
        remaining.append(" " * ((len(line) - len(code)) // INDENT) + code + "\n")
    return "".join(remaining)


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # of a top-level name: runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(f"{package} is not an installed package; run from where it can be imported")
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
