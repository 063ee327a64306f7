"""The audit of a finished run: its claim derived again by running it, and what was found written beside it.

Everything is computed from the artifact and the shards in processes of their own; the record is only compared with. The
functions that do the work there are named in `Work`, so that a test can name one that cheats and see it caught.
"""

from __future__ import annotations

import base64
import hashlib
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hedgemix import __version__
from hedgemix.audit import checks, limits, own_code, sandbox, streamed
from hedgemix.audit.agreement import check_agreement
from hedgemix.audit.claim import Claim, claims, columns, write_columns
from hedgemix.audit.findings import Finding, failed, markdown, print_finding, timed
from hedgemix.audit.plan import FULL, Plan, told
from hedgemix.audit.replay import Source
from hedgemix.audit.sandbox import WorkError
from hedgemix.audit.seconds import check_seconds
from hedgemix.audit.text_bytes import check_bytes
from hedgemix.config import RecipeError, config_hash, to_dict
from hedgemix.evaluate.scoring_order import Piece, chunks
from hedgemix.runtime.files import replacing, sha256_of, write_json
from hedgemix.standalone import script

RANKS = 2
RANK_CHUNKS = 3


@dataclass(frozen=True)
class Work:
    """Names the functions that do the work in processes of their own, as "module:function"; see `sandbox.run`."""

    witness: str = "hedgemix.audit.replay:testify"
    predictor: str = "hedgemix.audit.commitment:commit"
    rank: str = "hedgemix.audit.replay:score_rank"
    coder: str = "hedgemix.audit.replay:compress"
    decoder: str = "hedgemix.audit.replay:decompress"


@dataclass
class Audit:
    """Holds one audit at work; findings are handed on as they come."""

    claim: Claim
    plan: Plan
    on_finding: Callable[[Finding], None]
    source: Source
    spans: list[Piece]
    """The chunks audited."""
    done_by: Work = Work()
    findings: list[Finding] = field(default_factory=list)
    replay: dict[str, Any] | None = None
    """What the witness told at its end."""
    charges: list[np.ndarray] = field(default_factory=list)
    """What it said each target was charged, in nats, a chunk each."""
    progress: Callable[[str], None] = lambda text: None

    def find(self, finding: Finding) -> None:
        """Take a finding, unless there is one of its name, and hand it on."""
        if finding.name not in [earlier.name for earlier in self.findings]:
            self.findings.append(finding)
            self.on_finding(finding)

    def readable(self) -> list[Path]:
        """List the files that the replay may open: artifact and validation shards."""
        return [self.claim.artifact, *map(Path, self.claim.dataset.valid_shards)]


def start(claim: Claim, plan: Plan, on_finding: Callable[[Finding], None], done_by: Work = Work()) -> Audit:
    """Begin an audit, and draw its seed if the plan has none; raises RecipeError for a plan that cannot be carried
    out."""
    plan = plan.drawn()
    if plan.first_tokens < 0 or plan.streamed_tokens < 1 or plan.coded_tokens < 2 or plan.windows < 1:
        raise RecipeError("--streamed-tokens, --windows, --coded-tokens must be positive, --first-tokens not negative")
    total, config = claim.dataset.valid_tokens, claim.recipe.evaluate
    all_chunks = chunks(total, config.chunk_tokens)
    wanted = plan.first_tokens or total
    spans = [chunk for chunk in all_chunks if chunk.start < wanted]
    if spans[-1].stop < 4:
        raise RecipeError(f"{spans[-1].stop} tokens are too few to audit")
    on_gpu = claim.recipe.compute.gpus_per_worker > 0 and torch.cuda.is_available()
    source = Source(
        artifact=str(claim.artifact),
        shards=list(claim.dataset.valid_shards),
        limit=claim.dataset.max_valid_tokens,
        tokens=spans[-1].stop,
        schedule_tokens=total,
        config=to_dict(config),
        claim=claim.name,
        device="cuda" if on_gpu else "cpu",
        threads=torch.get_num_threads(),
    )
    return Audit(claim, plan, on_finding, source, spans, done_by)


def record(table: Path, seeds: Sequence[int], name: str, plan: Plan, console: Console) -> int:
    """Audit the table's claims, a line a check; returns 0 when every check passed, else 1. Raises RecipeError."""
    audited, bad, worth = claims(table, seeds, name), [], FULL
    for claim in audited:
        total, own = claim.dataset.valid_tokens, plan.drawn()
        console.print(f"seed {claim.seed}: bpb_{name} {claim.score:.4f} of {total:,} tokens", highlight=False)
        console.print(f"  drawn with --draw-seed {own.seed}", highlight=False)
        with console.status("starting") as status:
            findings = run(claim, own, lambda finding: print_finding(finding, console), status.update)
        bad += [f"{finding} (seed {claim.seed})" for finding in failed(findings)]
        console.print(f"  report: {claim.path('.md')}", soft_wrap=True, highlight=False)
        worth = told(own, total) if worth == FULL else worth
    sound = f"every check passed: seed {', '.join(str(claim.seed) for claim in audited)}"
    if worth != FULL:
        sound += f"; not taken for an audit, which looks at more ({worth})"
    verdict = f"FAILED: {', '.join(bad)}" if bad else sound
    console.print(verdict, style="bold red" if bad else "bold green", soft_wrap=True, highlight=False)
    return 1 if bad else 0


def run(
    claim: Claim,
    plan: Plan,
    on_finding: Callable[[Finding], None] = lambda finding: None,
    progress: Callable[[str], None] = lambda text: None,
    done_by: Work = Work(),
) -> list[Finding]:
    """Make all checks of one claim, handed on one by one; writes audit.json, audit.md and, for the score, the table's
    columns."""
    work = start(claim, plan, on_finding, done_by)
    work.progress, plan = progress, work.plan
    coded_stop = min(work.source.tokens, plan.coded_tokens)
    with ThreadPoolExecutor(1) as other, quick_switches():  # on a core of its own: it takes longer than all the rest
        proof = other.submit(prove, work)
        repeat(work, coded_stop)
        work.progress("scoring with two ranks")
        ranks_agree(work)
        work.progress("reading the training text")
        work.find(timed(lambda: limits.check_limits(claim)))
        charged_N = np.concatenate([[math.nan], *work.charges]) if work.replay else None
        work.find(timed(lambda: limits.unseen(claim, plan.windows, drawn_seed(work), charged_N)))
        work.find(timed(lambda: check_bytes(claim)))
        work.find(timed(lambda: claimed(work)))
        work.find(timed(lambda: check_seconds(claim)))
        work.progress("compressing and decompressing")
        work.find(timed(lambda: really_coded(work, coded_stop)))
        work.find(proof.result()())
    write(work)
    return work.findings


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads take turns often: who hears rows and tells tokens waits for its turn at every one."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def repeat(work: Audit, coded_stop: int) -> None:
    """Run the replay, isolated; without isolation when that fails, so that the rest can be told."""
    arguments = {"source": asdict(work.source), "marks": [coded_stop]}

    def hear(record: dict[str, Any]) -> None:
        if "fraction" in record:
            work.progress(f"evaluating the text: {record['fraction']:.0%}")
        if "charges" in record:
            work.charges.append(np.frombuffer(base64.b64decode(record["charges"]), "<f8"))
        if "replay" in record:
            work.replay = record["replay"]
            work.find(checks.order(work.claim, record["replay"], work.source.tokens))
            work.find(checks.bits(work.claim, record["replay"], work.plan.tolerance))

    try:
        outcome = sandbox.run(work.done_by.witness, arguments, work.readable(), hear)
        work.find(checks.self_contained(outcome.confined, "", len(work.readable()), outcome.start_seconds))
        return
    except WorkError as error:
        message = str(error)
        refused = error.refused
    if refused:
        work.find(checks.self_contained(None, message, len(work.readable()), 0.0))
        work.replay, work.charges = None, []
        try:
            sandbox.run(work.done_by.witness, arguments, None, hear)
            return
        except WorkError as error:
            message = str(error)
    for name in ("order", "bits", "self-contained"):
        work.find(checks.not_done(name, message))


def drawn_seed(work: Audit) -> int:
    """Return the seed of all that is drawn, which an audit has from its start on."""
    assert work.plan.seed is not None
    return work.plan.seed


def claimed(work: Audit) -> Finding:
    """Hold all that the record says of the seed against the replay."""
    if work.replay is None:
        return checks.not_done("claim", "there is no replay to compare with")
    return check_agreement(work.claim, work.replay, work.source.tokens, work.plan.tolerance)


def prove(work: Audit) -> Callable[[], Finding]:
    """Have rows committed before their tokens are told; returns what judges the replay's charges by them, once they
    are there."""
    claim, source, settings = work.claim, work.source, work.claim.recipe.evaluate
    stretches, *drawn = streamed.draw(work.spans, settings, work.plan.streamed_tokens, drawn_seed(work))
    vocab_size = claim.header["vocab_size"]

    def told(fraction: float) -> None:
        work.progress(f"rows before their tokens: {fraction:.0%}")

    try:
        committed, outcome, seconds = streamed.commit(
            work.done_by.predictor, source, stretches, [claim.artifact], vocab_size, told
        )
    except WorkError as error:
        finding = checks.not_done("streamed", str(error))
        return lambda: finding

    def judge() -> Finding:
        if work.replay is None:
            return checks.not_done("streamed", "there is no replay whose charges could be compared")
        charged_N = np.concatenate([[math.nan], *work.charges])
        if len(charged_N) != source.tokens:
            return checks.not_done("streamed", f"the replay told {len(charged_N) - 1:,} charges")
        lines = work.replay["lines"]
        return streamed.check(committed, charged_N, lines, claim.name, settings.dtype, drawn, outcome.confined, seconds)

    return judge


def ranks_agree(work: Audit) -> None:
    """Score the first chunks with two ranks and compare with the replay, which one scored."""
    replay = work.replay
    if replay is None:
        work.find(checks.not_done("world-size", "there is no replay to compare with"))
        return
    source = replace(
        work.source,
        tokens=work.spans[:RANK_CHUNKS][-1].stop,
        threads=max(1, work.source.threads // RANKS),
    )

    def check() -> Finding:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(RANKS) as pool:
            shared = {"source": asdict(source), "world": RANKS, "meeting": f"{folder}/meeting"}
            running = [
                pool.submit(sandbox.run, work.done_by.rank, shared | {"rank": rank}, None) for rank in range(RANKS)
            ]
            try:
                outcomes = [each.result().value for each in running]
            except WorkError as error:
                return checks.not_done("world-size", str(error))
        return checks.world_size(replay, outcomes, work.plan.tolerance)

    work.find(timed(check))


def really_coded(work: Audit, stop: int) -> Finding:
    """Take the beginning of the text through the codec, there and back in two processes."""
    if work.replay is None:
        return checks.not_done("coded", "there is no replay to compare with")
    source = replace(work.source, tokens=stop)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coded"
        try:
            written = sandbox.run(work.done_by.coder, {"source": asdict(source)}, work.readable()).value
            file.write_bytes(base64.b64decode(written["data"]))
            given = {"artifact_path": source.artifact, "data_path": str(file), "threads": source.threads}
            back = sandbox.run(work.done_by.decoder, given, [work.claim.artifact, file]).value
        except WorkError as error:
            return checks.not_done("coded", str(error))
    sha256 = hashlib.sha256(source.read().astype("<u2").tobytes()).hexdigest()
    return checks.coded(written, back, stop, sha256, reported_bits(work, stop))


def reported_bits(work: Audit, stop: int) -> float:
    """Count the bits that the record reports for the targets before `stop`: its trace's for whole chunks, and for the
    beginning of a chunk the same share of them as in the replay."""
    claim, replay = work.claim, work.replay
    assert replay is not None
    total, mine = 0.0, 0.0
    for chunk, line, replayed in zip(work.spans, claim.trace, replay["lines"], strict=False):
        if chunk.start < stop:
            total += line["bits"][claim.name]
            mine += replayed["bits"][claim.name]
    return total * (replay["marks"][str(stop)] / math.log(2) / mine)


def write(work: Audit) -> None:
    """Write audit.md, audit.json and, for the score, the table's columns; raises RecipeError where that fails."""
    claim, findings, code = work.claim, work.findings, own_code.digests()
    figures = {finding.name: finding.figures for finding in findings}
    mass = work.replay["published_mass"] if work.replay else math.nan
    bad, worth = failed(findings), told(work.plan, claim.dataset.valid_tokens)
    audited_at = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {
        f"bpb_{claim.name}": claim.score,
        "tokens audited": f"{work.source.tokens:,} of {claim.dataset.valid_tokens:,}",
        "plan": worth,
        "artifact sha256": claim.row["artifact_sha256"],
        "validation sha256": claim.row["valid_sha256"],
        "recipe": f"{claim.row['recipe']}, configuration {claim.row['config_hash']}",
        "audited": f"{audited_at}, hedgemix {__version__}, torch {torch.__version__}, {work.source.device}, "
        f"{work.source.threads} threads, {platform.machine()}",
        "drawn with seed": str(work.plan.seed),
        "audited with": ", ".join(f"{name} {value}" for name, value in code.items()),
    }
    title = f"Audit of {claim.row['record']}, seed {claim.seed}: bpb_{claim.name} {claim.score:.4f}"
    report = markdown(title, facts, findings).encode()
    verdict = {
        "audited": False if bad else True if worth == FULL else None,
        "audit_plan": worth,
        "passed": not bad,
        "failed": bad,
        "log_sum": figures["streamed"].get("largest_sum_off_1"),
        "published_log_sum": math.log(mass) if mass > 0 else None,
        "coded_bits": figures["coded"].get("coded_bits"),
        "reported_bits": figures["coded"].get("reported_bits"),
        "tokens": work.source.tokens,
        "claim": claim.name,
        "seed": claim.seed,
        "config_hash": config_hash(claim.recipe),
        "code_sha256": script.sha256(),
        "artifact_sha256": sha256_of(claim.artifact),
        "artifact_bytes": claim.artifact.stat().st_size,
        "result": claim.result,
        "plan": asdict(work.plan),
        "source": asdict(work.source),
        "report_sha256": hashlib.sha256(report).hexdigest(),
        "hedgemix_version": __version__,
        "torch_version": torch.__version__,
        "audited_with": code,
        "audited_at": audited_at,
        "findings": [asdict(finding) for finding in findings],
    }
    try:
        with replacing(claim.path(".md")) as file:
            file.write(report)
        write_json(claim.path(".json"), verdict)
        if claim.name == "final":
            write_columns(claim.table, claim.seed, columns(verdict))
    except OSError as error:
        raise RecipeError(f"the findings cannot be kept: {error}; copy the runs folder to where it can be") from None
