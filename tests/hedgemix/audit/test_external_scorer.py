"""Any scorer under the audit's rules: a valid one passes, each way to cheat fails the check that is about it."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hedgemix import cli
from hedgemix.audit import external_scorer
from hedgemix.audit.findings import failed
from hedgemix.config import RecipeError
from hedgemix.data import shards

ROOT = Path(__file__).resolve().parent.parent.parent.parent
VOCAB = 32


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.cumsum(np.random.default_rng(0).integers(1, 3, 600)) % VOCAB


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("examples.scorers")


class Uniform:
    """Valid, but for what its subclasses do."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.at, self.total = tokens, 1, 0.0
        self.row = np.full(VOCAB, 1 / VOCAB, np.float32)

    def predict(self) -> np.ndarray:
        return self.row

    def update(self, token: int) -> None:
        self.total -= math.log(self.predict()[token])
        self.at += 1

    def nats(self) -> float:
        return self.total


class Sneak(Uniform):
    """Leans towards the target, in rows that are distributions."""

    def predict(self) -> np.ndarray:
        row = self.row.copy()
        row[self.tokens[min(self.at, len(self.tokens) - 1)]] += 1
        return row / row.sum()


class Restless(Uniform):
    """Every prediction moves the next."""

    def predict(self) -> np.ndarray:
        self.row = np.roll(self.row * np.linspace(0.9, 1.1, VOCAB, dtype=np.float32), 1)
        self.row /= self.row.sum()
        return self.row.copy()


class Rescorer(Uniform):
    """Learns a token, then charges itself for it."""

    def __init__(self, tokens: np.ndarray) -> None:
        super().__init__(tokens)
        self.counts = np.ones(VOCAB)

    def predict(self) -> np.ndarray:
        return self.counts / self.counts.sum()

    def update(self, token: int) -> None:
        self.counts[token] += 1
        super().update(token)


class Negative(Uniform):
    """Sums to one, with an entry below zero for a token that never occurs."""

    def predict(self) -> np.ndarray:
        return np.append(self.row * 2, -1)


class Nothing(Uniform):
    def predict(self) -> np.ndarray:
        return np.full(VOCAB, np.nan, np.float32)


class Failing(Uniform):
    def update(self, token: int) -> None:
        raise ZeroDivisionError("nothing to divide by")


def audit(make: Any, tokens: np.ndarray) -> tuple[list[str], float]:
    findings, rate = external_scorer.run(make, tokens, 20, 3, 0)
    assert [found.name for found in findings] == ["normalised", "order", "blind-to-target", "blind-to-future"]
    return failed(findings), rate


def test_valid_scorers_pass_with_the_bits_of_their_rows(tokens: np.ndarray, examples: Any) -> None:
    assert audit(Uniform, tokens) == ([], pytest.approx(5))
    caught, rate = audit(lambda text: examples.Bigram(text, VOCAB), tokens)
    assert caught == [] and 1 < rate < 2


@pytest.mark.parametrize(
    ("make", "caught"),
    [
        (Sneak, {"blind-to-target"}),
        (Restless, {"order"}),
        (Rescorer, {"order"}),
        (Negative, {"normalised"}),
        (Nothing, {"normalised", "order"}),
    ],
)
def test_each_way_to_cheat_is_caught(tokens: np.ndarray, make: Any, caught: set[str]) -> None:
    assert caught <= set(audit(make, tokens)[0])
    if make in (Sneak, Rescorer, Negative):
        assert set(audit(make, tokens)[0]) == caught


def test_the_documented_invalid_scorers_are_caught(tokens: np.ndarray, examples: Any) -> None:
    caught, cheap = audit(lambda text: examples.EntropyExpert(text, VOCAB), tokens)
    assert caught == ["normalised"]
    caught, rate = audit(lambda text: examples.TwoPass(text, VOCAB), tokens)
    assert set(caught) == {"blind-to-target", "blind-to-future"}
    valid = audit(lambda text: examples.Bigram(text, VOCAB), tokens)[1]
    assert cheap < valid and rate < valid


def test_the_document_shows_the_examples_as_they_are(examples: Any) -> None:
    document = (ROOT / "docs" / "audit.md").read_text()
    for example in (examples.Bigram, examples.EntropyExpert):
        assert inspect.getsource(example) in document


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_the_command_reports_on_a_file_of_tokens(
    tokens: np.ndarray, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"text{suffix}"
    if suffix == ".bin":
        shards.write_shard(file, tokens)
    else:
        np.save(file, tokens.astype(np.int32))
    for name, code in (("Bigram", 0), ("EntropyExpert", 1)):
        options = ["--scorer", f"examples.scorers:{name}", "--tokens", str(file)]
        to_file = ["--report", str(tmp_path / "report.md")] if code == 0 else []
        monkeypatch.setattr(sys, "argv", ["hedgemix", "audit", *options, *to_file])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr().out
        assert ended.value.code == code and f"examples.scorers:{name} on 599 tokens" in printed
        report = (tmp_path / "report.md").read_text() if code == 0 else printed
        verdict = "**1 of 4 checks FAILED: normalised.**" if code else "**Every check passed.**"
        assert verdict in report and "bits per token" in report and "## blind-to-future: pass" in report


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such:thing", "cannot be loaded"), ("math:nothing", "cannot be loaded"), ("math", "cannot be loaded")],
)
def test_a_scorer_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        external_scorer.load(name)


def test_texts_and_rows_of_other_kinds_are_refused(tokens: np.ndarray, tmp_path: Path) -> None:
    for value in (np.zeros((3, 3), int), np.zeros(9), np.array([1, 2]), np.array([1, 2, -3, 4])):
        np.save(tmp_path / "text.npy", value)
        with pytest.raises(RecipeError, match="one row of 4 ids"):
            external_scorer.read_tokens(tmp_path / "text.npy")
    for name in ("text.txt", "absent.npy", "absent.bin"):
        with pytest.raises(RecipeError, match="text.txt: give|cannot be read"):
            external_scorer.read_tokens(tmp_path / name)
    with pytest.raises(RecipeError, match="not a row"):
        audit(Uniform, np.append(tokens, VOCAB))
    with pytest.raises(RecipeError, match="raised ZeroDivisionError at position 1"):
        audit(Failing, tokens)
    with pytest.raises(RecipeError, match="must be positive"):
        external_scorer.report("math:sqrt", tmp_path, 0, 1, 0, None, Console())
