"""The `hedgemix` command's answers to a newcomer's mistakes: a line that names the thing and the fix, exit code 2,
before any work, and nothing of theirs touched."""

from __future__ import annotations

import io
import os
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hedgemix.data import dataset
from hedgemix.options import check_arguments
from pipeline import cli

TEXT = "prepare --folder out --source text --paths"
MISTAKES = {
    # wrong path
    f"{TEXT} none.txt": "data.paths: none.txt does not exist; name a file or folder that does",
    f"{TEXT} empty": "data.paths: folder empty holds no file that can be read: .txt",
    f"{TEXT} ''": "--paths '' is empty, as of a shell variable that is not set; give it a value or leave it out",
    "prepare --folder '' --source text --paths a.txt": "--folder '' is empty",
    "prepare --folder a.txt --source text --paths a.txt": "a.txt is not a folder; name one",
    "inspect none.hmx": "none.hmx: No such file or directory; name one that is there",
    "inspect empty": "empty: Is a directory; name a file",
    "report none.parquet": "none.parquet is not there; give the parquet file",
    "audit a.txt": "a.txt is no parquet file (",
    "compare mine.parquet mine.parquet": "mine.parquet has no column record: it is no record's table",
    # wrong field
    f"{TEXT} a.jsonl --text-field body": "a.jsonl:1 has no text in 'body'; set data.text_field",
    f"{TEXT} mine.parquet": "mine.parquet has no column 'text', but mine, other; set data.text_field to one of them",
    f"{TEXT} a.jsonl --vocab-size 70000": "data.vocab_size is 70000; tokens have 16 bits",
    f"{TEXT} a.jsonl --valid-fraction 2": "data.valid_fraction is 2.0; it must be above 0 and below 1, such as 0.02",
    "prepare --folder out --paths a.txt": "data.source docs does not read it; set data.source text, or leave",
    "prepare --folder out --packages none1 numpy none2": "data.packages: 'none1' is not installed; install it or leave",
    "download --folder out --variant 1024": "variant '1024' is unknown; use sp and the vocabulary size, as in sp1024",
    "audit mine.parquet --draw-seed -1": "--draw-seed is -1; it must not be negative",
    # swapped
    "compress a.txt model.hmx out.hmc": "a.txt is not a hedgemix artifact; give the file that quantize wrote",
    "compress model.hmx out.hmc a.txt": "a.txt: File exists; name another place",
    "decompress model.hmx out.hmc a.txt": "a.txt: File exists; name another place",
    "audit --scorer json:dumps": "--scorer needs --tokens, the file of a text",
    "audit --scorer json:dumps --tokens mine.parquet --report a.txt": "a.txt: File exists; name another place",
    # missing package
    "audit --scorer none:f --tokens a.txt": "--tokens a.txt: give a shard (.bin) or a NumPy file of integers (.npy)",
    # theirs
    "prepare --folder theirs --source text --paths a.txt": "theirs holds train_0.bin, which no dataset.json there",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "a.txt").write_text("A text.\n")
    (folder / "a.jsonl").write_text('{"text": "A text."}\n')
    (folder / "empty").mkdir()
    (folder / "theirs").mkdir()
    (folder / "theirs" / "train_0.bin").write_text("theirs")
    pq.write_table(pa.table({"mine": [1], "other": [2]}), folder / "mine.parquet")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["hedgemix", *shlex.split(command)])
    before = files(place)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.out == ""
    assert told.err.startswith("error: ") and MISTAKES[command] in told.err and "Traceback" not in told.err
    assert len(told.err.splitlines()) == (2 if "none2" in command else 1)
    assert files(place) == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied; permit it, or name another place"),
        (OSError(28, "No space left on device", "x"), "x: No space left on device; make room, and run the same"),
        (OSError("of a store"), "of a store"),
        (
            ModuleNotFoundError("No module named 'pyppmd'", name="pyppmd"),
            "the package pyppmd is not installed; install",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(command: object) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["hedgemix", "inspect", "x"])
    monkeypatch.setattr(cli, "COMMANDS", dict.fromkeys(cli.COMMANDS, fails))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(f"error: {line}")


def test_names_that_are_not_utf_8_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    odd, shown = os.fsdecode(b"n\xfcr.txt"), io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, "utf-8"))
    with pytest.raises(UnicodeEncodeError):
        print(odd)
    check_arguments([odd])
    print(odd, flush=True)
    assert shown.getvalue() == b"n\\udcfcr.txt\n"


def test_names_with_brackets_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = dict.fromkeys(("tokenizer_sha256", "valid_sha256", "train_sha256", "text_sha256"), "0" * 64)
    counts = dict.fromkeys(("vocab_size", "train_tokens", "valid_tokens", "max_valid_tokens", "valid_bytes"), 5)
    made = dataset.Dataset(
        "docs", (), (), "", train_documents=1, valid_documents=1, valid_overlap_share=0.0, train_bytes=1,
        train_bytes_removed=0, **counts, **sums,
    )  # fmt: skip
    monkeypatch.setattr(dataset, "prepare", lambda *given: made)
    monkeypatch.setattr("sys.argv", ["hedgemix", "prepare", "--folder", "a[b]c"])
    monkeypatch.chdir(tmp_path)
    cli.main()
    assert "docs in a[b]c" in capsys.readouterr().out
