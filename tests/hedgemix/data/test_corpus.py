from __future__ import annotations

import ast
import hashlib
import inspect
import json
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import DataConfig, RecipeError
from hedgemix.data import corpus, docstrings

LONG = "word " * 50
SOURCE = f'''"""Module. {LONG}"""
class A:
    """Class. {LONG}

        indented
    """
    def method(self):
        "short"
        def inner():
            """Inner. {LONG}"""
    try:
        async def late(self):
            """Late. {LONG}"""
    except ImportError:
        def late(self):
            """Handler. {LONG}"""
    else:
        pass
if True:
    pass
elif False:
    def branch():
        """Branch. {LONG}"""
def surrogate():
    """\\ud800 {LONG}"""
value = lambda: """Not a docstring. {LONG}"""
'''


def obvious_docstrings(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                found.add(inspect.cleandoc(first.value.value))
    return {text for text in found if len(text) >= 200 and "\ud800" not in text}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "made_up_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "inner" / "code.py").write_text(SOURCE)
    (folder / "inner" / "broken.py").write_text(f'"""Broken {LONG}"""\ndef (')
    (folder / "a.py").write_text(f'"""First in path order. {LONG}"""')
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder.name


def test_docstrings_are_those_of_a_plain_walk_without_importing(package: str) -> None:
    found = list(docstrings.of_packages([package]))
    assert found[0].startswith("First in path order")
    expected = obvious_docstrings(SOURCE)
    assert len(expected) == 6
    assert set(found[1:]) == expected


def test_several_processes_read_what_one_reads(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(docstrings.of_packages([package, "json", "email"]))
    monkeypatch.setattr(docstrings, "FILES_A_PROCESS", 5)
    monkeypatch.setattr(docstrings, "available_cpus", lambda: 3)
    with patch.object(docstrings, "of_file", side_effect=AssertionError("read here")):
        assert list(docstrings.of_packages([package, "json", "email"])) == alone and len(alone) > 20
        monkeypatch.setattr(docstrings, "START", "raise SystemExit(1)")
        with pytest.raises(ChildProcessError, match="the process that reads .*__init__.py died"):
            list(docstrings.of_packages([package, "json", "email"]))
    monkeypatch.setattr(docstrings, "__file__", "train_gpt.py/hedgemix/data/docstrings.py")
    assert list(docstrings.of_packages([package, "json", "email"])) == alone


@pytest.mark.parametrize(
    ("name", "reason"), [("no_such_package", "not installed"), ("os.path", "'os'"), ("sys", "leave")]
)
def test_packages_that_cannot_be_read(name: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"data.packages.*{reason}"):
        list(docstrings.of_packages([name]))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1), st.floats(0.01, 0.99))
def test_split_is_by_the_hash_of_the_content(documents: list[str], fraction: float) -> None:
    distinct = list(dict.fromkeys(documents))
    same = {t: " ".join(t.lower().split()).encode() for t in distinct}
    shares = {t: int(hashlib.sha256(same[t]).hexdigest(), 16) / 2**256 for t in distinct}
    expected = [t for t in distinct if shares[t] >= fraction], [t for t in distinct if shares[t] < fraction]
    if all(expected):
        assert tuple(map(list, corpus.split(corpus.distinct(documents), fraction))) == expected
    else:
        with pytest.raises(RecipeError, match="data.valid_fraction"):
            corpus.split(corpus.distinct(documents), fraction)


def test_case_and_white_space_do_not_part_documents() -> None:
    texts = [f"Document {n}\nof some" for n in range(50)]
    others = [text.replace("\n", " \n\t").upper() for text in texts]
    train, valid = map(list, corpus.split(texts + others, 0.5))
    assert len(train) > 10 and len(valid) > 10
    assert all((text in valid) == (other in valid) for text, other in zip(texts, others, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_fractions_that_cannot_be(fraction: float) -> None:
    with pytest.raises(RecipeError, match="data.valid_fraction"):
        corpus.split(["a", "b"], fraction)


def lines(tmp_path: Path, texts: list[str]) -> DataConfig:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataConfig(source="text", paths=(str(tmp_path / "a.jsonl"),))


def test_order_and_duplicates_of_the_source_do_not_matter(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(100)]
    found = list(corpus.collect(lines(tmp_path, texts)))
    assert sorted(found) == sorted(texts)
    assert found == list(corpus.collect(lines(tmp_path, texts[::-1] + texts)))
    assert found != sorted(found)


def test_a_limited_text_is_the_front_of_the_file(tmp_path: Path) -> None:
    config = lines(tmp_path, [f"document {n:03d}" for n in range(100)])
    limited = DataConfig(source="text", paths=config.paths, max_text_bytes=12 * 7 + 5)
    assert sorted(corpus.collect(limited)) == [f"document {n:03d}" for n in range(7)]
    with pytest.raises(RecipeError, match="raise data.max_text_bytes"):
        list(corpus.collect(DataConfig(source="text", paths=config.paths, max_text_bytes=5)))


def test_a_limited_docs_corpus_keeps_its_share_of_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = "".join(f'def f{n}():\n    """{n:06d} {LONG}"""\n' for n in range(4000))
    (tmp_path / "made_up_module.py").write_text(functions)
    monkeypatch.syspath_prepend(str(tmp_path))
    size = len(f"{0:06d} {LONG}")
    found = list(corpus.collect(DataConfig(packages=("made_up_module",), max_text_bytes=size * 1000)))
    assert len(found) == 1000
    _, valid = corpus.split(found, 0.2)
    assert 150 < len(valid) < 250
    assert sum(int(text[:6]) >= 2000 for text in found) > 400  # not the first ones of the file
