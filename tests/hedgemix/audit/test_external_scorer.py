"""Any scorer under the audit's rules: a valid one passes, each way to cheat fails the check that is about it."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hedgemix import cli
from hedgemix.audit import external_scorer, sandbox
from hedgemix.audit.external_scorer import Given
from hedgemix.audit.findings import Finding, failed
from hedgemix.config import RecipeError
from hedgemix.data import shards
from support.scorers import FIRST, VOCAB
from support.sound_audit import run_here

ROOT = Path(__file__).resolve().parent.parent.parent.parent
STREAMED = "normalised", "order", "streamed", "self-contained"
WHOLE = "normalised", "order", "blind", "self-contained"
HONEST_RATE = pytest.approx(5)
"""Bits of a token of 32 that nothing is known of."""


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.cumsum(np.random.default_rng(0).integers(1, 3, 600)) % VOCAB


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("examples.scorers")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as if its guards were up: for what is seen in rows alone."""

    def run(work: str, arguments: Any, readable: Any, talk: Any, folders: Any) -> sandbox.Outcome:
        try:
            outcome = run_here(work, {**arguments, "folder": "/nowhere"}, readable, talk=talk)
        except (ArithmeticError, ValueError, RecipeError) as error:
            raise sandbox.WorkError(f"{type(error).__name__}: {error}") from error
        return replace(outcome, confined=sandbox.Confined(namespaces=True, filtered=True))

    FIRST.clear()
    monkeypatch.setattr(sandbox, "run", run)


def audit(name: str, tokens: np.ndarray, cuts: int = 0, **more: Any) -> tuple[list[str], float, list[Finding]]:
    """What failed, the rate, the findings. cuts: with the whole text, 0: without."""
    module = "" if ":" in name else "support.scorers:"
    given = Given(f"{module}{name}", whole_text=bool(cuts), **more)
    findings, rate = external_scorer.run(given, tokens, 20, max(cuts, 1), 0)
    if len(findings) > 1:
        assert tuple(found.name for found in findings) == (WHOLE if cuts else STREAMED)
    assert all(found.statement.endswith(".") for found in findings)
    return failed(findings), rate, findings


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("cuts", [0, 3])
def test_valid_scorers_pass_with_the_bits_of_their_rows(tokens: np.ndarray, cuts: int) -> None:
    assert audit("Uniform", tokens, cuts)[:2] == ([], HONEST_RATE)
    caught, rate, findings = audit("examples.scorers:Bigram", tokens, cuts)
    assert caught == [] and 1 < rate < 4
    assert ("weaker" in findings[2].statement) == bool(cuts)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("Sneak", ["blind"]),
        ("SparseSneak", ["blind"]),
        ("LateSneak", ["blind"]),
        ("SlySneak", ["blind"]),
        ("Whole", ["blind"]),
        ("Liar", ["order"]),
        ("Restless", ["order", "blind"]),
        ("Rescorer", ["order"]),
        ("Negative", ["normalised"]),
        ("HeavyAtFew", ["normalised"]),
        ("Nothing", ["normalised"]),
        ("examples.scorers:EntropyExpert", ["normalised"]),
        ("examples.scorers:TwoPass", ["blind"]),
    ],
)
def test_each_way_to_cheat_with_the_whole_text_is_caught(tokens: np.ndarray, name: str, caught: list[str]) -> None:
    assert audit(name, tokens, 100 if name == "SparseSneak" else 4)[0] == caught


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("Liar", ["order"]),
        ("Restless", ["order"]),
        ("Rescorer", ["order"]),
        ("Negative", ["normalised"]),
        ("HeavyAtFew", ["normalised"]),
        ("Nothing", ["normalised"]),
        ("examples.scorers:EntropyExpert", ["normalised"]),
    ],
)
def test_each_way_to_cheat_without_it_is_caught(tokens: np.ndarray, name: str, caught: list[str]) -> None:
    assert audit(name, tokens)[0] == caught


@pytest.mark.usefixtures("here")
def test_who_is_told_each_token_after_its_row_has_nothing_to_lean_towards(tokens: np.ndarray) -> None:
    for name in ("Sneak", "SparseSneak", "LateSneak", "SlySneak"):
        assert audit(name, tokens)[:2] == ([], HONEST_RATE)
    assert audit("examples.scorers:TwoPass", tokens)[1] == audit("examples.scorers:Bigram", tokens)[1]


@pytest.mark.usefixtures("here")
def test_what_a_few_cuts_miss_is_told(tokens: np.ndarray) -> None:
    given, caught = Given("support.scorers:SparseSneak", whole_text=True), []
    for seed in range(12):
        findings, _ = external_scorer.run(given, tokens[:100], 1, 24, seed)
        caught.append("blind" in failed(findings))
        missed = findings[2].figures["missed_with_probability"]["3% of the positions"]
    assert missed == pytest.approx((1 - 1 / 33) ** 24) and 0.2 < 1 - np.mean(caught) < 0.8


def test_who_keeps_or_leaves_a_text_for_the_next_one_finds_none(tokens: np.ndarray) -> None:
    assert audit("Keeper", tokens, 1)[0] == ["blind"]
    caught, rate, findings = audit("Leaver", tokens)
    assert (caught, rate) == (["self-contained"], HONEST_RATE) and "writing" in findings[-1].headline
    caught, rate, findings = audit("Needy", tokens)
    assert caught == ["self-contained"] and math.isnan(rate) and "--files names" in findings[0].statement


def test_what_lies_about_is_not_to_be_had(tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds nothing scores as one who knows nothing."""
    np.save(tmp_path / "text.npy", tokens)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCORER_TOKENS", ",".join(map(str, tokens)))
    found, rate, findings = audit("FromAnywhere", tokens)
    assert set(found) <= {"self-contained"} and rate == HONEST_RATE
    assert any(guard in findings[2].figures["guarded_by"] for guard in ("namespaces", "Landlock"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["FromFile", "FromC", "FromEnvironment", "FromAudit", "Keeper"])
def test_without_isolation_all_of_it_would_be(
    tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """So that the tests above cannot pass because there was nothing to find."""
    np.save(tmp_path / "text.npy", tokens)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCORER_TOKENS", ",".join(map(str, tokens)))
    FIRST.append(tokens)
    caught, rate, _ = audit(name, tokens)
    assert caught == [] and rate < 1


def test_the_text_in_a_file_that_it_may_read_or_in_its_code_is_found(tokens: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", tokens)
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom support.scorers import FromFile\n"
        f"TEXT = {tokens.astype(np.uint16).tobytes()!r}\nclass Own(FromFile): pass\n"
    )
    (tmp_path / "struct.py").write_text("open('ran', 'w').close()")  # Python's own, which the guards need
    given = {"folder": tmp_path, "files": (tmp_path / "text.npy",)}
    caught, rate, findings = audit("own:Own", tokens, **given)
    assert caught == ["self-contained"] and rate < 1
    assert "windows of 16 tokens stand in" in findings[-1].headline and "text.npy" in findings[-1].headline
    assert any("own.py" in name for name in findings[-1].figures["own_files"])
    assert not (tmp_path / "ran").exists()


def test_without_a_guard_of_the_kernel_nothing_is_proved(tokens: np.ndarray) -> None:
    walk = external_scorer.Walk(np.zeros(3), np.zeros(3), np.zeros(3))
    for confined, passed in (
        (sandbox.Confined(), False),
        (sandbox.Confined(landlock=3), True),
        (sandbox.Confined(namespaces=True), True),
    ):
        walk.confined = confined
        assert external_scorer.streamed(walk).passed == passed


def test_the_document_shows_the_examples_as_they_are(examples: Any) -> None:
    document = (ROOT / "docs" / "audit.md").read_text()
    for example in (examples.Bigram, examples.EntropyExpert):
        assert inspect.getsource(example) in document


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_the_command_reports_on_a_file_of_tokens(
    tokens: np.ndarray, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"text{suffix}"
    if suffix == ".bin":
        shards.write_shard(file, tokens)
    else:
        np.save(file, tokens.astype(np.int32))
    for name, code, more in (
        ("Bigram", 0, []),
        ("EntropyExpert", 1, []),
        ("TwoPass", 1, ["--whole-text", "--cuts", "2"]),
    ):
        options = ["--scorer", f"examples.scorers:{name}", "--tokens", str(file), *more]
        to_file = ["--report", str(tmp_path / "report.md")] if code == 0 else []
        monkeypatch.setattr(sys, "argv", ["hedgemix", "audit", *options, *to_file])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr().out
        assert ended.value.code == code and f"examples.scorers:{name} on 599 tokens" in printed
        report = (tmp_path / "report.md").read_text() if code == 0 else printed
        wrong = "blind" if more else "normalised"
        verdict = f"**1 of 4 checks FAILED: {wrong}.**" if code else "**Every check passed.**"
        third = f"## {'blind: FAIL' if more else 'streamed: pass'}"
        assert verdict in report and "bits per token" in report and third in report


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["no_such:thing", "math:nothing", "math:", ":x"])
def test_a_scorer_that_is_not_there_is_refused(tokens: np.ndarray, name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be loaded"):
        audit(name, tokens)


@pytest.mark.usefixtures("here")
def test_texts_and_rows_of_other_kinds_are_refused(tokens: np.ndarray, tmp_path: Path) -> None:
    for value in (np.zeros((3, 3), int), np.zeros(9), np.array([1, 2]), np.array([1, 2, -3, 4])):
        np.save(tmp_path / "text.npy", value)
        with pytest.raises(RecipeError, match="one row of 4 ids"):
            external_scorer.read_tokens(tmp_path / "text.npy")
    np.save(tmp_path / "text.npy", np.array([1, 2, 3, 2**20]))
    with pytest.raises(RecipeError, match="is not below 1,048,576"):
        external_scorer.read_tokens(tmp_path / "text.npy")
    for name in ("text.txt", "absent.npy", "absent.bin"):
        with pytest.raises(RecipeError, match="text.txt: give|cannot be read"):
            external_scorer.read_tokens(tmp_path / name)
    with pytest.raises(RecipeError, match="gave 32 probabilities at position 600, before token 32"):
        audit("Uniform", np.append(tokens, VOCAB))
    with pytest.raises(RecipeError, match="not a row"):
        audit("NoRow", tokens)
    with pytest.raises(RecipeError, match="raised ZeroDivisionError: nothing to divide by after row 1"):
        audit("Failing", tokens)
    given = Given("support.scorers:Uniform", files=(tmp_path / "absent",))
    with pytest.raises(RecipeError, match="is no file"):
        external_scorer.report(given, tmp_path, 1, 1, 0, None, Console())
    with pytest.raises(RecipeError, match="must be positive"):
        external_scorer.report(given, tmp_path, 0, 1, 0, None, Console())
