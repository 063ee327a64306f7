from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hedgemix import cli
from hedgemix.config import DataConfig, RecipeError, to_dict
from hedgemix.data import case_markers, corpus, dataset, memory, overlap, shards, text_set, tokenizer
from hedgemix.data.dataset import train_stream as train_of
from hedgemix.data.dataset import valid_stream as valid_of
from hedgemix.runtime.files import write_json
from support import text_data
from support.text_data import documents


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    texts = [*documents(), "odd \u2581 \x00 text"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataConfig(source="text", paths=(str(path),), vocab_size=512, valid_fraction=0.1)


@pytest.fixture(scope="module")
def made(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    return dataset.prepare(config, tmp_path_factory.mktemp("data"), silent)


def shards_config(made: dataset.Dataset, **changes: object) -> DataConfig:
    folder = str(Path(made.tokenizer).parent)
    config = DataConfig(source="shards", shards_dir=folder, tokenizer=made.tokenizer, vocab_size=512)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_shards_hold_the_documents(config: DataConfig, made: dataset.Dataset) -> None:
    train, valid = map(list, corpus.split(corpus.collect(config), config.valid_fraction))
    whole = sum(len(text.encode()) for text in train)
    train = list(overlap.without_repeats(train, overlap.of_documents(valid, 8), 8))
    assert made.train_bytes == sum(len(text.encode()) for text in train)
    assert made.train_bytes_removed == whole - made.train_bytes > 0
    assert (made.valid_overlap_share, made.overlap_window) == (0.0, "8 words")
    processor = tokenizer.load(made.tokenizer)
    for stream, texts in ((dataset.train_stream(made), train), (dataset.valid_stream(made), valid)):
        tokens = stream.read(0, len(stream))
        assert tokens.tolist() == [token for text in texts for token in tokenizer.encode(processor, text)]
    assert made.valid_bytes == sum(len(text.encode()) for text in valid)
    assert made.valid_sha256 == hashlib.sha256(tokens[1:].astype("<u2").tobytes()).hexdigest()
    assert made.tokenizer_sha256 == hashlib.sha256(Path(made.tokenizer).read_bytes()).hexdigest()
    assert (made.train_documents, made.valid_documents) == (len(train), len(valid))
    assert (made.train_tokens, made.valid_tokens) == (len(dataset.train_stream(made)), len(tokens))


def test_markers_for_capitals_change_tokens_and_no_bytes(
    config: DataConfig, made: dataset.Dataset, tmp_path: Path
) -> None:
    marked_config = dataclasses.replace(config, case_markers=True, memory_bytes=10_000)
    found = dataset.prepare(marked_config, tmp_path, silent)
    assert found.valid_bytes == made.valid_bytes and found.train_bytes == made.train_bytes
    assert found.tokenizer_sha256 != made.tokenizer_sha256
    p, stream = tokenizer.load(found.tokenizer), dataset.valid_stream(found)
    assert set(case_markers.of(p)) < set(stream.read(0, len(stream)).tolist())
    _, valid = corpus.split(corpus.collect(config), config.valid_fraction)
    assert tokenizer.decode(p, stream.read(0, len(stream))) == b"".join(text.encode() for text in valid)
    said: list[str] = []
    dataset.save(found, tmp_path)
    of_shards = dataset.prepare(shards_config(found, shards_dir=str(tmp_path)), tmp_path / "other", said.append)
    assert (of_shards.valid_bytes, of_shards.valid_sha256) == (found.valid_bytes, found.valid_sha256)
    assert not any("every text" in line or "BOS" in line for line in said)


def test_no_long_call_keeps_the_main_thread_from_a_signal(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, threading.Thread] = {}
    for module, name in ((tokenizer, "_trained"), (tokenizer, "encode_batch"), (memory, "compress")):
        slow = getattr(module, name)

        def called(*given: object, name: str = name, slow: Callable[..., object] = slow) -> object:
            where[name] = threading.current_thread()
            return slow(*given)

        monkeypatch.setattr(module, name, called)
    dataset.prepare(dataclasses.replace(config, memory_bytes=10_000), tmp_path, silent)
    assert len(where) == 3 and threading.main_thread() not in where.values()


def test_preparing_again_gives_the_same(config: DataConfig, made: dataset.Dataset, tmp_path: Path) -> None:
    made_before = dataclasses.replace(made, train_shards=(*made.train_shards, "train_000007.bin"))
    (tmp_path / "train_000007.bin").write_bytes(b"left from another time")
    write_json(tmp_path / "dataset.json", to_dict(made_before))
    again = dataset.prepare(config, tmp_path, silent)
    names = ("train_shards", "valid_shards", "tokenizer")
    for name, value in dataclasses.asdict(again).items():
        if name not in names:
            assert value == getattr(made, name), name
    names = ["tokenizer.model", "train_000000.bin", "val_000000.bin"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["begun.json", *names]
    dataset.save(again, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["dataset.json", *names]


def test_training_text_is_cut_into_shards(
    config: DataConfig, made: dataset.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_set, "SHARD_TOKENS", 10_000)
    monkeypatch.setattr(text_set, "BATCH_CHARACTERS", 30_000)
    cut = dataset.prepare(config, tmp_path, silent)
    sizes = [len(shards.map_shard(path)) for path in cut.train_shards]
    assert len(sizes) > 3 and set(sizes[:-1]) == {10_000} and sum(sizes) == made.train_tokens
    whole, parts = dataset.train_stream(made), dataset.train_stream(cut)
    assert np.array_equal(whole.read(0, len(whole)), parts.read(0, len(parts)))


def test_shards_in_place_are_the_same_data(made: dataset.Dataset, tmp_path: Path) -> None:
    found = dataset.prepare(shards_config(made), tmp_path, silent)
    expected = dataclasses.replace(
        made,
        source="shards",
        train_documents=0,
        text_sha256="",
        valid_overlap_share=found.valid_overlap_share,
        overlap_window="13 tokens",
        train_bytes=None,
        train_bytes_removed=0,
    )
    assert found == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, 1000])
def test_overlap_of_others_shards_is_measured_and_said(made: dataset.Dataset, tmp_path: Path, limit: int) -> None:
    lines: list[str] = []
    found = dataset.prepare(shards_config(made, max_valid_tokens=limit), tmp_path, lines.append)
    train, valid = (stream(found).read(0, len(stream(found))).tolist() for stream in (train_of, valid_of))
    known = {tuple(train[at : at + 13]) for at in range(len(train) - 12)}
    seen = [tuple(valid[at : at + 13]) in known for at in range(len(valid) - 12)]
    assert found.valid_overlap_share == sum(seen) / len(seen) > 0
    assert any(f"{sum(seen) / len(seen):.2%} of the validation text's windows of 13 tokens" in line for line in lines)


def test_repeats_are_left_out_unless_the_field_is_0(config: DataConfig, made: dataset.Dataset, tmp_path: Path) -> None:
    lines: list[str] = []
    off = dataset.prepare(dataclasses.replace(config, overlap_words=0), tmp_path, lines.append)
    train, valid = map(list, corpus.split(corpus.collect(config), config.valid_fraction))
    share = overlap.share_in_documents(overlap.of_documents(valid, 8), train, 8)
    assert off.valid_overlap_share == share > 0.05 and off.overlap_window == "8 words"
    assert (off.train_documents, off.train_bytes_removed) == (len(train), 0)
    assert off.train_bytes == made.train_bytes + made.train_bytes_removed
    assert any(f"{share:.2%}" in line and "data.overlap_words is 0" in line for line in lines)


def test_training_text_that_only_repeats(config: DataConfig, tmp_path: Path) -> None:
    same = [f"{'The one sentence that everybody writes here, again and again.'}\n\n{n}" for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text.replace(chr(10), " ")}) for text in same))
    with pytest.raises(RecipeError, match="data.overlap_words 8: every training document repeats"):
        dataset.prepare(dataclasses.replace(config, paths=(str(tmp_path / "a.jsonl"),)), tmp_path, silent)


def test_a_folder_of_an_older_version_is_read(made: dataset.Dataset, tmp_path: Path) -> None:
    dataset.save(made, tmp_path)
    old = json.loads((tmp_path / "dataset.json").read_text())
    for name in ("valid_overlap_share", "overlap_window", "train_bytes", "train_bytes_removed"):
        del old[name]
    (tmp_path / "dataset.json").write_text(json.dumps(old))
    found = dataset.load(tmp_path)
    assert (found.valid_overlap_share, found.overlap_window, found.train_bytes_removed) == (None, "", None)
    assert found.valid_sha256 == made.valid_sha256


@pytest.mark.parametrize("limit", [2, 1000])
def test_validation_is_cut_to_its_limit(made: dataset.Dataset, tmp_path: Path, limit: int) -> None:
    found = dataset.prepare(shards_config(made, max_valid_tokens=limit), tmp_path, silent)
    tokens = dataset.valid_stream(made).read(0, limit)
    assert found.valid_tokens == len(dataset.valid_stream(found)) == limit
    assert found.valid_bytes == len(tokenizer.decode(tokenizer.load(made.tokenizer), tokens))
    assert found.valid_sha256 == hashlib.sha256(tokens[1:].tobytes()).hexdigest()
    assert found.valid_documents == (tokens == 1).sum()


def test_counting_in_pieces_is_counting_at_once(
    made: dataset.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "READ_TOKENS", 101)
    found = dataset.prepare(shards_config(made), tmp_path, silent)
    assert (found.valid_bytes, found.valid_sha256) == (made.valid_bytes, made.valid_sha256)


def test_a_saved_folder_can_be_moved(config: DataConfig, tmp_path: Path) -> None:
    made = dataset.prepare(config, tmp_path / "a", silent)
    dataset.save(made, tmp_path / "a")
    assert dataset.load(tmp_path / "a") == made
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = dataset.load(tmp_path / "b")
    assert len(dataset.train_stream(moved)) == made.train_tokens
    assert moved.tokenizer == str(tmp_path / "b" / "tokenizer.model")


def test_memory_is_the_beginning_of_the_training_text(
    config: DataConfig, made: dataset.Dataset, tmp_path: Path
) -> None:
    """From documents and from shards, which keep their tokens; nothing else of the data changes."""
    assert dataset.read_memory(made) is None and len(dataset.memory_tokens(made)) == 0
    remembering = dataclasses.replace(config, memory_bytes=4_000)
    found = dataset.prepare(remembering, tmp_path / "a", silent)
    dataset.save(found, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = dataset.load(tmp_path / "b")
    tokens = dataset.memory_tokens(found)
    assert 1_000 < len(tokens) == found.memory_tokens and found.memory_bytes <= 4_000
    assert tokens.tolist() == dataset.train_stream(found).read(0, len(tokens)).tolist()
    changed = {name for name, value in dataclasses.asdict(made).items() if getattr(found, name) != value}
    places = {"folder", "train_shards", "valid_shards", "tokenizer"}
    assert changed - places == {name for name in dataclasses.asdict(made) if name.startswith("memory")}
    of_shards = dataset.prepare(shards_config(found, memory_bytes=4_000), tmp_path / "c", silent)
    assert of_shards.memory_sha256 == found.memory_sha256
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"memory.ppmd", "begun.json"}


def test_a_memory_that_is_not_the_datasets_is_refused(config: DataConfig, tmp_path: Path) -> None:
    remembering = dataclasses.replace(config, memory_bytes=4_000)
    dataset.save(dataset.prepare(remembering, tmp_path, silent), tmp_path)
    found = dataset.load(tmp_path)
    dataset.check_places(found, remembering)
    with pytest.raises(RecipeError, match="which is not its memory"):
        dataset.check_places(dataclasses.replace(found, memory=found.tokenizer), remembering)
    Path(found.memory).write_bytes(b"another")
    with pytest.raises(RecipeError, match=r"memory.ppmd is not the file that dataset.json names"):
        dataset.read_memory(found)


def test_a_folder_without_a_data_set(tmp_path: Path) -> None:
    for content in (None, "{", '{"colour": 1}', "{}"):
        if content is not None:
            (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(RecipeError, match="dataset.json cannot be read.*prepare"):
            dataset.load(tmp_path)


def test_hash_of_training_sees_its_edges_and_size(made: dataset.Dataset, tmp_path: Path) -> None:
    for name in ("train_000000.bin", "val_000000.bin"):
        shutil.copy(Path(made.tokenizer).parent / name, tmp_path / name)
    tokens = np.array(shards.map_shard(tmp_path / "train_000000.bin"))
    seen = {made.train_sha256}
    for place in (0, len(tokens) - 1):
        changed = tokens.copy()
        changed[place] = 77
        shards.write_shard(tmp_path / "train_000000.bin", changed)
        found = dataset.prepare(shards_config(made, shards_dir=str(tmp_path)), tmp_path, silent)
        seen.add(found.train_sha256)
        assert found.valid_sha256 == made.valid_sha256
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 1024}, "data.vocab_size is 1024, but .* has 512 pieces"),
        ({"tokenizer": "/none.model"}, "data.tokenizer: /none.model cannot be read"),
        ({"shards_dir": "/none"}, "data.shards_dir: '/none' is not a folder.*hedgemix download"),
        ({"shards_dir": ""}, "data.shards_dir"),
        ({"shards_dir": "EMPTY"}, r"has no \*_train_\*\.bin"),
        ({"shards_dir": "EMPTY", "tokenizer": ""}, r"has 0 \.model files"),
        ({"max_valid_tokens": -1}, "data.max_valid_tokens"),
    ],
)
def test_shards_that_cannot_be_used(
    made: dataset.Dataset, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    if changes.get("shards_dir") == "EMPTY":
        changes = {**changes, "shards_dir": str(tmp_path)}
    with pytest.raises(RecipeError, match=reason):
        dataset.prepare(shards_config(made, **changes), tmp_path, silent)


def test_what_a_tokenizer_gets_wrong_is_refused_or_told(made: dataset.Dataset, tmp_path: Path) -> None:
    """Spaces of three bytes; unknown tokens, which count none; documents without BOS, whose first space would count."""
    for name, tokens in (("train", np.arange(200)), ("val", np.array([5, 3, 6, 3, 7]))):
        shards.write_shard(tmp_path / f"{name}_0.bin", tokens)
    (tmp_path / "a.model").write_bytes(text_data.without_spaces())
    config = DataConfig(source="shards", shards_dir=str(tmp_path), vocab_size=266)
    with pytest.raises(RecipeError, match=r"a.model cannot be scored by the byte: .* counted as 32 bytes, and has 24"):
        dataset.prepare(config, tmp_path, silent)
    shutil.copy(made.tokenizer, tmp_path / "a.model")
    (tmp_path / "other.bin").write_text("other")
    lines: list[str] = []
    dataset.prepare(dataclasses.replace(config, vocab_size=512), tmp_path, lines.append)
    assert lines[0] == "shards: 1 for training and 1 for validation are sound; 1 other .bin files there are passed over"
    assert any(line.startswith("2 of the validation tokens are unknown") for line in lines)
    assert any(line.startswith("no BOS is in the validation text") for line in lines)
    assert not any("changes or loses" in line for line in lines)


def test_the_only_tokenizer_beside_the_shards_is_theirs(made: dataset.Dataset, tmp_path: Path) -> None:
    found = dataset.prepare(shards_config(made, tokenizer=""), tmp_path, silent)
    assert found.tokenizer == made.tokenizer and found.valid_sha256 == made.valid_sha256


def test_too_little_text_is_said_before_the_run(made: dataset.Dataset) -> None:
    dataset.check(made, made.train_tokens, made.valid_tokens)
    with pytest.raises(RecipeError, match=r"data\.paths gave .* training tokens .*lower train\.batch_tokens"):
        dataset.check(made, made.train_tokens + 1, 1)
    with pytest.raises(RecipeError, match=r"data\.paths gave .* validation tokens .*data\.valid_fraction"):
        dataset.check(made, 1, made.valid_tokens + 1)


def test_tokens_that_lose_text_are_a_bug(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda *given: [tokens[:-1] for tokens in whole(*given)])
    with pytest.raises(RuntimeError, match="tokenizer bug"):
        dataset.prepare(config, tmp_path, silent)


def test_the_command_writes_the_data_set_and_says_errors_in_a_line(
    config: DataConfig,
    made: dataset.Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["hedgemix", "prepare", "--folder", str(tmp_path / "out"), "--source", "text", "--vocab-size", "512"]
    arguments += ["--valid-fraction", "0.1", "--paths"]
    monkeypatch.setattr("sys.argv", [*arguments, *config.paths])
    cli.main()
    assert dataset.load(tmp_path / "out").valid_sha256 == made.valid_sha256
    assert f"{made.valid_bytes:,}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments, "/none.txt"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: data.paths: /none.txt does not exist; name a file or folder that does\n"
