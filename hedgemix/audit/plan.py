"""How much an audit looks at, and where: only what the default plan looks at makes a pass that counts."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SEED_BITS = 48
"""Of a drawn seed: nobody tries them all, and a person can copy one."""
FULL = "full"
"""How the table calls a plan that looks at no less than the default one."""


@dataclass(frozen=True)
class Plan:
    """Says how much is looked at."""

    first_tokens: int = 0
    """Audit this many tokens from the start, rounded up to whole chunks (0: all)."""
    streamed_tokens: int = 131_072
    """Most tokens whose rows are committed before they are told; of a longer text first, last and drawn pieces."""
    coded_tokens: int = 1024
    """Most tokens from the start that are compressed and decompressed."""
    windows: int = 1000
    """Windows of each validation shard looked for in the training text."""
    tolerance: float = 1e-6
    """Largest relative difference of bits between two machines or numbers of ranks."""
    seed: int | None = None
    """Of everything that is drawn; None: from the system's randomness, when the audit begins."""
    unforeseen: bool = False
    """Whether the seed came from there, so that nobody could know it before."""

    def drawn(self) -> Plan:
        """Return the plan with a seed: its own, else one of the system's randomness."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=secrets.randbits(SEED_BITS), unforeseen=True)


def weaker(plan: Plan, tokens: int) -> list[str]:
    """List in which ways a plan with a seed looks at less than the default does, of a text of so many tokens; empty
    when a pass under it counts."""
    full = Plan()
    found = [
        f"{name} {getattr(plan, name):,} of {getattr(full, name):,}"
        for name in ("streamed_tokens", "coded_tokens", "windows")
        if getattr(plan, name) < min(getattr(full, name), tokens)
    ]
    if 0 < plan.first_tokens < tokens:
        found.append(f"first_tokens {plan.first_tokens:,} of {tokens:,}")
    if not plan.tolerance <= full.tolerance:
        found.append(f"tolerance {plan.tolerance:g} instead of {full.tolerance:g}")
    if not plan.unforeseen:
        found.append(f"draws of a known seed, {plan.seed}")
    return found


def told(plan: Plan, tokens: int) -> str:
    """Say in a cell of the table what a pass under the plan is worth: full, or in what it is weaker."""
    return "; ".join(weaker(plan, tokens)) or FULL


def from_json(values: Mapping[str, Any]) -> Plan:
    """Read a plan back from audit.json; raises TypeError for values that are none of a plan's."""
    plan = Plan(**values)
    for field in dataclasses.fields(Plan):
        value, usual = getattr(plan, field.name), getattr(Plan(), field.name)
        kind = int if usual is None else type(usual)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(f"{field.name} is {value!r}")
    return plan
