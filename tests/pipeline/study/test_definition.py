"""A study's records and its file: names that last, variants that are added, others that stay."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hedgemix.config import RecipeError
from hedgemix.recipes import RECIPES
from hedgemix.runtime.layout import LOCK
from pipeline.analysis import study as reader
from pipeline.storage.lock import hold
from pipeline.storage.store import Storage
from pipeline.study import definition, fields
from pipeline.study.definition import LONGEST_RECORD, Study, of_variants, record_name
from pipeline.study.variants import Variant

BASE = RECIPES["laptop"]()


def variant(name: str, **values: Any) -> Variant:
    dotted = {field.replace("__", "."): value for field, value in values.items()}
    return Variant(name, dotted, fields.with_values(BASE, dotted))


FIRST = variant("xsa=false", model__xsa=False)
SECOND = variant("orders=1+2", evaluate__mixer__orders=(1, 2))


def write(storage: Storage, *variants: Variant, seeds: tuple[int, ...] = (1, 2)) -> Study:
    study = of_variants(storage, "s", BASE, variants)
    definition.write(storage, study, seeds)
    return study


def test_the_file_is_what_its_reader_reads(tmp_path: Path) -> None:
    storage = Storage("", tmp_path)
    write(storage, FIRST, SECOND)
    assert json.loads((tmp_path / "_studies/s/study.json").read_text()) == {
        "study": "s",
        "recipe": "laptop",
        "base": "s",
        "seeds": [1, 2],
        "variants": [
            {"name": "xsa=false", "record": "s-xsa-false", "fields": {"model.xsa": False}},
            {"name": "orders=1+2", "record": "s-orders-1+2", "fields": {"evaluate.mixer.orders": [1, 2]}},
        ],
    }
    read = reader.load(str(tmp_path))
    assert (read.name, read.recipe, read.base.record.name) == ("s", "laptop", "s")
    assert [(each.name, each.record.name) for each in read.variants] == [
        ("xsa=false", "s-xsa-false"),
        ("orders=1+2", "s-orders-1+2"),
    ]


def test_a_second_start_adds_and_keeps(tmp_path: Path) -> None:
    storage = Storage("", tmp_path)
    write(storage, FIRST)
    study = write(storage, SECOND, seeds=(2, 3))
    assert [record.variant for record in study.records] == ["base", "orders=1+2"]
    told = definition.read(storage, "s")
    assert told["seeds"] == [1, 2, 3] and [each["name"] for each in told["variants"]] == ["xsa=false", "orders=1+2"]


def test_a_variant_that_stands_there_keeps_its_name_and_record(tmp_path: Path) -> None:
    storage = Storage("", tmp_path)
    write(storage, variant("a b", evaluate__mixer__orders=(1, 2)))
    [again] = write(storage, SECOND).variants
    assert (again.variant, again.name) == ("a b", "s-a-b")
    assert len(definition.read(storage, "s")["variants"]) == 1
    with pytest.raises(RecipeError, match="variant 'a b' of study s was begun with"):
        of_variants(storage, "s", BASE, [variant("a b", model__xsa=False)])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"seeds": []}', '{"seeds": 1, "variants": []}', '{"seeds": [], "variants": [1]}']
)
def test_a_damaged_file_is_written_anew(content: str, tmp_path: Path) -> None:
    storage = Storage("", tmp_path)
    storage.write_bytes(tmp_path / "_studies/s/study.json", content.encode())
    write(storage, FIRST)
    assert [each["name"] for each in definition.read(storage, "s")["variants"]] == ["xsa=false"]


def test_names_of_records_are_safe_short_and_different() -> None:
    taken: set[str] = set()
    names = ["ttt.rate=0.1", "ttt.rate-0.1", "a/b", "a b", "..", "é", "x" * 300, "x" * 301, "a=1,b=2"]
    for name in names:
        record = record_name("s", name, taken)
        assert record not in taken and record.startswith("s-") and len(record) <= LONGEST_RECORD
        assert record.isascii() and "/" not in record and " " not in record and "=" not in record
        taken.add(record)
    assert {"s-ttt.rate-0.1", "s-a-b", "s-a-1--b-2"} <= taken


def test_why_variants_stopped_is_added_to(tmp_path: Path) -> None:
    storage = Storage("", tmp_path)
    for name, seeds in (("a", 3), ("b", 4), ("a", 5)):
        definition.write_stopped(storage, "s", {name: {"seeds": seeds, "why": "w"}})
    assert json.loads((tmp_path / "_studies/s/stopped.json").read_text()) == {
        "a": {"seeds": 5, "why": "w"},
        "b": {"seeds": 4, "why": "w"},
    }


def test_a_study_holds_itself_and_its_records(tmp_path: Path) -> None:
    storage = Storage("", tmp_path)
    study = of_variants(storage, "s", BASE, [FIRST])
    with ExitStack() as held:
        locks = definition.hold_records(held, storage, study, Console(quiet=True))
        assert list(locks) == ["", "s", "s-xsa-false"] and not any(lock.lost() for lock in locks.values())
        for path in (
            tmp_path / "_studies/s/study.lock",
            *(storage.record_folder(r.name) / LOCK for r in study.records),
        ):
            with pytest.raises(RecipeError, match="another driver is at work"), hold(storage, path):
                pass
    with hold(storage, storage.record_folder("s-xsa-false") / LOCK):
        pass
