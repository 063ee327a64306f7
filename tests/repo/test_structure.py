"""The house rules that a reader may rely on, checked on the tree as it is."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = sorted((ROOT / "hedgemix").rglob("*.py"))
PIPELINE = sorted((ROOT / "pipeline").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
STAGES = ("train", "quantize", "evaluate")


def imported(source: str, package: str) -> set[str]:
    """Every dotted name that the source imports, at its top or deeper; `package` resolves relative imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            names.update(a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return names


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def under(names: set[str], *roots: str) -> set[str]:
    return {name for name in names for root in roots if name == root or name.startswith(root + ".")}


def hidden(names: set[str]) -> set[str]:
    """Those of the names that the standard library or an installed package has too: a script in their folder, or a test
    beside them, would import ours in place of theirs."""
    installed = {name for name, of in packages_distributions().items() if set(of) != {"hedgemix"}}
    return names & (sys.stdlib_module_names | installed)


PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve")
RUN_CODE = ("eval", "exec", "compile", "os.system", "os.popen", "torch.jit.load", "torch.hub.load", "torch.package")
UNSAFE_CALLS = (*RUN_CODE, "yaml.load", "yaml.full_load", "yaml.unsafe_load", "pd.read_pickle", "pandas.read_pickle")


COMPARES_BYTECODE = "hedgemix/audit/own_code.py"
"""Unmarshals what Python would load by itself, to compare it with the source compiled, and runs neither."""


def unsafe_loads(source: str) -> Iterator[int]:
    """Lines that could run code from a file: pickle in any dress, torch.load unless it says weights_only=True, and what
    runs text or a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = {alias.name for alias in node.names} | {module}
            loads = module in ("torch", "numpy", "yaml") and "load" in names
            if under(names, *PICKLES) or loads or (module == "os" and "system" in names):
                yield node.lineno
        elif isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            must_say = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
            name, value = must_say.get(called(node).replace("numpy.", "np."), ("", None))
            risks = (
                name and not constant(keywords.get(name), value),
                under({called(node)}, *UNSAFE_CALLS),
                "allow_pickle" in keywords and not constant(keywords["allow_pickle"], False),
                "shell" in keywords and not constant(keywords["shell"], False),
            )
            if any(risks):
                yield node.lineno


def constant(node: ast.expr | None, value: bool | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts[:-1])


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_knows_neither_ray_nor_the_pipeline(path: Path) -> None:
    assert not under(imported(path.read_text(), package_of(path)), "ray", "pipeline", "tests")


@pytest.mark.parametrize("stage", STAGES)
def test_stages_meet_in_files_and_not_in_imports(stage: str) -> None:
    others = [f"hedgemix.{other}" for other in STAGES if other != stage]
    others = [other for other in others if (stage, other) != ("train", "hedgemix.quantize")]  # for calibration
    for path in LIBRARY:
        if path.relative_to(ROOT / "hedgemix").with_suffix("").parts[0] == stage:
            assert not under(imported(path.read_text(), package_of(path)), *others)


@pytest.mark.parametrize("path", LIBRARY + PIPELINE + TESTS, ids=name_of)
def test_files_stay_short_and_have_a_name(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("utils", "util", "helpers", "misc")


@pytest.mark.parametrize("root", ["hedgemix", "pipeline", "benchmarks", "tests", "examples"])
def test_no_module_hides_a_library(root: str) -> None:
    modules = {path.stem for path in (ROOT / root).rglob("*.py")} - {
        "__init__",
        "__main__",
        "sitecustomize",
        "conftest",
    }
    folders = {path.name for path in (ROOT / root).rglob("*") if path.is_dir()} - {"__pycache__"}
    assert modules and not hidden(modules | folders)


def test_the_check_of_names_sees_both_kinds() -> None:
    assert hidden({"statistics", "torch", "pipeline_", "trace"}) == {"statistics", "torch", "trace"}


@pytest.mark.parametrize("path", LIBRARY + PIPELINE, ids=name_of)
def test_reading_a_file_never_runs_code(path: Path) -> None:
    source = path.read_text()
    if name_of(path) == COMPARES_BYTECODE:
        source = source.replace("marshal", "compared").replace("== compile(", "== compiled(")
    assert not list(unsafe_loads(source))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import ray", {"ray"}),
        ("def f():\n    from ray.train import report", {"ray.train", "ray.train.report"}),
        ("from . import train", {"hedgemix", "hedgemix.train"}),
        ("from .train import f", {"hedgemix.train", "hedgemix.train.f"}),
        ("import importlib\nimportlib.import_module('ray')", {"importlib", "ray"}),
    ],
)
def test_the_import_check_sees_each_form(source: str, names: set[str]) -> None:
    assert imported(source, "hedgemix") == names


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import pickle", [1]),
        ("from pickle import loads", [1]),
        ("from torch import load", [1]),
        ("torch.load(f)", [1]),
        ("torch.load(f, weights_only=False)", [1]),
        ("torch.load(f, weights_only=True)", []),
        ("from numpy import load", [1]),
        ("np.load(f)", [1]),
        ("np.load(f, allow_pickle=True)", [1]),
        ("np.load(f, allow_pickle=False)", []),
        ("np.lib.format.read_array(f, allow_pickle=how)", [1]),
        ("import marshal", [1]),
        ("pd.read_pickle(f)", [1]),
        ("yaml.load(f)", [1]),
        ("yaml.safe_load(f)", []),
        ("eval(text)", [1]),
        ("model.eval()", []),
        ("exec(text)", [1]),
        ("re.compile(text)", []),
        ("torch.jit.load(f)", [1]),
        ("os.system(text)", [1]),
        ("subprocess.run(text, shell=True)", [1]),
    ],
)
def test_the_load_check_sees_each_form(source: str, lines: list[int]) -> None:
    assert list(unsafe_loads(source)) == lines
