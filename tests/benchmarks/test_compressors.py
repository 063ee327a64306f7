"""General compressors beside the score, on a little text."""

from __future__ import annotations

import bz2
import json
import lzma
import shutil
import zlib
from pathlib import Path

import pytest

from benchmarks.quality import compressors
from benchmarks.quality.compressors import Options
from benchmarks.suite.report import parse
from hedgemix.config import DataConfig
from hedgemix.data import corpus, dataset
from support.text_data import documents

STANDARD = {"zlib": lambda text: len(zlib.compress(text, 9)), "bz2": lambda text: len(bz2.compress(text))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A dataset's folder, and its text of both sides."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents()[:60]))
    config = DataConfig("text", paths=(str(folder / "a.jsonl"),), vocab_size=384, valid_fraction=0.2, overlap_words=0)
    dataset.save(dataset.prepare(config, folder, lambda line: None), folder)
    train, valid = ("\0".join(side).encode() for side in corpus.split(corpus.collect(config), 0.2))
    return folder, train, valid


def test_the_table_is_the_archives_sizes(
    made: tuple[Path, bytes, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, train, valid = made
    monkeypatch.setattr(compressors, "COMPRESSORS", STANDARD)
    page = tmp_path / "compressors.md"
    page.write_text("before\n<!-- bench:compressors -->\nold\n<!-- /bench:compressors -->\nafter\n")
    monkeypatch.setattr(compressors, "DOCUMENT", page)
    compressors.main(Options(folder, update_docs=True))
    out = capsys.readouterr().out
    rows = {row["compressor"]: row for row in parse(out[out.index("| compressor") :].split("\n\n")[0].strip())}
    for name, compress in STANDARD.items():
        alone, grown = compress(valid), compress(train + b"\0" + valid) - compress(train)
        assert float(rows[name]["alone, bits per byte"]) == pytest.approx(8 * alone / len(valid), abs=5e-5)
        assert float(rows[name]["primed, bits per byte"]) == pytest.approx(8 * grown / len(valid), abs=5e-5)
        assert rows[name]["archive of the training text, bytes"] == f"{compress(train):,}"
    assert f"{len(valid):,} bytes of validation text" in out and "windows of 8 words are in the training text" in out
    assert "old" not in page.read_text() and out.strip() in page.read_text() and page.read_text().endswith("after\n")


def test_a_compressor_that_is_not_there(made: tuple[Path, bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressors.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no compressor 'zpaq -m5' here; choose from xz -9e"):
        compressors.main(Options(made[0], ("zpaq -m5",)))


@pytest.mark.parametrize("name", compressors.COMPRESSORS)
def test_priming_with_the_text_itself_leaves_next_to_nothing(name: str) -> None:
    if name == compressors.ZPAQ and not shutil.which("zpaq"):
        pytest.skip("zpaq is not installed")
    text = documents()[0].encode() + documents()[1].encode()
    row = compressors.measure(name, compressors.COMPRESSORS[name], text, text)
    assert 0 < row.alone_bytes == row.train_archive_bytes < len(text)
    assert row.primed_bytes < 0.25 * row.alone_bytes
    assert row.alone_bytes < 1.2 * len(lzma.compress(text)) + 1000 * (name == compressors.ZPAQ)  # its own index
