"""Which seeds a study runs, and which variants need more of them (`--until`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.results.schema import Row
from pipeline.study.definition import Study

if TYPE_CHECKING:
    from pipeline.analysis.sequential import Decision

Until = float | Literal["decided"]


def first_seeds(declared: Sequence[int], count: int) -> tuple[int, ...]:
    """Return so many seeds: the declared ones, then the smallest numbers from 1 up that are not among them."""
    seeds = list(declared)
    number = 1
    while len(seeds) < count:
        if number not in declared:
            seeds.append(number)
        number += 1
    return tuple(seeds[:count])


def same_text(row: Row, other: Row) -> bool:
    """Say whether two seeds scored the same text, which tokenizers may cut differently."""
    if row.valid_sha256 == other.valid_sha256:
        return True
    return bool(row.text_sha256) and (row.text_sha256, row.valid_bytes) == (other.text_sha256, other.valid_bytes)


def differences(rows: Sequence[Row], base: Sequence[Row]) -> list[float]:
    """Compute how many bits per byte more each finished seed takes than the base's of the same seed, where both scored
    the same text."""
    theirs = {row.seed: row for row in base if row.status == "done"}
    pairs = [(row, theirs[row.seed]) for row in rows if row.status == "done" and row.seed in theirs]
    return [
        row.bpb_final - other.bpb_final
        for row, other in pairs
        if row.bpb_final is not None and other.bpb_final is not None and same_text(row, other)
    ]


def judge(rows: Sequence[Row], base: Sequence[Row], until: Until, *, look: int, looks: int, variants: int) -> Decision:
    """Decide whether a variant with these rows needs another seed. Where a seed failed, its own or the base's, nothing
    is added: the same command tries the seed again."""
    from pipeline.analysis.sequential import Decision, decide  # scipy takes a second to import, most records need none

    for who, some in (("", rows), ("the base's ", base)):
        if failed := next((row for row in some if row.status != "done"), None):
            return Decision(True, f"undecided: {who}seed {failed.seed} failed")
    found = differences(rows, base)
    if not found:
        return Decision(True, "undecided: it scored another text than the base")
    return decide(found, look=look, looks=looks, rule=until, variants=variants)


@dataclass
class Seeds:
    """Keeps which seeds each record of a study runs. With a rule, every round that ends gives one more to each variant
    that the rule leaves undecided, up to `most`, and to the base, so that every seed has its pair."""

    study: Study
    declared: tuple[int, ...]
    until: Until | None
    most: int
    stopped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By variant, as the study's file has it."""
    look: int = 1

    def now(self) -> dict[str, tuple[int, ...]]:
        """Return the seeds to run in this round, by the record's name; a variant that has stopped is left out."""
        seeds = first_seeds(self.declared, len(self.declared) + self.look - 1)
        return {each.name: seeds for each in self.study.records if each.variant not in self.stopped}

    def more(self, rows: Mapping[str, Sequence[Row]]) -> bool:
        """Judge every variant by its rows of the round that ended; says whether there is another round. rows: of all
        records, by name."""
        if self.until is None:
            return False
        looks = self.most - len(self.declared) + 1
        every = len(self.study.variants)
        for each in self.study.variants:
            if each.variant in self.stopped:
                continue
            mine, base = rows[each.name], rows[self.study.base.name]
            decision = judge(mine, base, self.until, look=self.look, looks=looks, variants=every)
            if decision.stop:
                self.stopped[each.variant] = {"seeds": len(mine), "why": decision.why}
        self.look += 1
        return len(self.stopped) < every
