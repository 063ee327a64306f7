"""Audits in which nothing is planted, and what their halves told, kept for audits that need one half sound."""

from __future__ import annotations

import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hedgemix.audit import sandbox
from hedgemix.audit.auditor import Work
from hedgemix.audit.findings import Finding
from hedgemix.audit.streamed import Committed
from support.tiny_run import Record

WORK = Work(
    witness="support.cheats:testify",
    predictor="hedgemix.audit.commitment:commit",
    rank="support.cheats:score_rank",
    coder="support.cheats:compress",
    decoder="support.cheats:decompress",
)
SHORT_TOKENS = 640
ELSEWHERE = sandbox.run


def run_here(
    work: str, arguments: Any, readable: Any, log: Any = lambda record: None, talk: Any = None
) -> sandbox.Outcome:
    """The work of another process done in this one, through JSON all the same; but for ranks, which are several."""
    if "rank" in arguments:
        return ELSEWHERE(work, arguments, readable)
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    if talk:
        (heard, rows), (tokens, told) = os.pipe(), os.pipe()
        with ThreadPoolExecutor(1) as other:
            done = other.submit(function, **arguments, pipe=[rows, tokens], log=log)
            with suppress(OSError), os.fdopen(heard, "rb") as said, os.fdopen(told, "wb") as hears:
                talk(said, hears)
        return sandbox.Outcome(done.result(), sandbox.Confined(), 0.0)
    value = function(**json.loads(json.dumps(arguments)), log=lambda told: log(json.loads(json.dumps(told))))
    return sandbox.Outcome(value, sandbox.Confined(), 0.0)


@dataclass
class Sound:
    """An audit in which nothing is planted, and what its halves told. They tell it again, at no cost, to audits of the
    same record whose fault is in the other half."""

    record: Record
    findings: list[Finding]
    told: list[Finding]
    nats_N: np.ndarray
    """What the committed rows charge the whole text."""
    kept: dict[str, tuple[sandbox.Outcome, list[Any]]] = field(default_factory=dict)
    """What witness and coder of the text's first SHORT_TOKENS returned and logged."""

    def commit(
        self, work: str, source: Any, stretches: Any, readable: Any, vocab_size: int, progress: Any
    ) -> tuple[Committed, sandbox.Outcome, float]:
        """In place of `streamed.commit`."""
        committed = Committed(source.read(), vocab_size, stretches)
        committed.nats_N[committed.asked()] = self.nats_N[committed.asked()]
        return committed, sandbox.Outcome(None, sandbox.Confined(), 0.0), 0.0

    def run(
        self, work: str, arguments: Any, readable: Any, log: Any = lambda record: None, talk: Any = None
    ) -> sandbox.Outcome:
        """In place of `sandbox.run`, of work on the text's first SHORT_TOKENS."""
        if work not in (WORK.witness, WORK.coder):
            return run_here(work, arguments, readable, log, talk)
        assert arguments["source"]["tokens"] == SHORT_TOKENS and arguments["source"]["claim"] == "final"
        if work not in self.kept:
            logged: list[Any] = []
            self.kept[work] = run_here(work, arguments, readable, logged.append), logged
        outcome, logged = self.kept[work]
        for record in logged:
            log(record)
        return outcome
