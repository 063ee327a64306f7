"""Every public definition says what it does: its docstring begins with a verb, the imperative for what is called, the
third person for most classes (a command's is its help text)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted([*(ROOT / "hedgemix").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")])
VERBATIM = {"hedgemix/standalone/importer.py"}
"""Files that are copied into train_gpt.py as they are: there a docstring's bytes count."""
NO_VERBS = {
    "a", "all", "an", "and", "any", "as", "at", "bits", "bytes", "by", "counts", "each", "empty", "every", "for",
    "from", "how", "if", "in", "it", "its", "mean", "nats", "new", "no", "none", "not", "numbers", "of", "one",
    "only", "our", "so", "some", "sums", "that", "the", "their", "these", "this", "those", "to", "two", "what",
    "when", "where", "whether", "which", "who", "why", "with", "without",
}  # fmt: skip
"""First words of a docstring that names a thing instead. A list of verbs would be longer, and never whole."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield the public functions, classes and methods with their dotted names, those under an `if` or a `try` too;
    what is defined inside a function is its own business."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{inside}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            handlers = [each for handler in getattr(node, "handlers", []) for each in handler.body]
            yield from definitions([*node.body, *node.orelse, *handlers, *getattr(node, "finalbody", [])], inside)


def failures(source: str) -> list[str]:
    """List the public definitions that lack a docstring, or whose docstring begins with no verb."""
    found = []
    for name, node in definitions(ast.parse(source).body):
        first = ((ast.get_docstring(node) or "").split() or [""])[0].rstrip(",.:;").lower()
        third_person = first.endswith("s") and not first.endswith("ss")
        if not first.isalpha() or first in NO_VERBS or (third_person and not isinstance(node, ast.ClassDef)):
            found.append(name)
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if str(path.relative_to(ROOT)) not in VERBATIM],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_public_definitions_say_what_they_do(path: Path) -> None:
    assert not failures(path.read_text())


def test_the_files_left_out_exist() -> None:
    assert all((ROOT / name).is_file() for name in VERBATIM)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f():\n    pass", ["f"]),
        ("def f():\n    'Read a file.'", []),
        ("def f():\n    'Reads a file.'", ["f"]),
        ("def f():\n    'The file.'", ["f"]),
        ("def f():\n    '`g` begun.'", ["f"]),
        ("def _f():\n    pass", []),
        ("async def f():\n    pass", ["f"]),
        ("class C:\n    'Holds a file.'", []),
        ("class C:\n    'Compare files.'", []),
        ("class C:\n    'Of a file.'", ["C"]),
        ("def f():\n    'Pass it on.'", []),
        ("class C:\n    'Holds.'\n    @property\n    def p(self):\n        return 1", ["C.p"]),
        ("class _C:\n    def p(self):\n        return 1", []),
        ("if x:\n    def f():\n        pass\nelse:\n    def g():\n        'Go.'", ["f"]),
        ("try:\n    pass\nexcept ImportError:\n    def f():\n        pass", ["f"]),
        ("def f():\n    'Do it.'\n    def inner():\n        pass", []),
    ],
)
def test_the_check_sees_each_case(source: str, names: list[str]) -> None:
    assert failures(source) == names
