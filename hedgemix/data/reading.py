"""What a reading of inputs tells: what was read, what was passed over and why, and the first ten that are wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hedgemix.config import RecipeError

MOST_TOLD = 10


@dataclass
class Reading:
    """Holds counts of what was read, and of what was passed over and why."""

    files: int = 0
    documents: int = 0
    n_bytes: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        passed = ", ".join(f"{count:,} {what}" for what, count in sorted(self.passed_over.items()) if count)
        read = f"{self.files:,} files, {self.documents:,} documents, {self.n_bytes:,} bytes"
        return f"read: {read}; passed over: {passed or 'nothing'}"


class ToldProblems(RecipeError):
    """Tells of several inputs."""


class Problems:
    """Collects what is wrong with a list of inputs, so that who has many bad ones need not try ten times."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str | RecipeError) -> None:
        """Note a problem; raises RecipeError with all of them when there are ten."""
        if isinstance(problem, ToldProblems):
            raise problem
        self.found.append(str(problem))
        if len(self.found) == MOST_TOLD:
            self.found.append(f"(these are the first {MOST_TOLD})")
            self.tell()

    def tell(self) -> None:
        """Raise RecipeError with the problems, a line each, if there are any."""
        if self.found:
            raise ToldProblems("\n".join(self.found))


def encodable(text: str) -> bool:
    """Tell whether the text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, written as an escape
        return False
    return True
