"""What a recipe's bytes are shared out to, beside an artifact that was written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from hedgemix import stages
from hedgemix.artifact import format as artifact
from hedgemix.config import DataConfig, Recipe, TrainConfig
from pipeline.forecast import artifact_bytes
from support import tiny_artifact
from support.text_data import processor


def test_the_shares_are_those_of_an_artifact(tmp_path: Path) -> None:
    case = tiny_artifact.make(tmp_path, texts=1)
    parts = artifact.read_parts(case.artifact)
    (tmp_path / "pieces.model").write_bytes(parts.tokenizer)
    data = DataConfig(source="shards", shards_dir=str(tmp_path), vocab_size=512, memory_bytes=1000)
    recipe = Recipe("tiny", data=data, model=tiny_artifact.MODEL, train=TrainConfig(sequence_tokens=64))
    shares = artifact_bytes.share_out(recipe, case.model())
    stored = {name: length for name, (_, length) in parts.lengths.items()}
    assert shares.weights == sum(tensor.codes.numel() for tensor in parts.stepped)
    assert (shares.tokenizer, shares.known_tokenizer) == (stored["tokenizer"], True)
    steps = sum(len(tensor.row_index) + len(tensor.column_index) for tensor in parts.stepped)
    rest = len(parts.halves) + artifact_bytes.STEP_BITS / 8 * steps
    assert shares.rest == artifact_bytes.OWN_BYTES + round(rest)
    assert stored["halves"] <= len(parts.halves) and stored["document"] + 156 < artifact_bytes.OWN_BYTES
    told = shares.left + shares.tokenizer + shares.rest + shares.memory
    assert shares.memory == 1000 and told == stages.artifact_room(recipe, shares.script)
    shutil.copy(tmp_path / "pieces.model", tmp_path / "other.model")
    assert artifact_bytes.tokenizer_bytes(data)[1] is False  # which of the two is not known
    named = replace(data, tokenizer=str(tmp_path / "other.model"))
    assert artifact_bytes.tokenizer_bytes(named) == (stored["tokenizer"], True)
    about, known = artifact_bytes.tokenizer_bytes(DataConfig(vocab_size=processor().vocab_size()))
    assert not known and stored["tokenizer"] < about < 2 * stored["tokenizer"]  # half of so few are single bytes


def test_a_quarter_of_the_loss_takes_a_bit_more_up_to_what_is_left() -> None:
    assert artifact_bytes.needed_bits(5e-4) == (3.3, 5.4)
    assert artifact_bytes.needed_bits(5e-4 / 16) == (5.3, 7.4)
    assert artifact_bytes.needed_bits(1e6) == (0, 0)
    shares = artifact_bytes.Shares(100, 20, True, 7, 3, left=400, weights=800)
    assert shares.bits == 4
    assert shares.expected(5e-4) == (130 + 330, 130 + 400)
    assert shares.expected(5e-4 / 16) == (130 + 400, 130 + 400)
    assert replace(shares, left=-5).expected(5e-4) == (130, 130)
