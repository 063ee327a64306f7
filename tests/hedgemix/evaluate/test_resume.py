"""An evaluation that is killed, at any chunk and by any means, ends with the numbers of one that was not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException

from hedgemix.artifact import format as artifact
from hedgemix.config import EvaluateConfig, TTTConfig
from hedgemix.evaluate.resume import Restart
from hedgemix.evaluate.trace_file import Lines
from hedgemix.experts.registry import EXPERTS
from hedgemix.mixers import published
from hedgemix.runtime.files import DamagedFileError, read_json, write_json
from support import rank_processes, tiny_artifact
from support.tiny_artifact import Case

THREE = tiny_artifact.CONFIG, tiny_artifact.ADAPTIVE, tiny_artifact.CACHE_OVER_TRAINED
CONFIG, ADAPTIVE, CACHE_OVER_TRAINED = (replace(config, chunk_tokens=200) for config in THREE)
NORMALISED = replace(CONFIG.ttt, normalise=True, decay=0.05, context_tokens=8)
NO_POLYAK = replace(CONFIG, ttt=replace(NORMALISED, polyak=0.0, last_blocks=0))
NO_TTT = replace(CONFIG, ttt=TTTConfig(enabled=False))
SLIDING = replace(NO_TTT, order="sliding")
FURTHER = replace(CONFIG, mixer=replace(CONFIG.mixer, experts=tuple(EXPERTS)))
CONFIGS: dict[str, EvaluateConfig] = {
    "polyak": CONFIG,
    "no_polyak": NO_POLYAK,
    "no_ttt": NO_TTT,
    "sliding": replace(CONFIG, order="sliding"),
    "sliding_no_ttt": SLIDING,
    "further_experts": FURTHER,
    "adaptive": ADAPTIVE,
    "cache_over_trained": CACHE_OVER_TRAINED,
}
CHUNKS = 5


def small_rule(patch: pytest.MonkeyPatch) -> None:
    """The published rule with few buckets, its counts used from the second chunk on."""
    patch.setattr(published, "start", partial(published.start, buckets=64, warm_tokens=100))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small_rule(patch)
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_artifact.make(tmp_path_factory.mktemp("resume"), texts=3)


class Killed(BaseException):
    """What nothing in the library catches."""


def killing(after: int, heard: list[dict[str, Any]] | None = None) -> Callable[[dict[str, Any]], None]:
    """A log that ends the evaluation once it was told of so many chunks."""
    heard = [] if heard is None else heard

    def log(record: dict[str, Any]) -> None:
        heard.append(record)
        if len(heard) == after:
            raise Killed

    return log


def score(case: Case, folder: Path, config: EvaluateConfig = NO_TTT, log: Any = None, **options: Any) -> Any:
    """One start, with a checkpoint after every chunk unless options say otherwise."""
    start = Restart(folder, **{"checkpoint_seconds": 0.0} | options)
    return case.score(config, trace=folder / "trace.jsonl", log=log or (lambda record: None), start=start)


def numbers(result: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if not name.endswith("_seconds")}


def trace(folder: Path) -> list[dict[str, Any]]:
    """Every line, without its seconds."""
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def chunks_scored(case: Case, folder: Path, **options: Any) -> int:
    """How many chunks another start scores; its numbers must be those of an undisturbed one."""
    heard: list[dict[str, Any]] = []
    result = score(case, folder, log=heard.append, **options)
    assert (numbers(result), trace(folder)) == UNDISTURBED["no_ttt"]
    return len(heard)


UNDISTURBED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}


@pytest.fixture(scope="module", autouse=True)
def undisturbed(case: Case) -> None:
    """Of every configuration: numbers and trace of an evaluation that keeps nothing."""
    for name, config in CONFIGS.items():
        path = case.folder / name / "trace.jsonl"
        UNDISTURBED[name] = numbers(case.score(config, trace=path)), trace(path.parent)
        assert [line["chunk"] for line in UNDISTURBED[name][1]] == list(range(CHUNKS))


@pytest.mark.parametrize(
    "name", ["polyak", "no_polyak", "sliding_no_ttt", "further_experts", "adaptive", "cache_over_trained"]
)
def test_killed_after_every_chunk_it_gives_the_same_bits(case: Case, tmp_path: Path, name: str) -> None:
    for _ in range(CHUNKS):
        with pytest.raises(Killed):
            score(case, tmp_path, CONFIGS[name], killing(1))
    result = score(case, tmp_path, CONFIGS[name], killing(1))  # nothing is left to score
    assert (numbers(result), trace(tmp_path)) == UNDISTURBED[name]
    assert read_json(tmp_path / "clock.json")["starts"] == CHUNKS + 1


@pytest.mark.parametrize(("name", "noticed"), [("no_ttt", 1), ("sliding", 2)])
def test_chunks_after_the_checkpoint_are_scored_again(case: Case, tmp_path: Path, name: str, noticed: int) -> None:
    """The notice stays: one checkpoint is written. What the trace has beyond it is replaced."""
    asked = iter([False] * (noticed - 1) + [True] * CHUNKS)
    with pytest.raises(Killed):
        score(case, tmp_path, CONFIGS[name], killing(3), checkpoint_seconds=1e9, notice=lambda: next(asked))
    assert [path.name for path in tmp_path.glob("*.pt")] == [f"checkpoint-{noticed}.pt"]
    with open(tmp_path / "trace.jsonl", "a") as file:
        file.write('{"chunk": 3, "tok')
    heard: list[dict[str, Any]] = []
    result = score(case, tmp_path, CONFIGS[name], heard.append)
    assert (numbers(result), trace(tmp_path)) == UNDISTURBED[name]
    assert len(heard) == CHUNKS - noticed


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def killed(case: Case, tmp_path: Path) -> Path:
    """The folder of an evaluation that was killed after three chunks."""
    with pytest.raises(Killed):
        score(case, tmp_path, log=killing(3))
    assert {path.name for path in tmp_path.glob("*.pt")} == {"checkpoint-2.pt", "checkpoint-3.pt"}
    return tmp_path


def test_a_damaged_checkpoint_costs_the_chunks_since_the_one_before(case: Case, killed: Path) -> None:
    damage(killed / "checkpoint-3.pt")
    assert chunks_scored(case, killed) == CHUNKS - 2


def test_without_a_sound_checkpoint_it_begins_anew(case: Case, killed: Path) -> None:
    damage(killed / "checkpoint-2.pt")
    damage(killed / "checkpoint-3.pt")
    assert chunks_scored(case, killed) == CHUNKS
    assert chunks_scored(case, killed) == 0


def test_a_trace_without_the_chunks_begins_anew(case: Case, killed: Path) -> None:
    lines = (killed / "trace.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "trace.jsonl").write_bytes(lines[0] + lines[1])
    assert chunks_scored(case, killed) == CHUNKS


LINES = [b'{"chunk": 0}\n', b'{"chunk": 1}\n', b'{"chunk": 2}\n']


@pytest.mark.parametrize(
    "found",
    [
        LINES[:1],
        [LINES[0], LINES[1][:-1]],
        [LINES[0], b"\xff" + LINES[1]],
        LINES[1:],
        [LINES[0], b"1\n"],
        [b"\n"],
        None,
    ],
)
def test_lines_are_taken_up_only_when_all_are_there(tmp_path: Path, found: list[bytes] | None) -> None:
    path = tmp_path / "trace.jsonl"
    if found is not None:
        path.write_bytes(b"".join(found))
    lines = Lines(path)
    assert not lines.take_up(2)
    lines.add({"chunk": 0})
    assert path.read_bytes() == LINES[0]


@pytest.mark.parametrize("more", [b"", LINES[2], LINES[2][:5], b"\xff\n\n"])
def test_lines_go_on_behind_those_taken_up(tmp_path: Path, more: bytes) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(LINES[0] + LINES[1] + more)
    lines = Lines(path)
    assert lines.take_up(2)
    lines.add({"chunk": 2})
    assert path.read_bytes() == b"".join(LINES)
    path.write_bytes(b"")
    with pytest.raises(OSError, match="cut short by another program"):
        lines.flush()


def test_a_checkpoint_of_something_else_is_not_taken_up(case: Case, killed: Path, tmp_path_factory: Any) -> None:
    """Another configuration, then another artifact, then another text; each leaves the next a checkpoint too many."""
    heard: list[dict[str, Any]] = []
    result = score(case, killed, SLIDING, heard.append)
    assert (numbers(result), trace(killed)) == UNDISTURBED["sliding_no_ttt"] and len(heard) == CHUNKS
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(case.folder / "counts", other / "counts")
    found = artifact.read(case.artifact)
    artifact.write(other / "model.hmx", found.header | {"seed": 1}, found.tokenizer, found.tensors, 3)
    heard = []
    again = score(replace(case, folder=other), killed, SLIDING, heard.append)
    assert numbers(again) == numbers(result) and len(heard) == CHUNKS
    text = replace(case, tokens=case.tokens[::-1].copy())
    with pytest.raises(ValueError, match="counts another text"):
        score(text, killed, SLIDING)
    assert not list(killed.glob("*.pt"))


class Seconds:
    """A clock's clock, which only a log moves on: by ten seconds a chunk."""

    def __init__(self, kill_after: int) -> None:
        self.at, self.left = 1000.0, kill_after

    def __call__(self) -> float:
        return self.at

    def log(self, record: dict[str, Any]) -> None:
        self.at += 10
        self.left -= 1
        if not self.left:
            raise Killed


def test_seconds_count_over_starts_and_what_was_lost_stays_used(case: Case, tmp_path: Path) -> None:
    """A checkpoint at 20 s, killed at 30 s, the other two chunks in 20 s; then anew, with no checkpoint left."""
    seconds = Seconds(kill_after=3)
    with pytest.raises(Killed):
        score(case, tmp_path, CONFIG, seconds.log, now=seconds, checkpoint_seconds=15)
    seconds = Seconds(kill_after=-1)
    result = score(case, tmp_path, CONFIG, seconds.log, now=seconds, checkpoint_seconds=15)
    noted = {"elapsed_seconds": 50.0, "starts": 2, "discarded_seconds": 0.0, "lost_seconds": 10.0}
    assert result.evaluate_seconds == 50 and read_json(tmp_path / "clock.json") == noted
    phases = [json.loads(line)["seconds"] for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    for phase in ("scoring", "mixing", "ttt"):
        assert sum(each[phase] for each in phases) == pytest.approx(getattr(result, f"{phase}_seconds"))
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    seconds = Seconds(kill_after=-1)
    assert score(case, tmp_path, CONFIG, seconds.log, now=seconds).evaluate_seconds == 50
    noted |= {"starts": 3, "discarded_seconds": 50.0, "lost_seconds": 50.0}
    assert read_json(tmp_path / "clock.json") == noted


def test_a_restart_is_told_of_every_file_it_needs(case: Case, killed: Path, tmp_path: Path) -> None:
    """Killed again, on another machine: nothing but what `kept` was told of is there, as it was then."""
    copy = tmp_path / "copy"
    copy.mkdir()

    def keep(path: Path) -> None:
        if path.exists():
            shutil.copy(path, copy)

    with pytest.raises(Killed):
        score(case, killed, log=killing(1), kept=keep)
    assert {path.name for path in copy.iterdir()} == {"checkpoint-4.pt", "checkpoint.json", "clock.json", "trace.jsonl"}
    assert chunks_scored(case, copy) == 1


class Full:
    """Storage that refuses the writes of the trace whose numbers are given, after half a line."""

    def __init__(self, refused: set[int], patch: pytest.MonkeyPatch) -> None:
        self.refused, self.writes, self.flush = refused, 0, Lines.flush
        patch.setattr(Lines, "flush", lambda lines, sync=False: self.write(lines, sync))

    def write(self, lines: Lines, sync: bool) -> None:
        self.writes += 1
        if self.writes - 1 in self.refused:
            with open(lines.path, "ab") as file:
                file.write(lines.waiting[: len(lines.waiting) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        self.flush(lines, sync)


def test_a_disk_that_is_full_for_a_moment_costs_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Full({1, 2, 3}, monkeypatch)
    assert chunks_scored(case, tmp_path, checkpoint_seconds=1e9) == CHUNKS


def test_a_disk_that_stays_full_leaves_no_result_and_no_checkpoint_without_its_lines(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Full(set(range(2, 100)), patch)  # chunk 0 and its checkpoint are written
        with pytest.raises(OSError, match="No space left"):
            score(case, tmp_path)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint-1.pt"]
    assert chunks_scored(case, tmp_path) == CHUNKS - 1


def kinds(state: Any) -> set[type]:
    if isinstance(state, dict):
        return {dict, *(type(key) for key in state)}.union(*map(kinds, state.values()))
    return {list}.union(*map(kinds, state)) if isinstance(state, list) else {type(state)}


def test_a_state_holds_plain_things_and_no_counts(case: Case) -> None:
    work = case.begin()
    for number in range(2):
        work.run_chunk(number, work.chunks[number])
    state = work.state_dict()
    assert kinds(state) <= {dict, list, str, int, float, Tensor}
    assert work.adapter is not None
    assert len(state["adapter"]["averages"]) == len(state["adapter"]["trained"]) == len(work.adapter.parameters)
    largest = max(parameter.numel() for parameter in work.adapter.parameters.values())
    (sets,) = state["mixer"]["sets"]
    tensors = [sets[name] for name in ("hedge", "ensemble")] + list(sets["blend"].values())
    assert max(tensor.numel() for tensor in tensors) < max(largest, 20_000)


# Two ranks.


def rank_work(rank: int, case: Case, folder: Path, life: str) -> None:
    torch.set_num_threads(1)
    meeting, limit = f"file://{folder}/meeting_{life}", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    with pytest.MonkeyPatch.context() as patch:
        small_rule(patch)
        if life == "first":
            whole = case.score(NO_POLYAK, trace=folder / "whole" / "trace.jsonl")
            write_json(folder / f"whole{rank}.json", numbers(whole))
            start = Restart(folder / "killed", 0.0)
            log = die_after(2, start) if rank == 0 else lambda record: None
            case.score(NO_POLYAK, trace=folder / "killed" / "trace.jsonl", log=log, start=start)
        else:
            mine = folder / "killed" if rank == 0 else folder / "elsewhere"
            with pytest.raises(DamagedFileError, match="2 chunks" if rank else "another|waits"):
                score(case, mine, NO_POLYAK)
            heard: list[dict[str, Any]] = []
            result = score(case, folder / "killed", NO_POLYAK, heard.append)
            write_json(folder / f"again{rank}.json", numbers(result) | {"chunks": len(heard)})
    dist.destroy_process_group()


def die_after(chunks: int, start: Restart) -> Callable[[dict[str, Any]], None]:
    """A log that kills its process after so many chunks, once their checkpoint is on disk."""
    heard = []

    def log(record: dict[str, Any]) -> None:
        heard.append(record)
        if len(heard) == chunks:
            start.checkpoints.close()
            os.kill(os.getpid(), signal.SIGKILL)

    return log


def test_two_ranks_go_on_after_one_was_killed(case: Case, tmp_path: Path) -> None:
    """To the bit with two ranks again; with one to the 1e-6 that ranks agree to."""
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        rank_processes.run(rank_work, (case, tmp_path, "first"))
    whole = read_json(tmp_path / "whole0.json")
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "killed", alone)
    heard: list[dict[str, Any]] = []
    one = numbers(score(case, alone, NO_POLYAK, heard.append))
    assert len(heard) == CHUNKS - 2
    for name in set(one) - {"expert_names", "ensemble_names"}:
        exact = name in ("bpb_quantized", "bpb_mixed", "scored_tokens", "scored_bytes")
        wanted = pytest.approx(whole[name], rel=1e-4 if "weights" in name else 1e-6, abs=1e-6)
        assert one[name] == (whole[name] if exact else wanted), name

    rank_processes.run(rank_work, (case, tmp_path, "second"))
    for rank in range(2):
        assert read_json(tmp_path / f"again{rank}.json") == whole | {"chunks": CHUNKS - 2}
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
