"""What the documentation shows runs, and what it names is there."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from ray.scripts.scripts import cli as ray_command

from hedgemix.experts import registry
from hedgemix.runtime.files import read_json
from hedgemix.standalone import main as standalone
from pipeline import cli, record
from pipeline.monitor import status_view
from pipeline.results.schema import Row
from pipeline.results.table import read_rows, write_rows
from pipeline.storage.store import Storage
from support import tiny_run

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXCERPT = re.compile(r"<!-- excerpt: (\S+) -->")
"""Before a block that is not run: it stands in that file, which has tests of its own."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)


class Block(NamedTuple):
    line: int
    """Of the page, from 0, where the code begins."""
    code: str
    excerpt: str
    """The file it stands in; empty: it runs."""


def blocks(page: Path) -> list[Block]:
    """The page's Python, in order."""
    lines, found = page.read_text().splitlines(), []
    for at, line in enumerate(lines):
        if line.strip() == "```python":
            stop = lines.index("```", at)
            before = EXCERPT.fullmatch(lines[at - 1]) if at else None
            found.append(Block(at + 1, "\n".join(lines[at + 1 : stop]) + "\n", before[1] if before else ""))
    return found


# What runs.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs`: a real record of one seed that is done and one that failed, and rows like it."""
    folder = tmp_path_factory.mktemp("docs")
    real = tiny_run.make(folder / "runs")
    storage = Storage("", real.folder)
    [done, failed] = [Row(**row) for row in read_rows(storage, real.table)]
    result = read_json(real.evaluation() / "result.json")["result"]
    columns = {field.name for field in fields(Row)} & set(result) - {"evaluate_workers"}
    seconds = {f"{phase}_seconds": 2.0 for phase in ("warmup", "train", "quantize", "score")}
    done = replace(
        done, **{name: result[name] for name in columns}, **seconds, lost_seconds=0.0, bpb_full=result["bpb_quantized"],
        workers=8, evaluate_workers=8, total_bytes=200_000, limit_bytes=300_000, within_limits=True,
        bits_per_weight=4.0,
    )  # fmt: skip
    failed = replace(failed, error="train: it broke", retries=1)
    write_rows(storage, [done, failed])
    config = json.loads(done.config or "")
    config["evaluate"]["mixer"]["kind"] = "hedge"
    del config["evaluate"]["mixer"]["experts"]  # as an earlier version wrote it
    config["compute"]["gpus_per_worker"] = 0.5
    for name, more, text in (("hedge", 0.25, done.valid_sha256), ("elsewhere", 0.5, "0" * 64)):
        score = (done.bpb_final or 0) + more
        like = replace(done, record=name, valid_sha256=text, config=json.dumps(config), bpb_final=score)
        write_rows(storage, [like, replace(like, seed=8), replace(like, seed=9, status="pending", error=None)])
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, to work in. What a page adds to the experts is gone after it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "EXPERTS", dict(registry.EXPERTS))
    return tmp_path


def run(page: Path) -> dict[str, Any]:
    """Run the page's blocks in order, in the current folder; returns what they named."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if not block.excerpt:
            exec(compile("\n" * block.line + block.code, page, "exec"), names)  # an error names the page's line
    return names


OWN_TESTS = ("experts.md", "table.md")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", [each for each in PAGES if blocks(each) and each.name not in OWN_TESTS], ids=name_of)
def test_python_runs_as_it_is_or_stands_elsewhere(page: Path) -> None:
    run(page)
    for block in blocks(page):
        assert not block.excerpt or block.code in (ROOT / block.excerpt).read_text()


def test_blocks_that_do_not_run_are_few() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    assert sum(bool(block.excerpt) for block in every) <= 2 < len(every) / 5


@pytest.mark.usefixtures("folder")
def test_an_expert_takes_thirty_lines_and_is_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "experts.md"
    assert len(blocks(page)[0].code.splitlines()) <= 30
    run(page)
    without, skip, _ = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert without != skip


@pytest.mark.usefixtures("folder")
def test_the_tables_page_computes_what_it_says() -> None:
    names = run(ROOT / "docs" / "table.md")
    real = names["table"].query("record == 'tiny' and seed == 7").iloc[0]
    board = names["board"].reset_index().set_index("record")
    assert board.seeds.to_dict() == {"tiny": 1, "hedge": 2, "elsewhere": 2} and not board.audited.any()
    assert board.bpb.hedge == pytest.approx(real.bpb_final + 0.25) and board.loc["tiny", "within_limits"]
    assert names["worth"].loc["tiny", "bpb_final"] == real.bpb_final
    assert set(names["setting"]) == {"ensemble", "hedge"}
    assert {*names["differing"]} == {"evaluate.mixer.kind", "evaluate.mixer.experts", "compute.gpus_per_worker"}
    [tiny] = names["gpu_seconds"][names["done"].record == "tiny"]
    half = names["gpu_seconds"][names["done"].record == "hedge"].iloc[0]
    assert tiny == 8 * (2 + 2) + 8 * real.evaluate_seconds + 2 + 2 and half == tiny / 2
    assert names["sizes"].left.eq(100_000).all() and names["sizes"].bytes_a_weight.eq(0.5).all()
    along = names["along"](real)
    for name in ("quantized", "mixed", "ttt", "final"):
        assert along[name].iloc[-1] == pytest.approx(real[f"bpb_{name}"], rel=1e-12)
    assert names["difference"]("hedge", "tiny").to_dict() == {7: pytest.approx(0.25)}
    with pytest.raises(ValueError, match="different texts"):
        names["difference"]("tiny", "elsewhere")


# What is named.


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")


def code(page: Path) -> Iterator[str]:
    """What is no prose and no Python: indented lines without their comments, and what stands between backticks."""
    text = page.read_text()
    for language, block in FENCED.findall(text):
        yield from block.splitlines() if language != "python" else ()
    prose = []
    for line in FENCED.sub("", text).splitlines():
        if line.startswith("    "):
            yield line.split(" # ")[0].strip()
        else:
            prose.append(line)
    for paragraph in re.split(r"\n\s*\n", "\n".join(prose)):
        yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", paragraph))


@cache
def options(program: str, command: str) -> frozenset[str]:
    """The options that a command's help shows."""
    entry = {
        "hedgemix": cli.main,
        "record.py": lambda: record.main([command, "--help"]),
        "--status": lambda: status_view.main(["--help"]),
        "train_gpt.py": lambda: standalone.parse(["--help"]),
    }
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), redirect_stderr(shown):
        patch.setattr(sys, "argv", ["hedgemix", command, "--help"])
        patch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit, match="^0$"):
            entry[program]()
    return frozenset(OPTION.findall(shown.getvalue()))


def of_record() -> frozenset[str]:
    return options("record.py", "laptop") | options("--status", "")


def of_hedgemix() -> dict[str, frozenset[str]]:
    """By command."""
    every = [re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower() for kind in cli.COMMANDS]
    return {command: options("hedgemix", command) for command in every}


@cache
def of_others() -> frozenset[str]:
    """Options of Ray's commands and of a train_gpt.py, and whatever benchmarks have a field or an option for."""

    def under(command: Any) -> Iterator[Any]:
        yield command
        for each in getattr(command, "commands", {}).values():
            yield from under(each)

    rays = {name for command in under(ray_command) for option in command.params for name in option.opts}
    sources = "".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*.py"))
    fields_of_benchmarks = re.findall(r"^    ([a-z_]+): ", sources, re.MULTILINE)
    return options("train_gpt.py", "") | frozenset(
        rays
        | {"--" + name.replace("_", "-") for name in fields_of_benchmarks}
        | {*re.findall(r'"(--[a-z-]+)"', sources)}
    )


def named_options(text: str) -> tuple[str, str, set[str]] | None:
    """Program, command and options of a line that calls one of ours."""
    called = re.match(r"(?:.*(?:-- |bin/))?hedgemix ([a-z][a-z-]*)(?= |$)(.*)", text)
    if called:
        return "hedgemix", called[1], set(OPTION.findall(called[2]))
    called = re.search(r"record\.py(?= |$)(.*)", text)
    return ("record.py", "", set(OPTION.findall(called[1]))) if called else None


@EVERY_PAGE
def test_commands_and_their_options_exist(page: Path) -> None:
    for text in code(page):
        if called := named_options(text):
            program, command, given = called
            known = of_hedgemix().get(command) if program == "hedgemix" else of_record()
            assert known, f"there is no {program} {command}: {text}"
            assert given <= known, f"{given - known} of {text}"
        elif text.startswith("--"):
            every = of_record().union(*of_hedgemix().values(), of_others())
            assert {OPTION.findall(text)[0]} <= every, text
        dotted = {option for option in OPTION.findall(text) if "." in option}
        assert dotted <= of_record(), text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("    .venv/bin/hedgemix audit RUN --draws 3".strip(), ("hedgemix", "audit", {"--draws"})),
        ("ray job submit --working-dir . -- hedgemix download --folder x", ("hedgemix", "download", {"--folder"})),
        ("python pipeline/record.py record --seeds 1 --train.steps 3", ("record.py", "", {"--seeds", "--train.steps"})),
        ("hedgemix/   the library", None),
        ("ray up cluster.yaml", None),
    ],
)
def test_calls_are_seen(text: str, found: Any) -> None:
    assert named_options(text) == found


def test_what_helps_show_is_read() -> None:
    assert {"--train.steps", "--evaluate.mixer.experts", "--seeds", "--status", "--record"} <= of_record()
    assert "--draw-seed" in of_hedgemix()["audit"] and "--draw-seed" not in of_hedgemix()["download"]
    assert "--train.pace" not in of_record() and {"--node-id", "--update-docs"} <= of_others()


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY_PAGE
def test_links_targets_and_paths_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            assert (page.parent / path).exists(), target
            assert not anchor or anchor in headings(page.parent / path if path else page), target
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in code(page):
        if called := re.match(r"make ([a-z]\w*)", text):
            assert called[1] in targets, text
        if re.fullmatch(r"(hedgemix|pipeline|benchmarks|tests|examples|docs|clusters)/[\w/.-]+", text):
            assert (ROOT / text).exists(), text


@EVERY_PAGE
def test_columns_that_are_named_exist(page: Path) -> None:
    """As table.<column>, in prose; Python that names others does not run."""
    columns = {field.name for field in fields(Row)}
    for text in code(page):
        for name in re.findall(r"\b(?:table|done|row)\.(?!py\b)([a-z_]\w*)", text):
            assert name in columns or hasattr(pd.DataFrame, name), text


def test_the_index_has_every_page_once() -> None:
    listed = re.findall(r"^- \[([^]]+)\]\(\1\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {"score.md", "experts.md", "cluster.md", "table.md"} <= set(listed)
