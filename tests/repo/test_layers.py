"""The folders and their order, read from the source: what may import what, and what stands where."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

from hedgemix.audit import sandbox
from hedgemix.runtime import source_bundle
from tests.repo.test_structure import LIBRARY, PIPELINE, ROOT, imported, name_of, package_of, under

LAYERS = {
    "hedgemix": [
        "cli",
        "options",
        "audit",
        "standalone",
        "codec",
        "stages",
        "evaluate",
        "train",
        "recipes",
        "mixers",
        "quantize",
        "experts",
        "artifact",
        "data",
        "model",
        "validate",
        "runtime",
        "entropy",
        "config",
        "model_config",
        "train_config",
    ],
    "pipeline": [
        "record",
        "entry",
        "cli",
        "plan",
        "study",
        "execution",
        "report",
        "tracking",
        "submission",
        "monitor",
        "analysis",
        "forecast",
        "results",
        "steps",
        "storage",
    ],
}
"""Top down: a file imports from lower ones, or from its own folder."""
OUTSIDE = {
    "hedgemix": {"cli", "config", "model_config", "options", "recipes", "stages", "train_config", "validate"},
    "pipeline": {"cli", "entry", "plan", "record"},
}
"""The modules that stand in no folder."""
MAY_IMPORT_RAY = ("record", "execution", "monitor.board", "monitor.ray_metrics", "results.provenance")
MAKERS = {
    "hedgemix.train",
    "hedgemix.quantize",
    "hedgemix.data.corpus",
    "hedgemix.data.dataset",
    "hedgemix.data.dataloader",
    "hedgemix.data.docstrings",
    "hedgemix.data.fineweb",
    "hedgemix.recipes",
}
"""What makes artifacts; neither an evaluation nor the audit's closed process has it."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in LIBRARY + PIPELINE
    if path.name != "__init__.py"
}
ALL = pytest.mark.parametrize("module", MODULES)


def room(module: str) -> str:
    """The folder of a module, or a module outside of folders: its layer."""
    return module.split(".")[1]


def ours(module: str) -> set[str]:
    """The modules of its own package that a module imports."""
    path = MODULES[module]
    names = imported(path.read_text(), package_of(path))
    return {name for name in names if name in MODULES and name.split(".")[0] == module.split(".")[0]}


def against(module: str, imports: set[str], layers: list[str]) -> set[str]:
    """Those imports that go up, or sideways."""
    own = layers.index(room(module))
    return {name for name in imports if room(name) != room(module) and layers.index(room(name)) <= own}


@ALL
def test_imports_point_down(module: str) -> None:
    assert not against(module, ours(module), LAYERS[module.split(".")[0]])


@pytest.mark.parametrize("package", LAYERS)
def test_no_circle_between_folders(package: str) -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        if module.startswith(package + "."):
            graph.setdefault(room(module), set()).update({room(name) for name in ours(module)} - {room(module)})
    list(TopologicalSorter(graph).static_order())


def test_the_checks_see_a_step_up_and_a_circle() -> None:
    layers = ["top", "middle", "bottom"]
    assert against("p.middle.x", {"p.top.y", "p.middle.z", "p.bottom.w"}, layers) == {"p.top.y"}
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_a_folder_but_those_named(package: str) -> None:
    outside = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert outside <= OUTSIDE[package] and outside | folders <= set(LAYERS[package])
    assert not list((ROOT / package).glob("*/*/*.py"))  # one level deep


@pytest.mark.parametrize("path", [path for path in LIBRARY + PIPELINE if path.name == "__init__.py"], ids=name_of)
def test_a_package_is_one_line_of_documentation(path: Path) -> None:
    """So that importing a module imports no other; the library's own also has its version."""
    documentation, *more = ast.parse(path.read_text()).body
    assert isinstance(documentation, ast.Expr) and ast.get_docstring(ast.parse(path.read_text()))
    assert len(path.read_text().splitlines()) == 1 or path.parent.parent == ROOT
    assert all(isinstance(node, ast.Assign) for node in more) and (not more or path.parent == ROOT / "hedgemix")


@ALL
def test_ray_is_imported_where_it_is_talked_to(module: str) -> None:
    package, _, rest = module.partition(".")
    allowed = package == "pipeline" and under({rest}, *MAY_IMPORT_RAY)
    assert allowed or not under(imported(MODULES[module].read_text(), package_of(MODULES[module])), "ray")


def test_a_stage_imports_of_the_others_only_calibration() -> None:
    """Training ends with the calibration, so its modules are quantization's; nothing else is shared."""
    for module in MODULES:
        if module.startswith("hedgemix.train."):
            assert under(ours(module), "hedgemix.quantize", "hedgemix.evaluate") <= {"hedgemix.quantize.calibration"}
        elif module.startswith("hedgemix.quantize."):
            assert not under(ours(module), "hedgemix.train", "hedgemix.evaluate")


@pytest.mark.parametrize("entry", ["hedgemix.evaluate.evaluator", "hedgemix.codec.text_codec", "hedgemix.audit.replay"])
def test_what_scores_reaches_nothing_that_trains_or_quantizes(entry: str) -> None:
    """At any depth: what its imports import too."""
    assert not under(set(source_bundle.sources(entry)), *MAKERS)


def test_the_sandbox_refuses_all_that_makes_artifacts() -> None:
    assert set(sandbox.FORBIDDEN) == MAKERS | {"pipeline", "ray"}
    assert all(find_spec(name) for name in MAKERS)
