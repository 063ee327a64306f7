"""Where an artifact's bytes go: the parts add up to the file, and the figures are those of its tensors."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hedgemix import cli
from hedgemix.artifact import format as artifact
from hedgemix.artifact import inspection
from hedgemix.artifact.tensors import Stepped, Stored
from hedgemix.data.memory import compress

HEADER = {"recipe": "tiny", "seed": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(128, 96, generator=generator)
    index = torch.zeros(128, dtype=torch.int8), torch.full((96,), -16, dtype=torch.int8)
    tensors = {
        "wide": Stepped((8 * normal).round().int(), *index),
        "narrow": Stepped((0.5 * normal).round().int(), *index),
        "levels": Stored((4 * normal).round().clamp(-15, 15).to(torch.int8), torch.full((128,), 0.25).half()),
        "gain": torch.randn(50, generator=generator).half(),
        "scalar": torch.tensor(0.1),
    }
    artifact.write(tmp_path_factory.mktemp("anatomy") / "a.hmx", HEADER, b"tokenizer", tensors, 3)
    return tmp_path_factory.getbasetemp() / "anatomy0" / "a.hmx"


def test_tensors_add_up_to_their_sections(path: Path) -> None:
    parts = artifact.read_parts(path)
    found = {organ.name: organ for organ in inspection.organs(parts)}
    assert list(found) == ["gain", "levels", "narrow", "scalar", "wide"]
    stored = sum(parts.lengths[name][1] for name in artifact.SECTIONS[2:7])
    assert sum(organ.n_bytes for organ in found.values()) == pytest.approx(stored)
    assert found["scalar"].n_bytes == parts.lengths["singles"][1]
    rows, columns = (found[name].n_bytes for name in ("wide", "narrow"))
    assert rows + columns == pytest.approx(parts.lengths["weights"][1] + parts.lengths["steps"][1])


def test_bits_are_near_the_entropy(path: Path) -> None:
    found = {organ.name: organ for organ in inspection.organs(artifact.read_parts(path))}
    for name, deviation in (("wide", 8.0), ("narrow", 0.5)):
        organ = found[name]
        edges = torch.tensor([(k - 0.5) / deviation for k in range(-60, 62)], dtype=torch.float64)
        p = torch.special.ndtr(edges).diff().clamp_min(1e-30)
        entropy = float(-(p * p.log2()).sum())
        assert organ.ideal_bits is not None
        assert organ.ideal_bits / organ.weights == pytest.approx(entropy, rel=0.05)
        assert 0.95 * entropy < 8 * organ.n_bytes / organ.weights < 1.15 * entropy + 0.05
    levels = found["levels"]
    assert levels.ideal_bits is not None and 8 * levels.n_bytes > levels.ideal_bits


def test_steps_are_the_median(path: Path) -> None:
    found = {organ.name: organ.median_step for organ in inspection.organs(artifact.read_parts(path))}
    assert found == {"wide": 0.25, "narrow": 0.25, "levels": 0.25, "gain": None, "scalar": None}


def test_entropy_of_equal_codes() -> None:
    assert inspection.entropy_bits(torch.arange(8)) == pytest.approx(24)
    assert inspection.entropy_bits(torch.zeros(8)) == inspection.entropy_bits(torch.zeros(0)) == 0


def test_bars_are_as_long_as_their_values() -> None:
    assert [str(inspection.bar(value, 64)) for value in (64, 32, 1, 0)] == ["█" * 32, "█" * 16, "▌", ""]
    assert str(inspection.bar(0, 0)) == ""


def test_the_picture_names_every_part(path: Path) -> None:
    text = io.StringIO()
    inspection.show(path, Console(file=text, width=160))
    said = text.getvalue()
    for part in ("128x96", "wide", "narrow", "levels", "gain", "scalar", "weights", "document", "recipe tiny"):
        assert part in said
    assert f"{path.stat().st_size:,} bytes" in said.replace("\n", "")


def test_the_picture_names_a_memory(tmp_path: Path) -> None:
    text = io.StringIO()
    memory = compress(["one document", "another document"])
    artifact.write(tmp_path / "a.hmx", {}, b"", {}, 1, memory)
    inspection.show(tmp_path / "a.hmx", Console(file=text, width=160))
    assert f"memory: 2 training documents, 29 bytes of text in {len(memory.data)}" in text.getvalue()
    assert re.search(rf"memory +{len(memory.data)} ", text.getvalue())


def test_an_artifact_without_tensors(tmp_path: Path) -> None:
    artifact.write(tmp_path / "empty", {}, b"", {"none": Stepped(*_nothing())}, 1)
    [organ] = inspection.organs(artifact.read_parts(tmp_path / "empty"))
    assert organ.weights == 0 and not math.isnan(organ.n_bytes)
    inspection.show(tmp_path / "empty", Console(file=io.StringIO()))


def _nothing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.from_numpy(np.zeros(3, np.int8))
    return torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, dtype=torch.int8), index


def test_the_command(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "hedgemix.cli", "inspect"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    assert "ideal: bits a weight" in done.stdout
    (tmp_path / "other").write_bytes(b"text")
    monkeypatch.setattr(sys, "argv", ["hedgemix", "inspect", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "not a hedgemix artifact" in capsys.readouterr().err
