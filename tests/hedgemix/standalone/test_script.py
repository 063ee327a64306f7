"""train_gpt.py needs nothing of this checkout, and gives the pipeline's numbers."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hedgemix import recipes
from hedgemix.config import Recipe
from hedgemix.runtime import source_bundle
from hedgemix.runtime.files import read_json
from hedgemix.standalone import main as standalone
from hedgemix.standalone import script
from hedgemix.standalone.importer import Bundle
from support import tiny_seed

ROOT = Path(__file__).resolve().parent.parent.parent.parent
ELSEWHERE = """
import importlib.util, runpy, sys

root, *sys.argv = sys.argv[1:]
unwanted = {"pipeline", "ray", "pyarrow", "pandas", "rich", "tyro", "huggingface_hub", "constriction"}
sys.path[:] = [place for place in sys.path if place.rstrip("/") != root]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(getattr(finder, "__module__", ""))]
assert importlib.util.find_spec("hedgemix") is None, "the library can still be found"


def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith((root + "/hedgemix", root + "/pipeline")):
        raise PermissionError(f"opens {arguments[0]}")


sys.addaudithook(refuse)
sys.modules.update(dict.fromkeys(unwanted))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def recipe(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_seed.recipe(text, tmp_path_factory.mktemp("shards"))


def start(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The file in a process that has neither this checkout, nor an installed library, nor what training can do
    without."""
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(ROOT), str(file), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True)


def test_alone_it_gives_the_pipeline_s_numbers(recipe: Recipe, tmp_path: Path) -> None:
    expected = tiny_seed.score(recipe, tmp_path / "here", 1)
    file = tmp_path / "there" / script.NAME
    file.parent.mkdir()
    file.write_bytes(script.build(recipe))
    ran = start(file, "--seed", "1")
    assert ran.returncode == 0, ran.stderr
    found = read_json(file.parent / "seed1" / "result.json")
    assert tiny_seed.same(found, expected)
    assert found["code_bytes"] == file.stat().st_size == script.n_bytes(recipe)
    last = ran.stdout.splitlines()[-1]
    assert last == f"seed:1 val_loss:{expected['nats_per_token']!r} val_bpb:{expected['bpb_final']!r}"
    assert any(line.startswith("train:  step 12 ") for line in ran.stdout.splitlines())


def test_the_same_sources_and_recipe_give_the_same_bytes(recipe: Recipe) -> None:
    made = script.build(recipe)
    script._build.cache_clear()
    assert script.build(recipe) == made
    assert script.build(replace(recipe, recipe="other")) != made
    assert made.decode().count("\n") < 100 and made.startswith(b'"""One seed of recipe laptop')


def test_it_shows_its_sources(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / script.NAME
    file.write_bytes(script.build(recipe))
    _, _, data = file.read_text().partition('\nDATA = "')
    held = Bundle(str(file), data.partition('"')[0])
    try:
        assert held.sources == script._sources(recipe.data.source) and Recipe is not None
        package = held.find_spec("hedgemix")
        assert package is not None and package.submodule_search_locations == []
        assert held.find_spec("hedgemix.nowhere") is None and held.find_spec("json") is None
        assert held.get_code("hedgemix.train.trainer").co_filename == f"{file}/hedgemix/train/trainer.py"
        with pytest.raises(ImportError, match="holds no hedgemix.nowhere"):
            held.get_source("hedgemix.nowhere")
    finally:
        sys.meta_path.remove(held)
    assert standalone.main(held.recipe, held.sources, 1, ["--unpack", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "hedgemix" / "__init__.py").read_text() == held.sources["hedgemix"]
    assert (tmp_path / "out" / "hedgemix" / "train" / "trainer.py").read_text() == held.sources[
        "hedgemix.train.trainer"
    ]
    assert read_json(tmp_path / "out" / "recipe.json")["recipe"] == "laptop"
    capsys.readouterr()
    for wrong in (["--unpack", str(tmp_path)], ["--unpack", str(file)], ["--seed", "-1"], ["--seed", str(2**63)]):
        assert standalone.main(held.recipe, held.sources, 1, wrong) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and wrong[1] in told and len(told.splitlines()) == 1


def test_a_traceback_shows_the_line_and_a_spawned_process_has_the_modules(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / script.NAME
    file.write_bytes(script.build(recipe))
    tail = """\
    import inspect, multiprocessing
    from hedgemix.train import schedule
    print(inspect.getsource(schedule.rate_factor).splitlines()[0])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(schedule.rate_factor, (0.5, 1.0)))
    schedule.rate_factor("no", 1)
"""
    head, _, _ = file.read_text().partition("    sys.exit(")
    file.write_text(head + tail)
    ran = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True)
    lines = source_bundle.sources(script.ENTRY)["hedgemix.train.schedule"].splitlines()
    first = next(line for line in lines if line.startswith("def rate_factor"))
    assert ran.stdout.splitlines() == [first, "0.5"]
    assert f'{file}/hedgemix/train/schedule.py", line' in ran.stderr and "(1.0 - fraction)" in ran.stderr


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_has_a_file_of_a_size_that_matters_little(name: str) -> None:
    recipe = recipes.RECIPES[name]()
    assert 50_000 < script.n_bytes(recipe) < 112_000
    processes = max(recipe.compute.workers, recipe.compute.evaluate_workers)
    assert f"--nproc_per_node={processes} ".encode() in script.build(recipe)


def test_it_names_the_packages_it_needs(recipe: Recipe) -> None:
    sources = source_bundle.sources(script.ENTRY)
    found = {name.partition(".")[0] for source in sources.values() for name in source_bundle.imports(source)}
    assert found - {"hedgemix", *sys.stdlib_module_names} == {*script.PACKAGES, "pyarrow", "pyppmd"}

    def needs(**fields: Any) -> set[str]:
        lines = script.requirements(replace(recipe, data=replace(recipe.data, **{"memory_bytes": 0, **fields})))
        assert lines == sorted(lines) and all("==" in line and "+" not in line for line in lines)
        return {line.partition("==")[0] for line in lines}

    assert needs(source="shards") == set(script.PACKAGES)
    assert needs(source="shards", memory_bytes=1) == {*script.PACKAGES, "pyppmd"}
    assert needs(source="text") == {*script.PACKAGES, "pyarrow"}
    assert needs(source="docs", packages=("torch", "pandas")) == {*script.PACKAGES, "pandas"}


@pytest.mark.parametrize("source", ["docs", "text", "shards"])
def test_what_a_recipe_s_source_does_not_need_is_left_out_and_not_missed(source: str) -> None:
    """Whatever stays imports none of it at its top; where a function does, that is for another source."""
    everything, kept = source_bundle.sources(script.ENTRY), script._sources(source)
    absent = {name.rpartition(".")[2] for name in everything.keys() - kept.keys()}
    assert absent and {f"hedgemix.data.{name}" for name in script.READERS[source]} <= kept.keys()
    for name, text in kept.items():
        imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not absent & {part for node in imports for part in re.findall(r"\w+", ast.unparse(node))}, name
