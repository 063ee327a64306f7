"""Coded text comes back byte for byte, from the artifact and the file alone, or is refused with a reason."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from hedgemix import cli
from hedgemix.artifact import format as artifact
from hedgemix.artifact.format import Artifact
from hedgemix.codec import text_codec
from hedgemix.codec.text_codec import CodecError, compress_tokens, decompress_tokens
from hedgemix.config import EvaluateConfig, RecipeError
from hedgemix.data import case_markers, tokenizer
from hedgemix.experts.registry import EXPERTS
from hedgemix.runtime.files import silent
from support import tiny_artifact
from support.text_data import ODD, TEXTS, documents, marked_processor, processor
from support.tiny_artifact import ADAPTIVE, CONFIG, Case


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_artifact.make(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def found(case: Case) -> Artifact:
    return artifact.read(case.artifact)


@pytest.fixture(scope="module")
def coded(found: Artifact) -> bytes:
    return compress_tokens(found, tokens_of("a short text, coded once"), CONFIG).data


def tokens_of(text: str) -> np.ndarray:
    return np.array(tokenizer.encode(processor(), text))


@pytest.mark.parametrize(
    ("config", "tokens"), [(CONFIG, 260), (ADAPTIVE, 350)], ids=["trained weights", "experts over features"]
)
def test_a_text_costs_the_bits_of_its_evaluation_and_comes_back(
    case: Case, found: Artifact, config: EvaluateConfig, tokens: int
) -> None:
    """Learned from twice or more, and more than the cache remembers."""
    config, part = replace(config, chunk_tokens=110), case.tokens[:tokens]
    made, work = compress_tokens(found, part, config), case.begin(config, part)
    for number, chunk in enumerate(work.chunks):
        work.run_chunk(number, chunk)
    reported_bits = work.result().bpb_final * work.result().scored_bytes
    assert abs(made.payload_bits - reported_bits) <= 0.001 * reported_bits + 64
    assert abs(made.ideal_bits - reported_bits) <= 1e-6 * reported_bits  # measured: 2e-8
    assert np.array_equal(decompress_tokens(found, made.data), part)


def test_a_text_with_markers_for_capitals_costs_its_bits_and_comes_back(tmp_path: Path) -> None:
    """Trained on after 110 tokens, weighed by bytes that depend on the tokens before a marker."""
    case = tiny_artifact.make(tmp_path, [documents()[1][:400]], texts=1, markers=True)
    found, config, part = artifact.read(case.artifact), replace(CONFIG, chunk_tokens=110), case.tokens[:240]
    made, work = compress_tokens(found, part, config), case.begin(config, part)
    for number, chunk in enumerate(work.chunks):
        work.run_chunk(number, chunk)
    assert marked_processor().piece_to_id(case_markers.TITLE) in part
    assert work.bytes == made.text_bytes == len(tokenizer.decode(marked_processor(), part))
    assert made.ideal_bits == pytest.approx(work.result().bpb_final * work.bytes, rel=1e-6)
    assert np.array_equal(decompress_tokens(found, made.data), part)


def test_further_experts_are_coded_and_decoded(found: Artifact, coded: bytes) -> None:
    config = replace(CONFIG, mixer=replace(CONFIG.mixer, experts=tuple(EXPERTS)))
    made = compress_tokens(found, tokens_of("a short text, coded once"), config)
    assert made.data != coded
    assert np.array_equal(decompress_tokens(found, made.data), tokens_of("a short text, coded once"))


def test_the_beginning_of_a_text_is_coded_as_in_the_whole(case: Case, found: Artifact) -> None:
    # The recipe's cosine and ramp depend on how long the text is, from the second chunk on.
    part, whole, config = case.tokens[:240], len(case.tokens), replace(CONFIG, chunk_tokens=110)
    made = compress_tokens(found, part, config, schedule_tokens=whole)
    alone = compress_tokens(found, part, config)
    assert np.array_equal(decompress_tokens(found, made.data), part)
    assert made.ideal_bits != alone.ideal_bits


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
@example("")
@example("\x00\x01\x7f\x85\u2028\ufffe")
@example("日本語 Ελληνικά עברית \U0001f9ff")
@example(ODD)
def test_every_text_comes_back(found: Artifact, text: str) -> None:
    made = compress_tokens(found, tokens_of(text), CONFIG)
    tokens = decompress_tokens(found, made.data)
    assert tokenizer.decode(processor(), tokens.tolist()) == text.encode()
    assert made.payload_bits <= made.ideal_bits + 64


@pytest.mark.parametrize("config", [CONFIG, ADAPTIVE], ids=["trained weights", "experts over features"])
def test_a_fresh_process_with_nothing_but_the_two_files_decodes(
    case: Case, tmp_path: Path, config: EvaluateConfig
) -> None:
    text = "Grüße\r\n\x00 from \u2581 somewhere else"
    source = tmp_path / "source" / "text"
    source.parent.mkdir()
    source.write_text(text, newline="")
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(case.artifact, there / "a.hmx")
    text_codec.compress(case.artifact, source, there / "coded", config, silent)
    shutil.rmtree(source.parent)
    command = [sys.executable, "-m", "hedgemix.cli", "decompress", "a.hmx", "coded", "text"]
    done = subprocess.run(command, cwd=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (there / "text").read_bytes() == text.encode()


@pytest.mark.parametrize("at", [0, 9, 20, 50, 80, 101, 120, -40, -1])
def test_an_altered_file_is_refused(found: Artifact, coded: bytes, at: int) -> None:
    altered = bytearray(coded)
    altered[at] ^= 1
    with pytest.raises(CodecError, match="not a file|format version|altered"):
        decompress_tokens(found, bytes(altered))


@pytest.mark.parametrize("length", [0, 5, 30, 107, 200, -1])
def test_a_cut_file_is_refused(found: Artifact, coded: bytes, length: int) -> None:
    with pytest.raises(CodecError, match="not a file|cut short"):
        decompress_tokens(found, coded[:length])


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({5: 0}, None),
        ({5: 9, 6: 8}, None),
        ({8: 2**31}, None),
        ({}, b"not zlib"),
        ({}, zlib.compress(b"[]")),
        ({}, zlib.compress(b"{")),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    found: Artifact, coded: bytes, fields: dict[int, int], settings: bytes | None
) -> None:
    prefix = list(text_codec.PREFIX.unpack_from(coded))
    packed = coded[text_codec.PREFIX.size : text_codec.PREFIX.size + prefix[-1]] if settings is None else settings
    prefix[-1] = len(packed)
    for place, value in fields.items():
        prefix[place] = value
    content = text_codec.PREFIX.pack(*prefix) + packed
    with pytest.raises(CodecError, match="code the text again"):
        decompress_tokens(found, content + hashlib.sha256(content).digest())


def test_tokens_that_are_none_are_refused(found: Artifact) -> None:
    for tokens in ([1, 512], [512], [1, -1], []):
        with pytest.raises(ValueError, match=r"outside 0\.\.511"):
            compress_tokens(found, np.array(tokens), CONFIG)


def test_another_artifact_is_refused(found: Artifact, coded: bytes) -> None:
    with pytest.raises(CodecError, match="give the artifact it was coded with"):
        decompress_tokens(replace(found, sha256="0" * 64), coded)


def test_other_conditions_are_refused_by_name_and_can_be_tried(
    found: Artifact, coded: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(config: EvaluateConfig) -> dict[str, object]:
        return {**conditions(config), "torch": "9.9", "dtype": "float8"}

    conditions = text_codec.conditions
    monkeypatch.setattr(text_codec, "conditions", other)
    with pytest.raises(CodecError) as refused:
        decompress_tokens(found, coded)
    assert f"torch {torch.__version__} (here 9.9); dtype float32 (here float8)" in str(refused.value)
    text = tokenizer.decode(processor(), decompress_tokens(found, coded, force=True).tolist())
    assert text == b"a short text, coded once"


def test_probabilities_that_differ_are_seen_by_the_checksum(found: Artifact, coded: bytes) -> None:
    tensors = {name: tensor * 1.001 for name, tensor in found.tensors.items()}
    with pytest.raises(CodecError, match="another text than was coded"):
        decompress_tokens(replace(found, tensors=tensors), coded)


def test_threads_change_nothing(found: Artifact, coded: bytes) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = compress_tokens(found, tokens_of("a short text, coded once"), CONFIG).data
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert again == coded


def test_settings_follow_the_artifact(found: Artifact) -> None:
    assert text_codec.settings_for(found).window_tokens == tiny_artifact.CONTEXT
    with pytest.raises(RecipeError, match="window_tokens"):
        compress_tokens(found, tokens_of("x"), replace(CONFIG, window_tokens=1000))


def test_the_command_says_what_is_wrong(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "text").write_text("text")
    for arguments, named in (
        (["compress", case.artifact, tmp_path / "latin", tmp_path / "out"], "not UTF-8 at byte 3"),
        (["compress", tmp_path / "latin", tmp_path / "text", tmp_path / "out"], "not a hedgemix artifact"),
        (["compress", case.artifact, tmp_path / "missing", tmp_path / "out"], "missing"),
        (["compress", case.artifact, tmp_path / "text", tmp_path / "out", "--recipe", tmp_path / "recipe.json"], "rec"),
        (["decompress", case.artifact, tmp_path / "latin", tmp_path / "out"], "latin: not a file"),
    ):
        monkeypatch.setattr(sys, "argv", ["hedgemix", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert named in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_command_codes_and_decodes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"")
    for arguments in (["compress", case.artifact, tmp_path / "text", tmp_path / "coded"],
                      ["decompress", case.artifact, tmp_path / "coded", tmp_path / "back"]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["hedgemix", *map(str, arguments)])
        cli.main()
    assert (tmp_path / "back").read_bytes() == b""
    assert "0 bytes of text in" in capsys.readouterr().out
