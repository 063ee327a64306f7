"""What stands behind a record's score, section by section, from the files of its steps.

A file that is not there (a step that is not done, a folder that was not copied as a whole) is named in its section; the
rest of the report is written all the same.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hedgemix.artifact import format as artifact
from hedgemix.artifact import inspection
from hedgemix.artifact.format import ArtifactError, Parts
from hedgemix.audit.findings import number
from hedgemix.data import tokenizer
from hedgemix.evaluate.breakdown import DOCUMENTS, TOKENS
from hedgemix.runtime.layout import ABLATION, AUDIT, LOG, RECIPE, TRACE
from pipeline.analysis import significance
from pipeline.analysis.records import Record
from pipeline.report import figures
from pipeline.report.page import Plot, Section, Table

STAGES = {
    "full precision": "bpb_full",
    "quantized": "bpb_quantized",
    "mixed": "bpb_mixed",
    "TTT, not mixed": "bpb_ttt",
    "final: all": "bpb_final",
}
RUNNING = {
    "quantized": "quantized",
    "TTT": "ttt",
    "Hedge": "hedge",
    "logistic": "logistic",
    "mixed": "mixed",
    "final": "final",
    "published*": "published",
}
SAVINGS = {"mixture": ("quantized", "mixed"), "TTT": ("quantized", "ttt"), "all": ("quantized", "final")}
"""What saves: from which stage of the tally to which."""
RANKS = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
MOST_BARS = 14
SHOWN_TOKENS = 8
MISSING = "{} of seed {} is not there: copy the runs folder as a whole, or finish the record."
Row = dict[str, Any]


def ladder(record: Record) -> Section:
    """Compare the stages: full precision -> quantized -> TTT, mixed -> final."""
    stages = {name: [row[column] for row in record.done if row[column] is not None] for name, column in STAGES.items()}
    found = {name: values for name, values in stages.items() if values}
    if not found:
        return Section("What each stage is worth", ["No seed has finished."])
    steps = [
        ("quantization costs", "full precision", "quantized"),
        ("test-time training gains", "quantized", "TTT, not mixed"),
        ("the mixture gains", "quantized", "mixed"),
        ("cache and test-time training gain on top of the mixture", "mixed", "final: all"),
    ]
    rows = []
    for what, one, other in steps:
        if one in found and other in found:
            changes = [a - b for a, b in zip(found[one], found[other], strict=True)]
            sign = -1 if what.endswith("costs") else 1
            signed = [sign * change for change in (float(np.mean(changes)), *changes)]
            rows.append([what, *(f"{round(change, 4) + 0.0:.4f}" for change in signed)])  # + 0.0: no minus zero
    caption = "Bits per byte after each stage; a dot a seed, a bar at the mean."
    table = Table(["bits per byte", "mean", *(f"seed {row['seed']}" for row in record.done)], rows, (1,))
    return Section("What each stage is worth", [Plot("ladder", figures.ladder(found), caption), table])


def parts(record: Record) -> Section:
    """Show what each part of the mixture is worth, where it was measured: the score with it left out."""
    title = "What each part is worth"
    contents = [record.content(row, "evaluate_path", ABLATION) for row in record.done]
    found = [json.loads(content) for content in contents if content]
    if not found:
        command = f"`python benchmarks/quality/ablation.py {record.table}`"
        return Section(title, [f"Not measured. {command} scores the text with each part left out; then report again."])
    rows = []
    for label in found[0]["variants"]:
        pairs = [(seed["variants"][label], seed["default"]) for seed in found if label in seed["variants"]]
        told = significance.summary([score - default for score, default in pairs])
        interval = f"{told.low:+.4f} to {told.high:+.4f}" if told.low == told.low else ""
        rows.append([label, f"{np.mean([score for score, _ in pairs]):.4f}", f"{told.mean:+.4f}", interval])
    everything = np.mean([seed["default"] for seed in found])
    said = f"Everything: {everything:.4f} bits per byte, mean of {len(found)} seed{'s' * (len(found) > 1)}."
    heads = ["variant", "bits per byte", "difference, by seed", "95 % interval"]
    return Section(title, [said, Table(heads, rows, (2,))])


def training(record: Record) -> Section:
    """Show loss and rate of every seed, failed ones too where they left a log."""
    logs, missing = {}, []
    for row in record.rows:
        if lines := record.lines(row, "train_path", LOG):
            logs[row["seed"]] = lines
        elif row["status"] == "done":
            missing.append(MISSING.format(LOG, row["seed"]))
    if not logs:
        return Section("Training", missing or ["No seed has trained."])
    caption = "Training loss (mean of the last fiftieth of the steps) and the matrices' learning rate, by the clock."
    heads = ["seed", "steps", "tokens", "loss at the end", "ms a step", "memory, MB", "restarts", "QAT steps"]
    keys = (
        ("steps", ",.0f", 1), ("train_tokens", ",.0f", 1), ("train_loss_nats", ".4f", 1), ("ms_per_step", ".1f", 1),
        ("peak_memory_bytes", ",.0f", 1e6), ("restarts", ".0f", 1), ("qat_steps", ",.0f", 1),
    )  # fmt: skip
    rows = [
        [str(row["seed"]), *("" if row[c] is None else format(row[c] / unit, form) for c, form, unit in keys)]
        for row in record.rows
    ]
    return Section("Training", [Plot("training", figures.training(logs), caption), Table(heads, rows), *missing])


def along_text(record: Record) -> Section:
    """Show bits per byte and weights of the mixtures along the text."""
    traces = {row["seed"]: record.lines(row, "evaluate_path", TRACE) for row in record.done}
    missing = [MISSING.format(TRACE, seed) for seed, lines in traces.items() if not lines]
    sound = [lines for lines in traces.values() if lines]
    if not sound or len({len(lines) for lines in sound}) != 1:
        return Section("Along the text", missing or ["The seeds were scored in different pieces."])
    sizes = np.cumsum([line["bytes"] for line in sound[0]])
    stages = {
        name: np.array([np.cumsum([line["bits"][key] for line in lines]) / sizes for lines in sound])
        for name, key in RUNNING.items()
        if all(key in line["bits"] for lines in sound for line in lines)
    }
    row = record.done[0]
    names = {"hedge": row["expert_names"], "ensemble": row["ensemble_names"]}
    whats = {"hedge": "weights in Hedge", "ensemble": "weights in the ensemble"}
    captions = {
        "hedge": "Weights of the experts in the plain Hedge mixture after each chunk, mean over seeds.",
        "ensemble": "Weights of the neural model and the logistic mixers in the ensemble, mean over seeds.",
    }
    band = ", a band from the lowest to the highest seed" if len(sound) > 1 else ""
    caption = f"Bits per byte of the text so far, mean over seeds{band}. * no code length."
    blocks: list[Any] = [Plot("running", figures.running(stages, sizes / 1000, len(sound)), caption)]
    for key, what in whats.items():
        found = np.mean([[line["weights"][key] for line in lines] for lines in sound], axis=0)
        drawn = figures.weights(dict(zip(names[key], found.T, strict=True)), sizes / 1000, what)
        blocks.append(Plot(f"weights-{key}", drawn, captions[key]))
    return Section("Along the text", [*blocks, *missing])


def gains_and_losses(record: Record) -> Section:
    """Show where the mixture and test-time training helped and hurt: by token rank, by token, by document."""
    title = "Where the mixture and test-time training helped and hurt"
    tokens, documents = sum_over_seeds(record, TOKENS, "token"), sum_over_seeds(record, DOCUMENTS, "document")
    missing = []
    for row in record.done:
        if not record.lines(row, "evaluate_path", TOKENS):
            missing.append(MISSING.format(TOKENS, row["seed"]))
    if not tokens or not documents:
        return Section(title, missing or ["No seed has been evaluated."])
    ranked = sorted(tokens.values(), key=lambda line: (-line["tokens"], line["token"]))
    groups = by_rank(ranked)
    bars = {name: [saved_by(lines, name) for lines in groups.values()] for name in SAVINGS}
    helped_by = {
        name: np.array([saving(line, name) / line["bytes"] for line in documents.values() if line["bytes"]])
        for name in SAVINGS
    }
    hurt = {name: float((values < 0).mean()) for name, values in helped_by.items()}
    told = "; ".join(f"{name}: {share:.1%}" for name, share in hurt.items())
    return Section(
        title,
        [
            Plot(
                "ranks",
                figures.saved(list(groups), bars, "rank of the token by how often it occurs", "bits a token saved"),
                "Bits saved a token against the quantized model alone, by how common the token is; below 0 is worse.",
            ),
            Plot(
                "documents",
                figures.sorted_savings(helped_by),
                f"Bits per byte saved in each of {len(helped_by['all']):,} documents. Made worse: {told}.",
            ),
            "Tokens by the bits that mixture and test-time training saved in all, the most helped and the most hurt:",
            extremes(record, ranked),
            *missing,
        ],
    )


def sum_over_seeds(record: Record, name: str, key: str) -> dict[int, Row]:
    """Add up the lines of the tally over the finished seeds, by their number."""
    found: dict[int, Row] = {}
    for row in record.done:
        for line in record.lines(row, "evaluate_path", name):
            mine = found.setdefault(line[key], {key: line[key], "tokens": 0, "bytes": 0, "bits": defaultdict(float)})
            mine["tokens"] += line["tokens"]
            mine["bytes"] += line["bytes"]
            for stage, bits in line["bits"].items():
                mine["bits"][stage] += bits
    return found


def saving(line: Row, name: str) -> float:
    """Compute the bits that a stage of SAVINGS saved on a line of the tally."""
    before, after = SAVINGS[name]
    return line["bits"][before] - line["bits"][after]


def saved_by(lines: Sequence[Row], name: str) -> float:
    """Compute the bits a token that a stage of SAVINGS saved on these lines."""
    return sum(saving(line, name) for line in lines) / sum(line["tokens"] for line in lines)


def by_rank(ranked: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the lines in groups of growing size, by the ranks they cover."""
    groups, start = {}, 0
    for stop in RANKS:
        if start < len(ranked):
            last = min(stop, len(ranked))
            groups[f"{start + 1}–{last}"] = list(ranked[start:last])
        start = stop
    return groups


def extremes(record: Record, ranked: Sequence[Row]) -> Table:
    """List the tokens on which all of it saved most and least bits, with their pieces where the artifact is
    there."""
    content = record.content(record.done[0], "artifact_path")
    pieces = tokenizer.load(parts_of(content).tokenizer) if content else None
    ordered = sorted(ranked, key=lambda line: -saving(line, "all"))
    chosen = ordered[:SHOWN_TOKENS] + ordered[-SHOWN_TOKENS:] if len(ordered) > 2 * SHOWN_TOKENS else ordered
    rows = [
        [
            f"`{visible(pieces.id_to_piece(line['token']))}`" if pieces else str(line["token"]),
            f"{line['tokens'] / len(record.done):,.0f}",
            *(f"{round(saving(line, name) / len(record.done)):+,}" for name in SAVINGS),
            f"{saving(line, 'all') / line['tokens']:+.3f}",
        ]
        for line in chosen
    ]
    return Table(["token", "occurs", *(f"{name}, bits" for name in SAVINGS), "bits each"], rows, (4,))


def visible(piece: str) -> str:
    """Write a token's piece for a table: what cannot be seen is escaped."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in piece)
    return shown.replace("`", "\u02cb").replace(" ", "\u2423")


def parts_of(content: bytes) -> Parts:
    """Parse an artifact's content. Raises ArtifactError."""
    with tempfile.NamedTemporaryFile(suffix=".hmx") as file:
        file.write(content)
        file.flush()
        return artifact.read_parts(file.name)


def inside(record: Record) -> Section:
    """Show the bytes of the first finished artifact by tensor, layers of one kind together."""
    title = "Where the bytes go"
    row = next((row for row in record.done if record.content(row, "artifact_path")), None)
    if row is None:
        return Section(title, ["No artifact is there."])
    try:
        parts = parts_of(record.content(row, "artifact_path") or b"")
    except ArtifactError as error:
        return Section(title, [f"The artifact of seed {row['seed']} cannot be read: {error}"])
    kinds: dict[str, list[inspection.Organ]] = defaultdict(list)
    for organ in inspection.organs(parts):
        kinds[re.sub(r"\.\d+\.", ".*.", organ.name.removesuffix(".weight"))].append(organ)
    sizes = {name: sum(organ.n_bytes for organ in organs) for name, organs in kinds.items()}
    sizes |= {
        name: float(parts.lengths[name][1]) for name in ("tokenizer", "document", "memory") if name in parts.lengths
    }
    sizes["code"] = float(row["code_bytes"])
    ordered = sorted(sizes, key=lambda name: -sizes[name])
    drawn = {name: sizes[name] / 1000 for name in ordered[:MOST_BARS]}
    if rest := ordered[MOST_BARS:]:
        drawn[f"{len(rest)} more"] = sum(sizes[name] for name in rest) / 1000
    caption = f"Kilobytes of seed {row['seed']}'s {row['total_bytes']:,}: the artifact by tensor, and the code."
    heads = ["tensor", "how many", "weights", "bytes", "bits a weight"]
    rows = []
    for name in ordered:
        if organs := kinds.get(name):
            count = sum(organ.weights for organ in organs)
            bits = f"{8 * sizes[name] / max(1, count):.2f}"
            rows.append([name, str(len(organs)), f"{count:,}", f"{sizes[name]:,.0f}", bits])
    return Section(title, [Plot("bytes", figures.bars(drawn, "kB", ",.1f"), caption), Table(heads, rows, (3,))])


def time(record: Record) -> Section:
    """Show the seconds of every phase against the limits."""
    title = "Where the time goes"
    done, limits = record.done, record.recipe.limits
    if not done:
        return Section(title, ["No seed has finished."])
    names = [f"seed {row['seed']}" for row in done]
    rest = [
        max(0.0, row["evaluate_seconds"] - row["scoring_seconds"] - row["mixing_seconds"] - row["ttt_seconds"])
        for row in done
    ]
    trained = {
        "loop": [row["loop_seconds"] for row in done],
        "averaging, calibration": [row["calibrate_seconds"] for row in done],
    }
    evaluated = {
        "forward passes": [row["scoring_seconds"] for row in done],
        "experts and mixers": [row["mixing_seconds"] for row in done],
        "TTT": [row["ttt_seconds"] for row in done],
        "other": rest,
    }
    columns = ["warmup", "train", "quantize", "score", "counts", "evaluate", "lost"]
    rows = [[str(row["seed"]), *(f"{row[f'{name}_seconds']:,.1f}" for name in columns)] for row in done]
    blocks: list[Any] = [
        Plot(
            "time-train",
            figures.budget(trained, names, limits.train_seconds),
            f"Training, of {limits.train_seconds:g} seconds allowed.",
        ),
        Plot(
            "time-evaluate",
            figures.budget(evaluated, names, limits.evaluate_seconds),
            f"Evaluation, of {limits.evaluate_seconds:g} seconds allowed. Frozen and adapted weights each take a pass.",
        ),
        Table(["seed", *(f"{name} s" for name in columns)], rows),
    ]
    return Section(title, blocks)


def audits(record: Record) -> Section:
    """Show what the audit of each seed found."""
    rows, missing = [], []
    for row in record.done:
        content = (
            record.content(row, "evaluate_path", AUDIT) if row["audited"] is not None or row["audit_plan"] else None
        )
        if content is None:
            missing.append(str(row["seed"]))
            continue
        for finding in json.loads(content)["findings"]:
            passed = "pass" if finding["passed"] else "FAIL"
            rows.append([str(row["seed"]), finding["name"], passed, finding["headline"]])
    blocks: list[Any] = [Table(["seed", "check", "result", "figure"], rows, (2,))] if rows else []
    if missing:
        blocks.append(f"Not audited: seed {', '.join(missing)}. `hedgemix audit {record.table}` does it.")
    return Section("What the audit found", blocks or ["No seed has finished."])


def origin(record: Record) -> Section:
    """Show what would be needed to do it again."""
    names = (
        "recipe", "config_hash", "hardware", "workers", "hedgemix_version", "torch_version", "ray_version",
        "python_version", "git_commit", "git_dirty", "parameters", "valid_tokens", "valid_bytes", "valid_sha256",
        "train_set_tokens", "train_sha256", "text_sha256", "tokenizer_sha256", "started_at", "finished_at",
    )  # fmt: skip
    rows = []
    for name in names:
        values = {number(row[name]) for row in record.rows if row[name] is not None}
        rows.append([name, ", ".join(sorted(values)) or "not known"])
    artifacts = [[f"artifact_sha256 of seed {row['seed']}", row["artifact_sha256"]] for row in record.done]
    folder = Path(record.storage.where(record.folder)) / RECIPE
    return Section("To do it again", [Table(["column", "value"], rows + artifacts), f"The whole recipe: `{folder}`."])
